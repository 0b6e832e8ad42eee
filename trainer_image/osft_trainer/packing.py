"""From prepared samples to the micro-batches of each optimizer step, in an order that can resume.

Lives here: the samples of a global batch, and the tensors of the bins that `bins` deals them out
to. Called by the training loop, and by `evaluation`. Everything but the reading of samples is a
pure function of numbers, so every rank computes the same plan without talking.
Must never: depend on the world size for what a step learns from, put two samples into one
attention span or predict one sample's first token from another, or drop a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from osft_trainer.bins import END_TO_END, pack
from osft_trainer.layout import Layout
from osft_trainer.order import epoch_order
from osft_trainer.prepared import NO_LOSS, PreparedData, Samples
from osft_trainer.replay import Replay

IDLE_TOKENS = 2
"""Length of the stand-in for an empty bin: the shortest that still has a next token."""

_TENSORS = ("input_ids", "labels", "position_ids", "places")
"""What of a micro-batch goes to the device."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: samples laid end to end, without padding.

    input_ids, labels and position_ids are int64 [1, T]. position_ids restart at 0 with every
    sample; the model must take the borders of attention from them or from `lengths` (which sum to
    T). labels are unshifted, -100 where there is no loss and at every sample's first token, so
    that the usual shift by one crosses no border. places are the positions in the row whose next
    token counts, int64 [loss_tokens]: counted here, so that no device is waited for to learn them.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    places: torch.Tensor
    lengths: tuple[int, ...]
    loss_tokens: int
    is_dummy: bool = False
    """No sample was left for this rank: run it for the collectives, it adds nothing."""

    def pinned(self) -> "MicroBatch":
        """The same in memory that the current CUDA device copies from on its own."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """What a model takes, on this device; from pinned memory nobody waits for the copies."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return {**tensors, "lengths": self.lengths}


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step. `samples`, `tokens` and `loss_tokens` count all ranks together.

    `micro_batches` are this rank's; every rank has the same number. The next batch's position is
    (epoch, index + 1), also after the epoch's last one.
    """

    epoch: int
    index: int
    micro_batches: tuple[MicroBatch, ...]
    samples: int
    tokens: int
    loss_tokens: int
    is_last: bool
    """Whether it ends the epoch."""
    replayed: int = 0
    """Samples of the old skills' text, beside `samples` of the data; their tokens count, too."""

    def pinned(self) -> "GlobalBatch":
        """The same, with every micro-batch in pinned memory."""
        return replace(self, micro_batches=tuple(m.pinned() for m in self.micro_batches))


