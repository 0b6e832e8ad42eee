"""Which matrices get the subspace treatment, and what happens to everything else.

What lives here: finding the decoder blocks by structure, choosing targets, and the `Plan` that
`model.convert` carries out and `plan.json` shows. Called by the trainer and by `osft plan`; works
on a model on the meta device. Must never: read weights, or judge by the model folder's name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from osft_trainer.subspace import PARAMETERIZATIONS, free_rank

OTHER_PARAMETERS = ("frozen", "norms", "all")
_LEAST_KEPT = 0.1
"""Share of a matrix that is kept however little its block matters."""
SPLITS = ("weights", "activations")

_ROUTER_LEAVES = frozenset({"gate", "router", "shared_expert_gate", "wg"})
"""Last path component of what picks experts. `gate_proj` of an MLP is not among them."""


@dataclass(frozen=True)
class Target:
    """One matrix, or one tensor of experts."""

    name: str
    """What patterns match and reports print: the module's path; for experts the parameter's."""
    module: str
    """Path of the module that owns the parameter."""
    parameter: str
    """Full name of the parameter in the model's own state dict."""
    kind: str
    """linear, conv1d or experts."""
    shape: tuple[int, ...]
    """As stored; experts have the number of experts first."""
    kept_rank: int
    free_rank: int
    trainable: int
    """Trained numbers of this target."""


@dataclass(frozen=True)
class Plan:
    """Everything `model.convert` will do, decided before any weight is touched."""

    unfreeze_rank_ratio: float
    parameterization: str
    split_by: str
    """weights: kept are the strong directions of the matrix; activations: those of its inputs."""
    other_parameters: str
    targets: tuple[Target, ...]
    trained_others: tuple[str, ...]
    """Parameters that are no target and are trained without protection."""
    uncovered: tuple[str, ...]
    """Parameters that are no target and stay frozen."""
    trainable: int
    """Trained numbers in all."""
    total: int
    """Numbers of the model, tied ones counted once."""
    importance: tuple[float, ...] | None = None
    """Of each decoder block, where the ranks follow from it."""

    @property
    def frozen(self) -> int:
        """Numbers in parameters that stay as they are (targets' base weights not counted)."""
        return self.total - self.covered

    @property
    def trained(self) -> tuple[str, ...]:
        """Names in the model of all parameters that are trained, in part or in full."""
        return (*(t.parameter for t in self.targets if t.free_rank > 0), *self.trained_others)

    @property
    def covered(self) -> int:
        """Numbers of the targets' weights."""
        return sum(prod(target.shape) for target in self.targets)

    def to_json(self) -> dict[str, object]:
        """Plain values for plan.json."""
        return {**asdict(self), "covered": self.covered, "frozen": self.frozen}


def plan_targets(
    model: nn.Module,
    unfreeze_rank_ratio: float,
    parameterization: str = "exact",
    target_patterns: Sequence[str] | None = None,
    other_parameters: str = "frozen",
    split_by: str = "weights",
    importance: Sequence[float] | None = None,
) -> Plan:
    """Choose targets and ranks.

    Args:
        model: a transformers causal language model, before `model.convert`; may be on meta.
        unfreeze_rank_ratio: share of each matrix's directions to train, 0 to 1.
        parameterization: exact, core, factored, or dense (the targets are trained in full).
        target_patterns: regular expressions searched in module paths; None takes every matrix of
            the decoder blocks. Routers, gates of experts, embeddings and heads are never taken.
        other_parameters: frozen, norms (norm weights are trained), or all (everything but
            routers: no balancing loss is added, so trained routers could collapse).
        split_by: weights, or activations: of each matrix the least used directions of its inputs
            are trained, whatever its outputs.
        importance: one number a decoder block, 1 in the mean; see `adaptive_ratios`. None frees
            the same share of every matrix.

    Raises:
        ValueError: for an unknown choice, a bad pattern, no decoder blocks, or no match; for
            experts where the split is by activations.
    """
    _check_choice("parameterization", parameterization, PARAMETERIZATIONS)
    _check_choice("other_parameters", other_parameters, OTHER_PARAMETERS)
    _check_choice("split_by", split_by, SPLITS)
    patterns = None if target_patterns is None else _compile(target_patterns)
    found = list(_candidates(model))
    chosen = [c for c in found if patterns is None or any(p.search(c[0]) for p in patterns)]
    if not chosen and patterns is None:
        raise ValueError(f"model_path: {type(model).__name__} has no matrix that can be split")
    for pattern in patterns or ():
        _check_pattern(model, pattern, [name for name, *_ in found])
    if split_by == "activations":
        _check_inputs_are_seen(chosen)
    make = _target_by_inputs if split_by == "activations" else _target
    ratios = adaptive_ratios(unfreeze_rank_ratio, importance) if importance else None
    prefix, _ = decoder_blocks(model)

    def ratio_of(name: str) -> float:
        return ratios[_block_number(name, prefix)] if ratios else unfreeze_rank_ratio

    targets = tuple(make(*found, ratio_of(found[0]), parameterization) for found in chosen)
    taken = {target.parameter for target in targets}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    rest = [name for name in sizes if name not in taken]
    trained = tuple(name for name in rest if _is_trained(model, name, other_parameters))
    return Plan(
        unfreeze_rank_ratio=float(unfreeze_rank_ratio),
        parameterization=parameterization,
        split_by=split_by,
        other_parameters=other_parameters,
        targets=targets,
        trained_others=trained,
        uncovered=tuple(name for name in rest if name not in set(trained)),
        trainable=sum(t.trainable for t in targets) + sum(sizes[name] for name in trained),
        total=sum(sizes.values()),
        importance=None if importance is None else tuple(importance),
    )


