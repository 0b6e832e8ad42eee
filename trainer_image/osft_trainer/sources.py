"""Which files belong to a data path, and the rows in them, one at a time, in bounded memory.

Lives here: JSONL, JSON arrays, Parquet, and the Arrow files of Hugging Face's `save_to_disk`.
Called by `data.prepare` for the rows, and by `identity` for the files. Must never: hold a file in
memory, judge what a row means (`samples` does), or import torch.
"""

import contextlib
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from osft_trainer.faults import Faults

ROWS_AT_ONCE = 64
"""Rows of a columnar file that are Python objects at the same time."""

_CHUNK_CHARACTERS = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Row:
    """One row as it was read. `place` is "file, line 12" for messages to the user."""

    place: str
    value: Any


def data_files(data_path: str | Path) -> list[Path]:
    """The file itself, or those of a folder: of one kind, in the order of their names.

    A folder that `save_to_disk` wrote gives the files that its state.json lists; with several
    splits it must be named down to the split.

    Raises:
        ValueError: there is no such path, no file of a known kind, or files of several kinds.
    """
    path = Path(data_path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"data_path {str(path)!r} does not exist: give a file, or a folder of files"
        )
    if (path / "dataset_dict.json").is_file():
        return data_files(_only_split(path))
    if (path / "state.json").is_file():
        return _saved_files(path)
    found: dict[str, list[Path]] = {}
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        if file.suffix in _READERS and not file.name.startswith("."):
            found.setdefault(file.suffix, []).append(file)
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in _READERS)
        raise ValueError(f"data_path {str(path)!r} holds no data file: name them {kinds}")
    if len(found) > 1:
        kinds = " and ".join(f"*{suffix}" for suffix in found)
        raise ValueError(
            f"data_path {str(path)!r} holds {kinds}, perhaps the same data twice: leave one kind"
        )
    return next(iter(found.values()))


def _only_split(path: Path) -> Path:
    splits = _json_file(path / "dataset_dict.json").get("splits", [])
    if len(splits) == 1:
        return path / str(splits[0])
    named = ", ".join(str(path / str(split)) for split in splits) or "none"
    raise ValueError(f"data_path {str(path)!r} holds several splits: give one of them: {named}")


def _saved_files(path: Path) -> list[Path]:
    """The files of a saved dataset; others beside them (cache-*.arrow) are not data."""
    listed = _json_file(path / "state.json").get("_data_files", [])
    files = [path / str(entry["filename"]) for entry in listed]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"data_path {str(path)!r} is a saved dataset without {', '.join(missing) or 'files'}: "
            "copy it whole"
        )
    return files


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def read_rows(files: Sequence[Path], faults: Faults) -> Iterator[Row]:
    """Yield the rows of the files in order; lines that cannot be read go to `faults`.

    Raises:
        ValueError: `faults` is full, the first one lies far behind, or the rest of a file cannot be
            read.
    """
    for file in files:
        for row in _READERS.get(file.suffix, _lines)(file, faults):
            faults.raise_if_far()
            yield row


def _lines(file: Path, faults: Faults) -> Iterator[Row]:
    """JSON Lines. Blank lines pass."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # some editors write this mark
            if not line.strip():
                continue
            place = f"{file.name}, line {number}"
            faults.rows += 1
            try:
                value = _parse(line)
            except ValueError as error:
                faults.bad(place, str(error))
                continue
            yield Row(place, value)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"not JSON that can be read: {_beyond(error)}") from error


def _beyond(error: RecursionError | ValueError) -> str:
    """Which bound of the parser the text goes beyond."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    # Python's words go on with a setting of the interpreter, which nobody has here.
    return str(error).partition(";")[0]


