"""What is trained of a converted model, as the files of its base have it, a tensor at a time.

Lives here: W + dW of the targets, and what else is trained. Called by `export`, by all ranks
together. Must never: hold the whole model, or touch what nobody has trained.

W is read from the files, since loading may have rounded it (`compute_dtype`); dW is added to it in
float32 and rounded once, to the type of the file. Names and layouts of files and model differ where
transformers converts while loading (experts); that conversion moves numbers about and computes
nothing, so that W and dW are added as the model has them and then go back together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from osft_trainer.agreement import from_first_rank
from osft_trainer.base_layout import Group, Layout, Part, check_same_files, layout_of, parts_of
from osft_trainer.base_weights import BaseWeights
from osft_trainer.exchange import full
from osft_trainer.linear import SubspaceWeight
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World

Change = Callable[[Tensor], Tensor]
"""Makes what is exported of what the base has, as the model has both."""


def trained_weights(
    model: OSFTModel, base: Path, world: World
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """Yield what makes CPU tensors by their names in the base's files, a few at a time.

    Collective when sharded: ranks other than the first only take part and are given nothing. What
    may fail on the first rank alone, reading the base, is left to the call of what is yielded.

    Raises:
        OSError: on every rank, if the first cannot read the base's headers, or they have changed.
        ValueError: on every rank, if the files are not those that the model was made of.
    """
    parts = [part for part in parts_of(model.hf) if part.is_trained]
    opened = _opened(model.hf, parts, base, world)
    pending: dict[int, dict[str, Change]] = {}
    for part in parts:
        change = _change(part, world.rank == 0)
        if opened is None or change is None:
            continue
        weights, layout = opened
        for group in _groups(part, layout):
            changes = pending.setdefault(id(group), {})
            changes |= {name: change for name in part.names if name in group.model}
            if len(changes) == _trained_of(group, parts):
                yield partial(_made, model.hf, weights, group, pending.pop(id(group)))
    assert not pending, "every trained tensor of a group has come by"


def _opened(
    hf: PreTrainedModel, parts: list[Part], base: Path, world: World
) -> tuple[BaseWeights, Layout] | None:
    """The base's files, on the first rank; its failure is raised on all."""
    opened: list[tuple[BaseWeights, Layout]] = []

    def on_first_rank() -> str:
        check_same_files(hf, base)
        weights = BaseWeights(base)
        layout = layout_of(hf, weights)
        lost = [part.names[0] for part in parts if not _groups(part, layout)]
        if lost:
            raise ValueError(
                f"model_path: the files of {base} hold nothing of {lost[0]}, which is trained: "
                "give the folder that the model was loaded from"
            )
        opened.append((weights, layout))
        return json.dumps(len(layout.groups))

    from_first_rank(world, on_first_rank)
    return opened[0] if opened else None


def _groups(part: Part, layout: Layout) -> list[Group]:
    """Those that a tensor belongs to; tied ones may lie in the files under each of their names."""
    found = {id(layout.of[name]): layout.of[name] for name in part.names if name in layout.of}
    return list(found.values())


def _trained_of(group: Group, parts: list[Part]) -> int:
    """How many tensors of a group are trained."""
    if len(group.model) == 1:
        return 1
    return len(set(group.model) & {name for part in parts for name in part.names})


def _change(part: Part, is_first: bool) -> Change | None:
    """Gather what is trained of a tensor; the ranks behind the first let it go."""
    source = part.source
    tensor = source.update() if isinstance(source, SubspaceWeight) else full(source)
    if not is_first:
        return None
    tensor = tensor.detach().cpu()
    if isinstance(source, SubspaceWeight):
        return partial(_added, tensor)
    return lambda _: tensor


def _added(update: Tensor, weight: Tensor) -> Tensor:
    if not update.any():  # bit for bit, the sign of a zero included
        return weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).add_(update)


def _made(
    hf: PreTrainedModel, weights: BaseWeights, group: Group, changes: Mapping[str, Change]
) -> dict[str, Tensor]:
    tensors = group.to_model(hf, {name: weights.read(name) for name in group.files})
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    return group.to_files(hf, tensors)
