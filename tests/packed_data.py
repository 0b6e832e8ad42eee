"""Prepared data whose tokens say which sample they belong to, and what of it a batch holds.

For the tests of `packing` and `replay`.
"""

import json
from pathlib import Path

import numpy as np

from osft_trainer.packing import GlobalBatch, MicroBatch
from osft_trainer.prepared import DataCounts, GrowingArray, PreparedData


def make_data(folder: Path, lengths: list[int]) -> PreparedData:
    """Sample i is the token i repeated; every token but its first carries loss."""
    folder.mkdir(parents=True)
    with GrowingArray(folder / "input_ids.npy", "<i4") as ids:
        ids.append(np.repeat(np.arange(len(lengths)), lengths))
    with GrowingArray(folder / "loss_mask.npy", "|b1") as mask:
        for length in lengths:
            mask.append(np.arange(length) > 0)
    with GrowingArray(folder / "offsets.npy", "<i8") as offsets:
        offsets.append(np.cumsum([0, *lengths]))
    with GrowingArray(folder / "loss_counts.npy", "<i4") as counts:
        counts.append(np.array(lengths) - 1)
    total = DataCounts(samples=len(lengths), tokens=sum(lengths)).__dict__
    meta = {"digest": "d", "counts": total, "largest_id": len(lengths) - 1}
    (folder / "meta.json").write_text(json.dumps(meta))
    return PreparedData(folder)


def samples_of(batch: MicroBatch) -> list[int]:
    """Which samples lie in it; checks that each lies there whole, in one piece."""
    if batch.is_dummy:
        return []
    pieces = batch.input_ids[0].split(list(batch.lengths))
    assert all(len(piece.unique()) == 1 for piece in pieces)
    return [int(piece[0]) for piece in pieces]


def members(ranks: list[GlobalBatch]) -> list[int]:
    """The samples of one global batch over all ranks."""
    return sorted(s for rank in ranks for micro in rank.micro_batches for s in samples_of(micro))