def _json(file: Path, faults: Faults) -> Iterator[Row]:
    """A JSON array of rows, or JSON Lines under the same name, as some tools write them."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as text:
        first = next((part.lstrip()[:1] for part in _chunks(text) if part.strip()), "")
    if first != "[":
        yield from _lines(file, faults)
        return
    with file.open(encoding="utf-8-sig", newline="") as text:
        array, number = _Array(text), 0
        try:
            for number, value in enumerate(array, start=1):
                faults.rows += 1
                yield Row(f"{file.name}, line {array.line} (element {number})", value)
        except (ValueError, RecursionError) as error:
            what = _beyond(error)
            if isinstance(error, json.JSONDecodeError):
                what = error.msg
                array.count_lines(error.pos)
            where = f"after element {number}" if number else "its beginning"
            # Where the next element would begin cannot be told, so nothing can be skipped.
            raise ValueError(
                f"data_path: {file.name}, line {array.line} ({where}): not JSON, the rest of the "
                f"file cannot be read: {what}"
            ) from error


def _chunks(text: TextIO) -> Iterator[str]:
    while chunk := text.read(_CHUNK_CHARACTERS):
        yield chunk


class _Array:
    """The elements of one JSON array, read piece by piece."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._at = 0
        self.line = 1
        """Where the newest element begins."""
        self._counted = 0

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._next_character() == "]":
            self._take("]")
        else:
            while True:
                yield self._value()
                if self._next_character() != ",":
                    self._take("]")
                    break
                self._take(",")
        if self._next_character():
            raise json.JSONDecodeError("more text behind the array", self._text, self._at)

    def _take(self, character: str) -> None:
        if self._next_character() != character:
            raise json.JSONDecodeError(f"{character!r} is missing", self._text, self._at)
        self._at += 1

    def _next_character(self) -> str:
        """The next one that is not blank; empty at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None, "the expression matches nothing, too"
            self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        self._next_character()
        self.count_lines(self._at)
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not _is_cut_off(error) or not self._more():
                    raise
                continue
            # A number at the very end may go on in the next piece.
            if end == len(self._text) and not isinstance(value, dict | list) and self._more():
                continue
            self._at = end
            return value

    def count_lines(self, position: int) -> None:
        """Have `line` name the line of this character of the text that is held."""
        self.line += self._text.count("\n", self._counted, position)
        self._counted = position

    def _more(self) -> bool:
        """Read on. Doubling what is held keeps the work on a long element linear."""
        self.count_lines(self._at)
        held = self._text[self._at :]
        piece = self._stream.read(max(_CHUNK_CHARACTERS, len(held)))
        self._text, self._at, self._counted = held + piece, 0, 0
        return bool(piece)


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether the text may only have ended too early: its start of a string, word or escape."""
    return error.pos >= len(error.doc) - 16 or error.msg.startswith("Unterminated string")


def _parquet(file: Path, faults: Faults) -> Iterator[Row]:
    parquet = _pyarrow(file, "pyarrow.parquet")
    with _readable(file), parquet.ParquetFile(file, buffer_size=1 << 20) as table:
        batches = table.iter_batches(batch_size=ROWS_AT_ONCE)
        yield from _rows_of_batches(file, batches, faults)


def _arrow(file: Path, faults: Faults) -> Iterator[Row]:
    """Arrow's stream form, as `save_to_disk` writes it, or its file form."""
    arrow = _pyarrow(file, "pyarrow")
    ipc = _pyarrow(file, "pyarrow.ipc")
    # Not a memory map: its pages would count as this process's memory.
    with _readable(file), arrow.OSFile(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = ipc.open_file(source)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = iter(ipc.open_stream(source))
        yield from _rows_of_batches(file, batches, faults)


def _rows_of_batches(file: Path, batches: Iterator[Any], faults: Faults) -> Iterator[Row]:
    number = 0
    for batch in batches:
        # Damaged offsets and texts would end the process, or come as errors that name no file.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for value in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                faults.rows += 1
                yield Row(f"{file.name}, row {number}", _without_nulls(value))


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
def _readable(file: Path) -> Iterator[None]:
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


def _pyarrow(file: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"data_path: {file.name} needs the package pyarrow: pip install 'osft[data]', or give "
            "JSONL"
        ) from error


_READERS: Mapping[str, Callable[[Path, Faults], Iterator[Row]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""Kinds of files by their suffix. A file given by name with another suffix is read as JSONL."""
