"""Preparing a large data set: memory and speed.

`make bench-data ARGS=300` writes a chat data set of 300 MB as JSONL (`--kind json` or
`parquet` for others), prepares it in a fresh process, and prints the highest resident memory of
that process before and after, and MB/s. `--output FILE` writes the same as JSON. Everything else
lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench import machine
from osft_trainer.data import prepare

KINDS = ("jsonl", "json", "parquet")
MEGABYTE = 1_000_000
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows(size: int) -> Iterator[str]:
    """Conversations of a few hundred words as JSON, about `size` bytes together."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2000)]
    written = 0
    while written < size:
        turns = []
        for role in ("user", "assistant") * draw.randint(1, 3):
            text = " ".join(draw.choices(words, k=int(draw.lognormvariate(4.5, 0.8)) + 1))
            turns.append({"role": role, "content": text})
        line = json.dumps({"messages": turns})
        written += len(line) + 1
        yield line


def write(path: Path, size: int) -> None:
    """The data set, in the kind that the suffix names."""
    if path.suffix == ".parquet":
        _write_parquet(path, size)
        return
    array = path.suffix == ".json"
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(rows(size)):
            begin = ("[" if number == 0 else ",") if array else ""
            file.write(f"{begin}{line}\n")
        file.write("]\n" if array else "")


def _write_parquet(path: Path, size: int) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    writer = None
    held: list[str] = []
    for line in rows(size):
        held.append(line)
        if len(held) == 1000:
            table = arrow.Table.from_pylist([json.loads(each) for each in held])
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
            held = []
    assert writer is not None, "too little data for one group of rows"
    writer.close()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows these words, with ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(rows(MEGABYTE), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML
    )


def peak_megabytes() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def prepare_here(path: Path, cache: Path) -> dict[str, Any]:
    """Prepare in this process; gives what it took, in seconds and MB of 10^6 bytes."""
    tokenizer = make_tokenizer()
    before = peak_megabytes()
    begin, working = time.perf_counter(), time.process_time()
    prepared = prepare(path, tokenizer, max_seq_len=1 << 20, on_overlong="error", cache_root=cache)
    seconds, working = time.perf_counter() - begin, time.process_time() - working
    return {
        "kind": path.suffix[1:],
        "megabytes": round(path.stat().st_size / MEGABYTE),
        "rows": prepared.counts.rows,
        "tokens": prepared.counts.tokens,
        "seconds": seconds,
        "processor_seconds": working,
        "resident_megabytes": peak_megabytes(),
        "resident_megabytes_before_the_first_row": before,
        "machine": machine.processor(),
        "date": machine.today(),
    }


def sentence(result: dict[str, Any]) -> str:
    """The result for people."""
    size = result["megabytes"]
    return (
        f"{result['kind']}, {size} MB, {result['rows']} rows, {result['tokens']} tokens: "
        f"{result['seconds']:.0f} s, {size / result['seconds']:.1f} MB/s "
        f"({size / result['processor_seconds']:.1f} MB per second of processor time); resident "
        f"memory at most {result['resident_megabytes']:.0f} MB, "
        f"{result['resident_megabytes_before_the_first_row']:.0f} MB of it before the first row"
    )


def main() -> None:
    """Write the data, then prepare them in a process of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("megabytes", type=int, nargs="?", default=300)
    parser.add_argument("--kind", choices=KINDS, default="jsonl")
    parser.add_argument("--output", type=machine.path, help="file for the result")
    parser.add_argument("--prepare", type=machine.path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.prepare is not None:
        json.dump(prepare_here(told.prepare, told.prepare.parent / "cache"), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data.{told.kind}"
        write(path, told.megabytes * MEGABYTE)
        command = [sys.executable, "-m", "bench.prepare_data", "--prepare", str(path)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = {
        "command": f"make bench-data ARGS='{told.megabytes} --kind {told.kind}'",
        **json.loads(done.stdout),
    }
    print(sentence(result))
    if told.output:
        told.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
