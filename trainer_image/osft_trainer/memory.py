"""What a run needs of memory on each rank, before it has any.

Lives here: counting the bytes of the real modules, converted on the meta device, and an estimate of
activations. Called by `planning`. Must never: read weights, or repeat a formula that the modules
themselves answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from osft_trainer.decomposition import part_shapes
from osft_trainer.layout import layout_of
from osft_trainer.linear import SubspaceLinear, SubspaceWeight
from osft_trainer.model import OSFTModel, convert
from osft_trainer.model_folder import faults_of, read_configuration
from osft_trainer.moments import SharedMoment
from osft_trainer.subspace import Split
from osft_trainer.targets import Plan, Target, decoder_blocks

MOMENT_BYTES = 4
"""Of a number of AdamW's first or second moment."""
GRADIENT_BYTES = 4

_LOGIT_TOKENS = 1024
"""Tokens whose logits exist at one time, in the families with a chunked head."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Exact but for the last two and shared bases."""

    effective: int
    """W + dW of the targets, in the compute dtype."""
    base: int
    """W of the targets, in the compute dtype."""
    bases: int
    """Kept and free bases, float32. A basis that matrices with one input share in a split by
    activations is counted for each of them."""
    factors: int
    """What is trained, float32."""
    gradients: int
    """Of what is trained, float32."""
    adam: int
    """Both moments, float32; of `exact` on matrices that are not square the second is small."""
    frozen: int
    """Everything that is no target and is not trained."""
    startup: int
    """Host memory of one rank while it loads: the whole model, the effective weights and what is
    trained, unless it begins at zero; not yet shared out. The bases are mapped from their files,
    for all ranks of a node together."""
    saving: int
    """Host memory of one rank from the first save on: its copy of what is trained and both moments,
    into which every state is taken; pinned on CUDA, where each tensor takes a power of two."""
    gathered: int
    """Estimate: parameters of two blocks and of the rest as FSDP gathers them, and the product that
    the largest target's update needs."""
    activations: int
    """Estimate: what one forward and backward pass of maxTokensPerGpu holds."""

    @property
    def static(self) -> int:
        """What lies there all the time."""
        weights = self.effective + self.base + self.bases + self.frozen
        return weights + self.factors + self.gradients + self.adam

    @property
    def total(self) -> int:
        """Of a step, with the estimates; the copy of a save is beside it."""
        return self.static + self.gathered + self.activations

    def to_json(self) -> dict[str, int]:
        """Plain values."""
        return {**asdict(self), "static": self.static, "total": self.total}


