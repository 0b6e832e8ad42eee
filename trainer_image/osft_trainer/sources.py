"""The rows of data files, one at a time, in bounded memory.

Lives here: which reader takes which kind of file: `json_rows` or `tables`. Must never: hold a file
in memory, choose files (`data_files` does), judge what a row means (`samples` does), or import
torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osft_trainer import json_rows, tables
from osft_trainer.compression import damage_named
from osft_trainer.faults import Faults
from osft_trainer.file_kinds import DataFile


@dataclass(frozen=True)
class Row:
    """One row as it was read. `place` is "file, line 12" for messages to the user."""

    place: str
    value: Any


def read_rows(files: Sequence[DataFile], faults: Faults) -> Iterator[Row]:
    """Yield the rows of the files in order; lines that cannot be read go to `faults`.

    Raises:
        ValueError: `faults` is full, the first one lies far behind, or the rest of a file cannot be
            read.
    """
    for file in files:
        rows = _READERS[file.kind](file, faults)
        while True:
            # Around the reading alone: what the caller does with a row has errors of its own.
            with damage_named(file.name, file.compression):
                row = next(rows, None)
            if row is None:
                break
            faults.raise_if_far()
            yield Row(*row)


_READERS: Mapping[str, Callable[[DataFile, Faults], Iterator[tuple[str, Any]]]] = {
    "jsonl": json_rows.of_lines,
    "json": json_rows.of_json,
    "parquet": tables.of_parquet,
    "arrow": tables.of_arrow,
}
