"""How many tokens ranks wait for the fullest bin of a round, and how long collation takes.

`make bench-data` prints a table for log-normal mixes of lengths: the share of tokens lost to
padding (there is none) and waiting, beside longest-processing-time as mini_trainer's sampler does
it, and beside what no plan can avoid: the longest sample of a batch, and the even share of its
tokens. A round counts for each rank as many tokens as its fullest bin has; attention, which grows
with the square of a sample, is left out. `--output FILE` writes the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bench import machine
from osft_trainer.bins import Plan, lpt_rounds, pack
from osft_trainer.packing import collate

LONG_PACK_TOKENS = 131_072


@dataclass(frozen=True)
class Mix:
    """Batches of samples whose lengths are log-normal, and where they go."""

    world_size: int
    batch: int
    capacity: int
    longest: int


MIXES = [
    Mix(1, 128, 8192, 4096),
    Mix(2, 128, 8192, 4096),
    Mix(4, 128, 8192, 4096),
    Mix(8, 128, 8192, 4096),
    Mix(8, 64, 4096, 4096),
    Mix(16, 256, 16384, 8192),
    Mix(32, 512, 8192, 4096),
    Mix(64, 512, 8192, 4096),
]


def lengths_of(mix: Mix, batches: int) -> list[list[int]]:
    """Median 400 tokens, a tail up to the longest; the same draw each time."""
    random = np.random.default_rng(1)
    draws = random.lognormal(mean=6.0, sigma=0.9, size=(batches, mix.batch))
    return np.clip(draws, 16, mix.longest).astype(np.int64).tolist()  # type: ignore[no-any-return]


def duration(plan: Plan, lengths: list[int]) -> int:
    """Tokens on the critical path: the fullest bin of each round."""
    return sum(max(sum(lengths[p] for p in bins) for bins in rounds) for rounds in plan)


def waiting(mix: Mix, batches: int) -> dict[str, float]:
    """Share of the tokens that is lost: with our plans, with LPT's, and at least."""
    spent = {"pack": 0, "lpt": 0, "least": 0.0}
    used = 0
    for lengths in lengths_of(mix, batches):
        ours = pack(lengths, mix.world_size, mix.capacity)
        longest_first = sorted(range(len(lengths)), key=lambda p: (-lengths[p], p))
        theirs = lpt_rounds(longest_first, lengths, mix.world_size, mix.capacity)
        spent["pack"] += duration(ours, lengths)
        spent["lpt"] += duration(theirs, lengths)
        spent["least"] += max(max(lengths), sum(lengths) / mix.world_size)
        used += sum(lengths)
    return {name: 1 - used / (mix.world_size * tokens) for name, tokens in spent.items()}


def collation_milliseconds(samples: int, repeats: int) -> tuple[float, float]:
    """Median and best time of one core to lay so many samples, 131 k tokens together."""
    random = np.random.default_rng(2)
    lengths = random.multinomial(LONG_PACK_TOKENS - samples, np.ones(samples) / samples) + 1
    parts = [torch.from_numpy(random.integers(0, 50_000, size=n)) for n in lengths.tolist()]
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        collate([(ids, ids) for ids in parts])
        times.append(time.process_time() - begin)
    return 1e3 * statistics.median(times), 1e3 * min(times)


def packed(mix: Mix, batches: int) -> dict[str, Any]:
    """The mix, the shares that are lost, and the milliseconds that a plan of a batch takes."""
    begin = time.process_time()
    for lengths in lengths_of(mix, batches):
        pack(lengths, mix.world_size, mix.capacity)
    milliseconds = 1e3 * (time.process_time() - begin) / batches
    return {**asdict(mix), "waiting": waiting(mix, batches), "milliseconds": milliseconds}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, default=50, help="batches per mix")
    parser.add_argument("--output", type=machine.path, help="file for the result")
    told = parser.parse_args()
    torch.set_num_threads(1)  # times are a core's own, whatever else runs
    print("ranks  batch  capacity  longest   ours    LPT  least  ms a batch")
    mixes = [packed(mix, told.batches) for mix in MIXES]
    for mix in mixes:
        shares = "  ".join(f"{mix['waiting'][name]:5.2%}" for name in ("pack", "lpt", "least"))
        print(
            f"{mix['world_size']:5}  {mix['batch']:5}  {mix['capacity']:8}  {mix['longest']:7}  "
            f"{shares}  {mix['milliseconds']:10.1f}"
        )
    collations = []
    for samples in (300, 3000):
        median, best = collation_milliseconds(samples, 50)
        collations.append({"samples": samples, "median_milliseconds": median, "best": best})
        print(
            f"collation of {LONG_PACK_TOKENS} tokens in {samples} samples: {median:.2f} ms, "
            f"at best {best:.2f} ms"
        )
    if told.output:
        result = {
            "command": "make bench-data",
            "machine": machine.processor(),
            "date": machine.today(),
            "tokens": LONG_PACK_TOKENS,
            "mixes": mixes,
            "collation": collations,
        }
        told.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
