"""The weights of a converted model under the names of its base's files, a decoder block at a time.

Lives here: W + dW of the targets, what else is trained, and what nobody has trained. Called by
`export`, by all ranks together. Must never: hold the whole model, or hand out what loading has
rounded where the base's files have it exactly.

A base in float32 or float16 is rounded when it is loaded in bfloat16 (`compute_dtype`). Of a block
of such a base only what is trained comes from the model: dW is added in float32 to W as the files
hold it, and all the rest is the files' own. Names and layouts of files and model differ where
transformers converts while loading (experts); that conversion moves numbers about and computes
nothing, so that dW may go through its reverse like W.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from osft_trainer.agreement import from_first_rank
from osft_trainer.base_weights import BaseWeights, names_in_files
from osft_trainer.exchange import full
from osft_trainer.experts import TRAINED_SUFFIX, MasterParameter
from osft_trainer.linear import SubspaceWeight
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World
from osft_trainer.targets import decoder_blocks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """One tensor of the model before conversion, by its original name."""

    name: str
    source: SubspaceWeight | Tensor
    """A target, or a tensor that is itself what is exported."""
    is_trained: bool

    @property
    def sort(self) -> str:
        """How it is exported on an exact base: with an update, as it is, or from the files."""
        if isinstance(self.source, SubspaceWeight):
            return "target"
        return "trained" if self.is_trained else "untouched"

    @property
    def loaded(self) -> Tensor:
        """What was read from the base, or has the place of it."""
        return self.source.base if isinstance(self.source, SubspaceWeight) else self.source

    def whole(self) -> Tensor:
        """All of it, as the model has it. Collective when sharded."""
        if isinstance(self.source, SubspaceWeight):
            return self.source.dense()
        return full(self.source)


def dense_weights(
    model: OSFTModel, dtype: torch.dtype, base: Path, world: World
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield names and what makes CPU tensors in `dtype`, as the base's files have them.

    Collective when sharded: ranks other than the first only take part and are given nothing. What
    may fail on the first rank alone, reading the base, is left to the call of what is yielded.

    Raises:
        OSError: on every rank, if the first cannot read the base's headers.
    """
    blocks = _blocks(model)
    rounded, files = _rounded_blocks(model.hf, blocks, base, world)
    for number, block in enumerate(blocks):
        if number in rounded:
            yield from _on_exact_base(model.hf, block, dtype, files)
            continue
        group: dict[str, Tensor] = {}
        for part in block:
            tensor = part.whole()
            if world.rank == 0:
                group[part.name] = _as(tensor, dtype)
        for name, tensor in _renamed(model.hf, group):
            yield name, partial(_as, tensor, dtype)


