"""The loss of a model on data that it is not trained on.

Lives here: one number over all samples and ranks. Called by all ranks together: between steps by
`validation`, and before and after them by `train`, for retention. Must never leave a
trace in the training: gradients, modes, random numbers and what FSDP holds are as before,
so that a run which is measured ends like one that is
not, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from osft_trainer.bins import pack
from osft_trainer.forward import evaluating
from osft_trainer.layout import Layout, layout_of
from osft_trainer.model import OSFTModel
from osft_trainer.outcome import NoLossTokens
from osft_trainer.packing import MicroBatch, Units, collate
from osft_trainer.parallel import World, sum_over_ranks
from osft_trainer.prepared import Samples

SAMPLES_AT_ONCE = 4096
"""Packed together: many enough that few bins stay half empty, few enough to plan in a tenth of a
second, however long they are."""


def mean_loss(
    model: OSFTModel, prepared: Samples, *, max_tokens_per_gpu: int, world: World
) -> float:
    """Mean of -log p(token) over every loss token of the data. Collective: call it on every rank.

    It does not depend on the number of ranks or on the packing, but for float32 rounding of the
    sum in one forward pass. The model's mode, gradients and random numbers are left as they are.

    Args:
        model: the converted model, sharded or not.
        prepared: the same data on every rank; at least one sample.
        max_tokens_per_gpu: tokens of one forward pass of one rank.
        world: this process's place.

    Returns:
        Nats per token; NaN or infinity if the model gives that. The same number on every rank.

    Raises:
        NoLossTokens: on every rank, if no token of the data counts.
        ValueError: on every rank, if a sample is longer than max_tokens_per_gpu.
    """
    if not prepared.loss_counts.any():
        raise NoLossTokens(
            f"of the {len(prepared)} samples to measure the loss on no token counts: give samples "
            "with labels that are not all -100"
        )
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    measured = 0
    layout = layout_of(model.hf.config)
    with _without_trace(model, world), torch.no_grad():
        for micro in _micro_batches(prepared, max_tokens_per_gpu, layout, world):
            loss_sum = model(**micro.inputs(world.device))
            total += loss_sum.double()
            measured += micro.loss_tokens
    return sum_over_ranks(float(total), world) / sum_over_ranks(measured, world)


def _micro_batches(
    prepared: Samples, max_tokens_per_gpu: int, layout: Layout, world: World
) -> Iterator[MicroBatch]:
    """This rank's forward passes; every rank has the same number of them."""
    for start in range(0, len(prepared), SAMPLES_AT_ONCE):
        indices = np.arange(start, min(start + SAMPLES_AT_ONCE, len(prepared)))
        units = Units([(prepared, indices)], layout)
        for bins in pack(units.lengths, world.size, max_tokens_per_gpu, layout):
            yield collate([piece for at in bins[world.rank] for piece in units.pieces(at)])


@contextmanager
def _without_trace(model: nn.Module, world: World) -> Iterator[None]:
    """Evaluation mode inside, everything as it was afterwards."""
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    # The root keeps its parameters gathered for a backward that does not come.
                    module.reshard()