def adaptive_ratios(unfreeze_rank_ratio: float, importance: Sequence[float]) -> list[float]:
    """Free share of each decoder block: the more a block matters, the more of it is kept.

    Kept share of block l = m + I_l (t - m), with t = 1 - unfreeze_rank_ratio the mean, m = 0.1 the
    least, and I_l the block's importance, 1 in the mean (Nayak et al., 2025, section 3.3); cut off
    at 0 and 1.
    """
    mean = 1 - unfreeze_rank_ratio
    least = min(_LEAST_KEPT, mean)
    return [min(1.0, max(0.0, 1 - (least + one * (mean - least)))) for one in importance]


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the language model: all of it, but where towers stand beside it.

    They are known by a configuration that has one of its own for the text.
    """
    config = getattr(model, "config", None)
    if config is None:
        return "", model
    text = config.get_text_config()
    if text is not config:
        for path, module in model.named_modules():
            if type(getattr(module, "config", None)) is type(text):
                return path, module
    return "", model


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder blocks: the `nn.ModuleList` that holds most parameters.

    Raises:
        ValueError: if the model has no such list.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    prefix, root = language_model(model)
    for name, module in root.named_modules(prefix=prefix):
        if isinstance(module, nn.ModuleList):
            size = sum(p.numel() for p in module.parameters())
            if size > (0 if best is None else best[0]):
                best = (size, name, module)
    if best is None:
        raise ValueError(
            f"model_path: {type(model).__name__} has no list of decoder blocks; "
            "only decoder-only language models can be trained"
        )
    return best[1], best[2]


def is_router(path: str) -> bool:
    """Whether the module or parameter at this path picks experts."""
    parts = path.removesuffix(".weight").removesuffix(".bias").split(".")
    return parts[-1] in _ROUTER_LEAVES or any("router" in part.lower() for part in parts)


def _candidates(model: nn.Module) -> Iterator[tuple[str, str, str, str, tuple[int, ...]]]:
    """Yield name, owning module, kind, parameter, shape of every matrix that may be a target."""
    prefix, blocks = decoder_blocks(model)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, module in blocks.named_modules(prefix=prefix):
        if is_router(path) or isinstance(module, _ConvNd):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            # A shared matrix (tied to another use) would be changed there, too.
            if uses[id(module.weight)] == 1:
                kind = "conv1d" if isinstance(module, Conv1D) else "linear"
                yield path, path, kind, f"{path}.weight", tuple(module.weight.shape)
            continue
        if "expert" not in f"{path}.{type(module).__name__}".lower():
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                full = f"{path}.{name}"
                yield full, path, "experts", full, tuple(parameter.shape)


def _block_number(name: str, prefix: str) -> int:
    return int(name.removeprefix(f"{prefix}.").partition(".")[0])


def _target(
    name: str,
    module: str,
    kind: str,
    parameter: str,
    shape: tuple[int, ...],
    ratio: float,
    parameterization: str,
) -> Target:
    rows, cols = shape[-2:]
    full = min(rows, cols)
    rank = full if parameterization == "dense" else free_rank(rows, cols, ratio)
    batch = prod(shape[:-2])
    trainable = batch * _factor_size(rows, cols, rank, parameterization)
    return Target(name, module, parameter, kind, shape, full - rank, rank, trainable)


def _target_by_inputs(
    name: str,
    module: str,
    kind: str,
    parameter: str,
    shape: tuple[int, ...],
    ratio: float,
    parameterization: str,
) -> Target:
    """A target whose directions are those of its input, all of them, also of a wide matrix."""
    outputs, width = reversed(shape) if kind == "conv1d" else shape
    rank = width if parameterization == "dense" else free_rank(width, width, ratio)
    return Target(name, module, parameter, kind, shape, width - rank, rank, rank * outputs)


def _check_inputs_are_seen(chosen: Sequence[tuple[str, str, str, str, tuple[int, ...]]]) -> None:
    experts = [name for name, _, kind, *_ in chosen if kind == "experts"]
    if experts:
        raise ValueError(
            f"split_by: activations needs to see the inputs of every target, those of experts "
            f"({experts[0]}, ...) are hidden in their module: set split_by to weights, or give "
            r"target_patterns without them, for example ['self_attn\.']"
        )


def _factor_size(rows: int, cols: int, rank: int, parameterization: str) -> int:
    if parameterization == "factored":
        return rank * (rows + cols + (1 if rank else 0))
    if rank == min(rows, cols):
        return rows * cols
    if parameterization == "core" or rows == cols:
        return rank * rank
    return rank * max(rows, cols)


def _is_trained(model: nn.Module, parameter: str, other_parameters: str) -> bool:
    owner = parameter.rpartition(".")[0]
    if other_parameters == "frozen" or is_router(owner) or is_router(parameter):
        return False
    if not _is_of_language(model, parameter):
        return False
    if other_parameters == "all":
        return True
    return "norm" in type(model.get_submodule(owner)).__name__.lower()


def _is_of_language(model: nn.Module, parameter: str) -> bool:
    """Whether text reaches it: towers for pictures and sound stay as they are."""
    path, module = language_model(model)
    if module is model:
        return True
    head = getattr(model, "get_output_embeddings", lambda: None)()
    own = model.get_parameter(parameter)
    is_of_head = head is not None and any(own is p for p in head.parameters())
    return is_of_head or parameter.startswith(f"{path}.")


def _check_pattern(model: nn.Module, pattern: re.Pattern[str], names: Sequence[str]) -> None:
    """Refuse a pattern that chooses nothing; says what stands in the way of what it matches."""
    if any(pattern.search(name) for name in names):
        return
    matched = [
        path
        for path, module in model.named_modules()
        if pattern.search(path) and any(True for _ in module.parameters(recurse=False))
    ]
    said = f"target_patterns: {pattern.pattern!r} "
    if matched:
        raise ValueError(
            f"{said}matches {', '.join(matched[:3])}, which {_why_not(model, matched[0])}: take "
            "the pattern out"
        )
    some = ", ".join(names[:8]) or "none"
    raise ValueError(f"{said}matches no matrix of the decoder blocks; paths look like: {some}")


def _why_not(model: nn.Module, path: str) -> str:
    """Why a module with parameters is no target."""
    prefix, _ = decoder_blocks(model)
    module = model.get_submodule(path)
    if not path.startswith(f"{prefix}."):
        return f"cannot be split: it is outside the decoder blocks ({prefix})"
    if is_router(path):
        return "cannot be split: it picks experts"
    if isinstance(module, nn.Linear | Conv1D):
        return "cannot be split: other modules use the same matrix"
    return f"cannot be split: {type(module).__name__} is no linear layer and holds no experts"


def _compile(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(
                f"target_patterns: {pattern!r} is no regular expression ({error}); "
                r"escape special characters, for example 'self_attn\.q_proj'"
            ) from error
    return compiled


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}: {value!r} is not one of {', '.join(choices)}")