def batches_per_epoch(num_samples: int, effective_batch_size: int) -> int:
    """Optimizer steps of one epoch; the last may have fewer samples."""
    return -(-num_samples // effective_batch_size)


def collate(
    samples: Sequence[tuple[torch.Tensor, torch.Tensor]], *, pad_token_id: int = 0
) -> MicroBatch:
    """Lay (input_ids, labels) pairs, both int64 [length], end to end; none gives the stand-in."""
    if not samples:
        idle = torch.full((1, IDLE_TOKENS), pad_token_id, dtype=torch.int64)
        return MicroBatch(
            input_ids=idle,
            labels=torch.full_like(idle, NO_LOSS),
            position_ids=torch.arange(IDLE_TOKENS).unsqueeze(0),
            places=torch.zeros(0, dtype=torch.int64),
            lengths=(IDLE_TOKENS,),
            loss_tokens=0,
            is_dummy=True,
        )
    lengths = tuple(len(ids) for ids, _ in samples)
    labels = torch.cat([labels for _, labels in samples])
    starts = torch.tensor((0, *lengths[:-1])).cumsum(0)
    labels[starts] = NO_LOSS  # torch.cat has copied, the samples stay as they are
    places = (labels[1:] != NO_LOSS).nonzero()[:, 0]
    positions = torch.arange(len(labels)) - starts.repeat_interleave(torch.tensor(lengths))
    return MicroBatch(
        input_ids=torch.cat([ids for ids, _ in samples]).unsqueeze(0),
        labels=labels.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        places=places,
        lengths=lengths,
        loss_tokens=len(places),
    )


class Units:
    """What the passes of some samples are made of: the samples, from one source after the other.

    Where a model does not take any samples end to end, their pieces are dealt out one by one: they
    see nothing of one another, and a batch of the pieces of one sample may be padded to many times
    its length.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Samples, npt.NDArray[np.int64]]],
        layout: Layout = END_TO_END,
    ) -> None:
        """`sources`: data, and the positions of samples in them."""
        self._places: list[tuple[Samples, int, int | None]] = []
        lengths: list[int] = []
        for data, indices in sources:
            for index in indices.tolist():
                pieces = data.piece_lengths(index)
                if layout == END_TO_END or len(pieces) == 1:
                    self._places.append((data, index, None))
                    lengths.append(sum(pieces))
                else:
                    self._places += [(data, index, number) for number in range(len(pieces))]
                    lengths += pieces
        self.lengths = np.array(lengths, dtype=np.int64)
        self.loss_tokens = sum(int(data.loss_counts[indices].sum()) for data, indices in sources)

    def pieces(self, at: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the unit at this position holds, as `PreparedData.pieces`."""
        data, index, number = self._places[at]
        pieces = data.pieces(index)
        return pieces if number is None else [pieces[number]]


def batches(
    prepared: PreparedData,
    *,
    effective_batch_size: int,
    max_tokens_per_gpu: int,
    rank: int,
    world_size: int,
    seed: int,
    start_epoch: int = 0,
    start_batch: int = 0,
    pad_token_id: int = 0,
    replay: Replay | None = None,
    layout: Layout = END_TO_END,
) -> Iterator[GlobalBatch]:
    """Global batches from (start_epoch, start_batch) on, epoch after epoch, without end.

    start_batch may be the number of batches in an epoch: the next epoch follows. Only the samples
    of this rank are read. `layout` is the model's; a pass holds at most max_tokens_per_gpu tokens,
    padding included. What `replay` adds comes on top of effective_batch_size, so that steps
    and epochs are those of the data.

    Raises:
        ValueError: start_batch lies beyond the epoch (the data or the batch size has changed).
    """
    assert 0 <= rank < world_size
    per_epoch = batches_per_epoch(len(prepared), effective_batch_size)
    if not 0 <= start_batch <= per_epoch:
        raise ValueError(
            f"batch {start_batch} does not exist in an epoch of {per_epoch}: the data or "
            "effective_batch_size is not the one of the saved run"
        )
    epoch, index = start_epoch, start_batch
    while True:
        order = epoch_order(len(prepared), seed, epoch)
        for batch in range(index, per_epoch):
            first = batch * effective_batch_size
            members = order[first : first + effective_batch_size]
            sources: list[tuple[Samples, npt.NDArray[np.int64]]] = [(prepared, members)]
            if replay is not None:
                before = epoch * len(prepared) + first
                again = replay.between(before, before + len(members))
                sources.append((replay.part, again))
            batch_of = Units(sources, layout)
            rounds = pack(batch_of.lengths, world_size, max_tokens_per_gpu, layout)
            yield GlobalBatch(
                epoch=epoch,
                index=batch,
                micro_batches=tuple(
                    collate(
                        [piece for at in bins[rank] for piece in batch_of.pieces(at)],
                        pad_token_id=pad_token_id,
                    )
                    for bins in rounds
                ),
                samples=len(members),
                tokens=int(batch_of.lengths.sum()),
                loss_tokens=batch_of.loss_tokens,
                is_last=batch == per_epoch - 1,
                replayed=sum(len(indices) for _, indices in sources[1:]),
            )
        epoch, index = epoch + 1, 0
