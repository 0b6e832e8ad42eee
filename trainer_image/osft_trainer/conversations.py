"""Reading chat data: JSONL files in, checked conversations out, every fault named by file and line.

Lives here: which files belong to a data path, what a line must hold, and the list of faults.
Called by `data.prepare`. Must never: guess what a malformed line meant, or stop at the first
fault when the user could be told five at once.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles that chat templates know."""

MAX_FAULTS = 5
"""Enough to see a pattern, few enough for a termination message."""


@dataclass(frozen=True)
class Conversation:
    """One checked line. `place` is "file, line 12" for messages to the user."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None


@dataclass
class Faults:
    """What is wrong with the data so far; raises when the list is full."""

    found: list[str] = field(default_factory=list)

    def add(self, place: str, reason: str) -> None:
        """Note one fault.

        Raises:
            ValueError: MAX_FAULTS have been found; more reading would not help the user.
        """
        self.found.append(f"{place}: {reason}")
        if len(self.found) >= MAX_FAULTS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise one ValueError that holds every fault."""
        if self.found:
            count = len(self.found)
            more = " (reading stopped here)" if count >= MAX_FAULTS else ""
            problems = "1 problem" if count == 1 else f"{count} problems"
            raise ValueError(
                "\n  ".join([f"data_path: {problems} in the data{more}:", *self.found])
            )


def data_files(data_path: str | Path) -> list[Path]:
    """The JSONL file itself, or the *.jsonl files of a folder in the order of their names.

    Raises:
        ValueError: there is no such path, or no such file in the folder.
    """
    path = Path(data_path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"data_path {str(path)!r} does not exist: give a JSONL file or a folder")
    files = sorted(file for file in path.glob("*.jsonl") if file.is_file())
    if not files:
        raise ValueError(f"data_path {str(path)!r} holds no *.jsonl file: name them so")
    return files


def read_conversations(files: Sequence[Path], faults: Faults) -> Iterator[Conversation]:
    """Yield the sound conversations in order; put the others into `faults`. Blank lines pass.

    Raises:
        ValueError: `faults` is full.
    """
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # some editors write this mark
                if not line.strip():
                    continue
                place = f"{file.name}, line {number}"
                try:
                    yield _parse(place, line)
                except ValueError as error:
                    faults.add(place, str(error))


def _parse(place: str, line: bytes) -> Conversation:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object with 'messages', is {_kind(row)}")
    if row.get("unmask"):
        raise ValueError("'unmask' is not supported: only assistant turns are trained; remove it")
    messages = row.get("messages")
    if "messages" not in row:
        keys = ", ".join(sorted(map(repr, row))[:8]) or "none"
        raise ValueError(f"has no 'messages' (keys: {keys})")
    if not isinstance(messages, list):
        raise ValueError(f"'messages' must be a list, is {_kind(messages)}")
    if not messages:
        raise ValueError("'messages' is empty")
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no assistant turn, so there is nothing to learn")
    return Conversation(place, messages, _tools(row.get("tools")))


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object with 'role' and 'content', is {_kind(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{name} has the unknown role {role!r}: use one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        # Both spellings of a bare call are in use; templates expect text to be there.
        message["content"] = content = ""
    if not isinstance(content, str):
        raise ValueError(f"{name} ({role}): 'content' must be a string, is {_kind(content)}")
    for key, value in message.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"{name} ({role}): {key!r} holds half a character") from error


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' must be a list of objects")
    return tools


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null or absent" if value is None else kinds.get(type(value), "a number")
