"""Trained parameters begin with the numbers of the base's files, where loading has rounded them.

Lives here: filling the float32 masters of norms, embeddings, biases and whole matrices. Called by
`assembly` on every rank, after the model is converted and before it is sharded. Must never: touch
what is not trained, or a target that is split (its update starts at zero, and the export adds it to
the files' numbers).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from osft_trainer.base_layout import Layout, layout_of
from osft_trainer.base_weights import BaseWeights
from osft_trainer.experts import TRAINED_SUFFIX, MasterParameter
from osft_trainer.linear import SubspaceLinear

logger = logging.getLogger(__name__)


@torch.no_grad()
def fill_masters(hf: PreTrainedModel, folder: Path, loaded: torch.dtype, tell: bool = True) -> None:
    """Copy into each float32 master what the files hold.

    Args:
        hf: converted, whole on this rank.
        folder: of the base.
        loaded: the type that the model was loaded in.
        tell: warn of what stays rounded; all ranks find the same.
    """
    weights = BaseWeights(folder)
    if not weights.loses_some(loaded):
        return
    layout = layout_of(hf, weights)
    rounded = []
    for name, master in _masters(hf):
        exact = _in_files(hf, weights, layout, name)
        # Nothing but the same numbers takes the place of what was loaded.
        if exact is None or not torch.equal(exact.to(loaded), master.to(loaded)):
            rounded.append(name)
        else:
            master.copy_(exact)
    if rounded and tell:
        logger.warning(
            "%d trained parameters start as compute_dtype has rounded them, such as %s: the "
            "base's files do not hold the same numbers",
            len(rounded),
            rounded[0],
        )


def _in_files(
    hf: PreTrainedModel, weights: BaseWeights, layout: Layout, name: str
) -> Tensor | None:
    """The parameter as the files have it, in the model's layout."""
    group = layout.of.get(name)
    if group is None:
        return None
    return group.to_model(hf, {file: weights.read(file) for file in group.files})[name]


def _masters(hf: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each once, by the name that the parameter had."""
    for path, module in hf.named_modules():
        if isinstance(module, MasterParameter):
            yield path.removesuffix(TRAINED_SUFFIX), module.value
        elif isinstance(module, SubspaceLinear):
            bias = module.bias
            if bias is not None and bias.requires_grad:
                yield f"{path}.bias", bias
