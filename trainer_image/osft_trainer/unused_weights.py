"""What the files of a base hold that the language model does not load.

Lives here: telling what stands beside the language model (a vision tower, a head that predicts
further tokens), which exports copy as it is, from what shows that the files are not those that the
configuration means. Called by `model` after loading, and by `assembly` and `planning`, which name
it; the model is not converted yet, and may be on meta. Must never: read a tensor's numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from osft_trainer.base_layout import Layout, layout_of, parts_of
from osft_trainer.base_weights import BaseWeights

_FURTHER_TOKENS = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "num_mtp_layers",
    "num_mtp_modules",
)
"""Configuration entries: blocks behind the last one, which predict tokens further on."""

_LEFTOVERS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|\.masked_bias"
    r"|\.(attn|attention|self_attention)\.bias)$"
)
"""Tables that older versions of transformers saved, and newer ones compute."""

_SCALES = re.compile(
    r"(scale|scales|scale_inv|qweight|qzeros|g_idx|absmax|quant_map|zero_point|weight_packed)$"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NotLoaded:
    """A part of the files that no tensor of the model is made of."""

    name: str
    """What the names of its tensors begin with in the files."""
    tensors: int
    bytes: int

    def to_json(self) -> dict[str, object]:
        """Plain values for plan.json."""
        return asdict(self)


def not_loaded(hf: PreTrainedModel, folder: Path) -> tuple[NotLoaded, ...]:
    """The parts of a base that are copied as they are, after a check that they may be.

    Raises:
        ValueError: the files are not those that the configuration means; names the cure.
    """
    weights = BaseWeights(folder)
    layout = layout_of(hf, weights)
    _check_types(hf, weights, layout, folder)
    _check_all_there(hf, weights, layout, folder)
    found: dict[str, list[int]] = {}
    misplaced: list[str] = []
    for key, name in layout.unused.items():
        place = _Place.of(hf, name)
        if place.is_misplaced and not _is_known(hf, place, name):
            misplaced.append(key)
        entry = weights.entries[key]
        behind = len(name.split(".")) - len(place.path) - 1
        parts = key.split(".")
        part = ".".join(parts[: max(1, len(parts) - behind)])
        found.setdefault(part, []).append(entry.stop - entry.start)
    if misplaced:
        raise ValueError(_refusal(hf, folder, misplaced, layout))
    return tuple(NotLoaded(name, len(sizes), sum(sizes)) for name, sizes in found.items())


def log_not_loaded(parts: Iterable[NotLoaded]) -> None:
    """Say what is copied as it is."""
    parts = list(parts)
    if parts:
        logger.info(
            "%d tensors of the base (%.1f MiB) belong to no part of the language model and are not "
            "trained; model folders get them as they are: %s",
            sum(part.tensors for part in parts),
            sum(part.bytes for part in parts) / 2**20,
            ", ".join(part.name for part in parts),
        )


@dataclass(frozen=True)
class _Place:
    """How far the modules of the model lead towards a tensor that it does not have."""

    module: nn.Module
    path: tuple[str, ...]
    next: str
    """What the last module has no child of that name."""
    is_in_block: bool

    @classmethod
    def of(cls, hf: PreTrainedModel, name: str) -> _Place:
        """Names in the files may lack the prefix of the model without its head."""
        places = [cls._from(hf, name)]
        if hf.base_model is not hf:
            places.append(cls._from(hf.base_model, name))
        return max(places, key=lambda place: len(place.path))

    @classmethod
    def _from(cls, module: nn.Module, name: str) -> _Place:
        path: list[str] = []
        parts = name.split(".")
        is_in_block = False
        for part in parts[:-1]:
            child = module._modules.get(part)
            if child is None:
                break
            is_in_block = is_in_block or isinstance(module, nn.ModuleList)
            path.append(part)
            module = child
        return cls(module, tuple(path), parts[len(path)], is_in_block)

    @property
    def is_misplaced(self) -> bool:
        """Whether the tensor would be a part of what is loaded: of a block or a single layer."""
        is_leaf = bool(self.path) and not any(self.module.children())
        return self.is_in_block or is_leaf or self.is_further_block

    @property
    def is_further_block(self) -> bool:
        return isinstance(self.module, nn.ModuleList) and self.next.isdigit()


def _is_known(hf: PreTrainedModel, place: _Place, name: str) -> bool:
    """Whether the model's code, or its configuration, knows that such tensors are there."""
    if place.is_further_block:
        config = hf.config.get_text_config()
        further = (getattr(config, entry, None) for entry in _FURTHER_TOKENS)
        count = max((number for number in further if isinstance(number, int)), default=0)
        assert isinstance(place.module, nn.ModuleList)
        if int(place.next) < len(place.module) + count:
            return True
    patterns = hf._keys_to_ignore_on_load_unexpected or ()
    return bool(_LEFTOVERS.search(name)) or any(re.search(p, name) for p in patterns)