def empty_model(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a folder's configuration on the meta device: shapes without numbers."""
    config = read_configuration(folder, trust_remote_code)
    with faults_of(folder, "the configuration"), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return model


def converted(hf: PreTrainedModel, plan: Plan) -> OSFTModel:
    """Carry the plan out on an empty model: the modules of the run, without a decomposition."""

    def shapes(target: Target, weight: Tensor) -> Split:
        parts = part_shapes(target, plan)
        return Split(**{name: torch.empty(size, device="meta") for name, size in parts.items()})

    return convert(hf, plan, decompose=shapes)


def memory_of(
    model: OSFTModel,
    *,
    processes: int,
    tokens: int,
    activation_checkpointing: bool,
    accumulates: bool,
    selective: bool = False,
    pinned: bool = False,
) -> Memory:
    """Count one rank's share.

    Args:
        model: converted, on the meta device.
        processes: ranks that share the model by FSDP2 (rows of each parameter).
        tokens: of one forward pass, maxTokensPerGpu.
        activation_checkpointing: blocks are computed again in backward.
        accumulates: a step has several passes, between which whole gradients are kept.
        selective: of what is computed again, products and attention are kept.
        pinned: a save's copy lies in pinned memory, as on CUDA.
    """
    bytes_of: dict[str, int] = dict.fromkeys(("effective", "base", "bases", "frozen"), 0)
    trained = trained_whole = moments = startup = saving = 0
    trainables = model.trainables()
    shared = {id(trainables[name]): each for name, each in model.shared_moments().items()}
    for kind, tensor in _tensors(model.hf):
        size = _share(tensor, 1 if kind == "buffer" else processes)
        if kind not in ("zeros", "bases"):
            startup += tensor.numel() * tensor.element_size()
        if kind in ("trained", "zeros"):
            trained += size // tensor.element_size()
            trained_whole += tensor.numel()
            second = _second_moment(tensor, shared.get(id(tensor)), processes)
            moments += size // tensor.element_size() * MOMENT_BYTES + second
            # The value and both moments.
            copied = (size, size, second)
            saving += sum(_power_of_two(part) if pinned else part for part in copied)
        else:
            bytes_of["frozen" if kind == "buffer" else kind] += size
    whole_gradients = accumulates and processes > 1
    return Memory(
        **bytes_of,
        factors=trained * 4,
        gradients=(trained_whole if whole_gradients else trained) * GRADIENT_BYTES,
        adam=moments,
        startup=startup,
        saving=saving,
        gathered=_gathered(model, processes),
        activations=_activations(model, tokens, activation_checkpointing, selective),
    )


def _tensors(hf: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its kind, tied ones once."""
    seen: set[int] = set()
    for module in hf.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.requires_grad:
                # The memory of zeros is the system's until they are written.
                is_zero = isinstance(module, SubspaceWeight) and name == "factor"
                yield "zeros" if is_zero else "trained", parameter
            elif isinstance(module, SubspaceWeight):
                yield "effective" if name == "effective" else "bases", parameter
            else:
                yield "frozen", parameter
        for name, buffer in module.named_buffers(recurse=False):
            if not isinstance(module, SubspaceWeight):
                yield "buffer", buffer
            else:
                yield "base" if name == "base" else "bases", buffer


def _share(tensor: Tensor, processes: int) -> int:
    """Bytes of the rank with most rows."""
    if tensor.dim() == 0:
        return tensor.element_size()
    rows = -(-tensor.shape[0] // processes)
    return rows * tensor.shape[1:].numel() * tensor.element_size()


def _second_moment(factor: Tensor, shared: SharedMoment | None, processes: int) -> int:
    """Bytes of a parameter's second moment on the rank with most rows."""
    rows = -(-factor.shape[0] // processes) if factor.dim() else 1
    mine = [rows, *factor.shape[1:]] if factor.dim() else []
    return prod(mine if shared is None else shared.shape(mine)) * MOMENT_BYTES


def _power_of_two(size: int) -> int:
    """The least one that holds so many bytes: what torch's allocator of pinned memory takes."""
    return 1 << max(size - 1, 0).bit_length()


def _gathered(model: OSFTModel, processes: int) -> int:
    width = model.compute_dtype.itemsize
    largest = max((s.effective.numel() for _, s in model.subspaces()), default=0)
    update = 2 * 4 * largest // processes
    if processes == 1:
        return update
    _, blocks = decoder_blocks(model.hf)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    rest = sum(p.numel() for p in model.parameters()) - sum(sizes)
    return update + (2 * max(sizes) + rest) * width


def _activations(
    model: OSFTModel, tokens: int, activation_checkpointing: bool, selective: bool
) -> int:
    """What one pass holds, from the shapes of the modules.

    Each matrix's output twice (itself, and what the next operation makes of it), four times the
    hidden state for norms and residuals; logits and their gradient in float32, and of a head that
    is trained its gradient as it is added up and as it comes. What selective recomputation keeps:
    each matrix's output once, attention's, and the block's input.
    """
    config = model.hf.config
    width = model.compute_dtype.itemsize
    hidden = int(config.hidden_size)
    _, blocks = decoder_blocks(model.hf)
    each = [tokens * width * (2 * _outputs(block, config) + 4 * hidden) for block in blocks]
    chunked = not layout_of(config).is_padded
    logits = (min(tokens, _LOGIT_TOKENS) if chunked else tokens) * int(config.vocab_size)
    head = logits * (4 + 4 + width)
    if width < 4 and _trains_head(model):
        head += hidden * int(config.vocab_size) * (4 + width)
    if activation_checkpointing:
        inputs = len(each) * tokens * hidden * width
        kept = sum(_outputs(block, config) + hidden for block in blocks) if selective else 0
        return inputs + tokens * width * kept + max(each) + head
    return sum(each) + head


def _trains_head(model: OSFTModel) -> bool:
    head = model.hf.get_output_embeddings()
    return head is not None and any(p.requires_grad for p in head.parameters())


def _outputs(block: nn.Module, config: object) -> int:
    """Numbers that the block's matrices give for one token."""
    found = 0
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | SubspaceLinear):
            found += module.out_features
        elif isinstance(module, Conv1D):
            found += module.nf
        elif isinstance(module, SubspaceWeight) and module.batched:
            chosen = int(getattr(config, "num_experts_per_tok", None) or 1)
            found += chosen * max(module.effective.shape[1:])
        elif "expert" in name:
            wide = [p.shape for p in module.parameters(recurse=False) if p.dim() == 3]
            found += sum(max(shape[1:]) for shape in wide)
    return found
