"""The rows of a JSON file, with the place of each: JSON Lines, or one array.

Called by `sources`. An array is read piece by piece: only one of its elements is held. Must never:
hold a file in memory, or judge what a row means (`samples` does).
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from osft_trainer.faults import Faults
from osft_trainer.file_kinds import DataFile

_CHUNK_CHARACTERS = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def of_lines(file: DataFile, faults: Faults) -> Iterator[tuple[str, Any]]:
    """JSON Lines. Blank lines pass."""
    with file.open() as lines:
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
            yield place, value


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


def of_json(file: DataFile, faults: Faults) -> Iterator[tuple[str, Any]]:
    """A JSON array of rows, or JSON Lines under the same name, as some tools write them."""
    with io.TextIOWrapper(file.open(), "utf-8-sig", errors="replace", newline="") as text:
        first = next((part.lstrip()[:1] for part in _chunks(text) if part.strip()), "")
    if first != "[":
        yield from of_lines(file, faults)
        return
    with io.TextIOWrapper(file.open(), "utf-8-sig", newline="") as text:
        array, number = _Array(text), 0
        try:
            for number, value in enumerate(array, start=1):
                faults.rows += 1
                yield f"{file.name}, line {array.line} (element {number})", value
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