def _check_types(hf: PreTrainedModel, weights: BaseWeights, layout: Layout, folder: Path) -> None:
    for part in parts_of(hf):
        for name in part.names:
            group = layout.of.get(name)
            for key in group.files if group is not None else ():
                entry = weights.entries[key]
                if entry.float_type is None and part.dtype.is_floating_point:
                    raise ValueError(
                        f"model_path: {key} in {folder} is of type {entry.dtype}, whose numbers "
                        f"are not the weights themselves: {_UNQUANTIZED}"
                    )


def _check_all_there(
    hf: PreTrainedModel, weights: BaseWeights, layout: Layout, folder: Path
) -> None:
    """On paper, where nothing is loaded; what the model's code does without is left out."""
    optional = [re.compile(pattern) for pattern in hf._keys_to_ignore_on_load_missing or ()]
    # A model on meta may have its ties on paper only, too.
    ties = getattr(hf, "all_tied_weights_keys", {})
    tied = {name for pair in ties.items() if not layout.of.keys().isdisjoint(pair) for name in pair}
    lacking = []
    for part in parts_of(hf):
        groups = [layout.of[name] for name in part.names if name in layout.of]
        known = not tied.isdisjoint(part.names) or any(
            pattern.search(name) for pattern in optional for name in part.names
        )
        shapes = (weights.entries[g.files[0]].shape for g in groups if g.converter is None)
        if (not groups and not known) or any(shape != tuple(part.shape) for shape in shapes):
            lacking.append(part.names[0])
    if lacking:
        raise ValueError(
            f"model_path: {len(lacking)} weights in {folder} are missing or of another shape than "
            f"config.json says ({', '.join(sorted(lacking)[:3])}, ...); fetch the model again"
        )


_UNQUANTIZED = "give the model in bfloat16, float16 or float32, such as its dequantized edition"


def _refusal(hf: PreTrainedModel, folder: Path, misplaced: list[str], layout: Layout) -> str:
    names = ", ".join(misplaced[:3]) + (", ..." if len(misplaced) > 3 else "")
    start = f"model_path: {len(misplaced)} tensors in {folder} ({names})"
    if any(_SCALES.search(key) for key in misplaced):
        return (
            f"{start} are scales of quantized weights, and its config.json has no "
            f"quantization_config to go with them, so that the weights would be taken for other "
            f"numbers: {_UNQUANTIZED}"
        )
    places = [_Place.of(hf, layout.unused[key]) for key in misplaced]
    if any(place.is_further_block for place in places):
        count = getattr(hf.config.get_text_config(), "num_hidden_layers", "fewer")
        return (
            f"{start} belong to further blocks than config.json says (num_hidden_layers {count}), "
            "which would be left out: fetch config.json again, or save the shorter model with "
            "save_pretrained"
        )
    return (
        f"{start} have no place in {type(hf).__name__} as config.json describes it, so that "
        "another model would be trained than the files hold: fetch config.json and the weights "
        "again, from one revision"
    )
