"""The rows of a columnar file, with the place of each: Parquet, and Arrow's two forms.

Called by `sources`; Arrow's stream form is what Hugging Face's `save_to_disk` writes. pyarrow is an
optional package, imported when such a file is read. Must never: hold a file in memory, or judge
what a row means (`samples` does).
"""

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from osft_trainer.faults import Faults
from osft_trainer.features import row_decoder
from osft_trainer.file_kinds import DataFile

ROWS_AT_ONCE = 64
"""Rows that are Python objects at the same time."""

_MARKER = b"\xff\xff\xff\xff"
"""Begins every message of Arrow's stream form."""


def of_parquet(file: DataFile, faults: Faults) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file."""
    parquet = _pyarrow(file, "pyarrow.parquet")
    with _readable(file), parquet.ParquetFile(file.path, buffer_size=1 << 20) as table:
        batches = table.iter_batches(batch_size=ROWS_AT_ONCE)
        yield from _rows_of_batches(file, batches, faults)


def of_arrow(file: DataFile, faults: Faults) -> Iterator[tuple[str, Any]]:
    """Arrow's stream form, as `save_to_disk` writes it, or its file form."""
    arrow = _pyarrow(file, "pyarrow")
    ipc = _pyarrow(file, "pyarrow.ipc")
    # Not a memory map: its pages would count as this process's memory.
    with _readable(file), arrow.OSFile(str(file.path)) as source:
        if source.read(6) == b"ARROW1":
            table = ipc.open_file(source)
            batches: Iterator[Any] = (
                table.get_batch(number) for number in range(table.num_record_batches)
            )
        else:
            if not _has_stream_end(source):
                raise arrow.ArrowInvalid("its stream of batches has no end mark: it was cut off")
            source.seek(0)
            batches = _batches_of_stream(arrow, ipc.open_stream(source), source)
        yield from _rows_of_batches(file, batches, faults)


def _batches_of_stream(arrow: Any, stream: Iterator[Any], source: Any) -> Iterator[Any]:
    yield from stream
    if source.tell() != source.size():
        raise arrow.ArrowInvalid("there is more behind the end of its stream of batches")


def _has_stream_end(source: Any) -> bool:
    """Whether the mark that a writer leaves at its end is there.

    Arrow lets a stream end without it. In a file that would be no other than one that was cut off
    between two batches, whose rest would be missed by nobody.
    """
    source.seek(0)
    begin = source.read(4)
    # Before Arrow 0.15 neither messages nor the end began with a marker.
    end = bytes(4) if begin != _MARKER else _MARKER + bytes(4)
    source.seek(max(0, source.size() - len(end)))
    return bool(source.read(len(end)) == end)


def _rows_of_batches(
    file: DataFile, batches: Iterator[Any], faults: Faults
) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in batches:
        # Damaged offsets and texts would end the process, or come as errors that name no file.
        batch.validate(full=True)
        decode = row_decoder(batch.schema.metadata)
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for value in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                faults.rows += 1
                place = f"{file.name}, row {number}"
                if decode is not None:
                    try:
                        value = decode(value)
                    except (ValueError, RecursionError) as error:
                        faults.bad(place, f"a column of JSON holds none: {error}")
                        continue
                yield place, _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Columns give every struct all keys; what a row did not have comes as null."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return value if _is_flat(value) else [_without_nulls(inner) for inner in value]
    return value


def _is_flat(values: list[Any]) -> bool:
    """Whether it is a list of numbers: long ones are not worth a second look."""
    return bool(values) and isinstance(values[0], int | float)


@contextlib.contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    """Turn pyarrow's refusals into ours.

    Raises:
        ValueError: the file is not of the kind that its name says, or is damaged.
        OSError: the file cannot be read now.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # A failure of the disk has a number, and may pass; without one, the content is damaged.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        words = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"data_path: {file.name} cannot be read: {words}; it is damaged or of another kind: "
            "make or copy it again"
        ) from error


def _pyarrow(file: DataFile, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data_path: {file.name} needs the package pyarrow: pip install 'osft[data]', or give "
            "JSONL"
        ) from error