def _on_exact_base(
    hf: PreTrainedModel, block: list[_Part], dtype: torch.dtype, files: BaseWeights | None
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The same of a block whose base was rounded; `files` are the first rank's."""
    updates: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for part in block:
        if isinstance(part.source, SubspaceWeight):
            update = part.source.update()
            if files is not None:
                updates[part.name] = update.detach().cpu()
        elif part.is_trained:
            tensor = part.whole()
            if files is not None:
                trained[part.name] = _as(tensor, dtype)
    if files is None:
        return
    for name, tensor in _renamed(hf, trained):
        yield name, partial(_as, tensor, dtype)
    rest = {part.name: _shape_of(part) for part in block if part.sort == "untouched"}
    for name, _ in _renamed(hf, rest):
        yield name, partial(_added, files, name, None, dtype)
    for name, update in _renamed(hf, updates):
        yield name, partial(_added, files, name, update, dtype)


def _added(files: BaseWeights, name: str, update: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = files.read(name)
    if update is not None and update.any():  # else bit for bit, the sign of a zero included
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + update
    return _as(weight, dtype)


def _rounded_blocks(
    hf: PreTrainedModel, blocks: list[list[_Part]], base: Path, world: World
) -> tuple[set[int], BaseWeights | None]:
    """Blocks that loading has rounded and whose tensors the files have, by name and shape.

    The first rank looks for all: they must take part in the same collectives. It alone is given the
    files.
    """
    opened: list[BaseWeights] = []

    def on_first_rank() -> str:
        try:
            opened.append(BaseWeights(base))
        except SafetensorError as error:
            raise OSError(f"{base}: {error}") from error
        return json.dumps(_found_rounded(hf, blocks, opened[0]))

    rounded = set(json.loads(from_first_rank(world, on_first_rank)))
    return rounded, opened[0] if opened else None


def _found_rounded(hf: PreTrainedModel, blocks: list[list[_Part]], files: BaseWeights) -> list[int]:
    if not any(files.loses_some(p.loaded.dtype) for block in blocks for p in block):
        return []
    found, is_lost = [], False
    for number, block in enumerate(blocks):
        tensors = _names_in_files(hf, block)
        if not tensors or not all(files.has(name, t.shape) for name, t in tensors.items()):
            kept = (part.loaded.dtype for part in block if part.sort != "trained")
            is_lost = is_lost or any(map(files.loses_some, kept))
        elif any(files.loses(name, tensor.dtype) for name, tensor in tensors.items()):
            found.append(number)
    if is_lost:
        logger.warning(
            "some of the base's weights are exported as compute_dtype has rounded them: its files "
            "have them under other names or in other shapes"
        )
    return found


def _names_in_files(hf: PreTrainedModel, block: list[_Part]) -> dict[str, Tensor]:
    """What a block's tensors are in the files: shapes and types, without numbers.

    Each sort goes by itself, as in `_on_exact_base`. Where a conversion needs several at once, what
    comes out has no name of the files, or nothing comes out.
    """
    found: dict[str, Tensor] = {}
    for sort in ("target", "trained", "untouched"):
        named = names_in_files(hf, {p.name: _shape_of(p) for p in block if p.sort == sort})
        if named is None:
            return {}
        found |= named
    return found


def _renamed(hf: PreTrainedModel, group: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and layouts of the base's files."""
    if group:
        yield from revert_weight_conversion(hf, group).items()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)


def _shape_of(part: _Part) -> Tensor:
    return torch.empty(part.loaded.shape, dtype=part.loaded.dtype, device="meta")


def _blocks(model: OSFTModel) -> list[list[_Part]]:
    """Every tensor of the model before conversion, tied ones once; a decoder block is a list."""
    prefix, _ = decoder_blocks(model.hf)
    parts = groupby(_parts(model), key=lambda part: _block_of(part.name, prefix))
    return [list(block) for _, block in parts]


def _parts(model: OSFTModel) -> Iterator[_Part]:
    seen: set[int] = set()
    for path, module in model.hf.named_modules():
        if isinstance(module, SubspaceWeight):
            yield _Part(_original_name(path), module, is_trained=True)
            continue
        if isinstance(module, MasterParameter):
            yield _Part(_original_name(path), module.value, is_trained=True)
            continue
        own = [*module.named_parameters(recurse=False), *_persistent_buffers(module)]
        for name, tensor in own:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Part(f"{path}.{name}" if path else name, tensor, tensor.requires_grad)


def _original_name(path: str) -> str:
    if path.endswith(TRAINED_SUFFIX):
        return path.removesuffix(TRAINED_SUFFIX)
    return path.removesuffix(".subspace") + ".weight"


def _persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    hidden = module._non_persistent_buffers_set
    return [(n, b) for n, b in module.named_buffers(recurse=False) if n not in hidden]


def _block_of(name: str, prefix: str) -> str:
    """The decoder block a name belongs to, as `<prefix>.<number>`; else the empty string."""
    if not name.startswith(f"{prefix}."):
        return ""
    return f"{prefix}.{name.removeprefix(f'{prefix}.').split('.')[0]}"
