"""How deep and how large an OSFTJob may be, and JSON that is read whatever its depth.

Called by spec before it looks at an object, and by cluster, handlers and cache for whatever the API
server tells. The API server takes ten thousand levels and a megabyte; code that follows levels by
calling itself ends at some hundreds, for every object in the same list. Nothing here does so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_LEVELS = 32
"""Deepest nesting of an OSFTJob; a PodSpec needs some 15 levels of it."""
MAX_SIZE = 4_000_000
"""Characters of a whole OSFTJob: more than any API server takes in one request."""
FREE_PARTS: dict[tuple[str, ...], int] = {
    ("spec", "podTemplate"): 131_072,
    ("spec", "training", "lrSchedulerKwargs"): 4_096,
}
"""Parts without a schema of their own: the most characters of each, as JSON."""
QUOTES = 6
"""Characters around a name and its value in JSON."""
CUT_LEVELS = 2 * MAX_LEVELS
"""What is deeper in an object is not kept; it is enough to see that there was too much."""
READ_LEVELS = 2 * CUT_LEVELS
"""What is deeper in an answer is not read, if not all of it can be: an answer holds objects."""
MAX_PATH = 200
"""Longest path that an error names."""

_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
"""Texts, which may hold brackets, and brackets."""

Link = tuple["Link", Any] | None
"""The way to a part: that of the part around it, and its name in there."""


@dataclass(frozen=True)
class Excess:
    """Stands for a part that was too large to be kept."""

    words: str
    """What is wrong and what to do."""


def excess(body: Any) -> str | None:
    """What of an OSFTJob is beyond its bounds, with field, rule and cure; None if nothing is.

    Also what is no JSON: YAML knows dates, keys that are numbers, and parts inside themselves.
    """
    return _too_deep(body) or next(
        filter(None, (_too_long(body, path, most) for path, most in FREE_PARTS.items())), None
    )


def too_long_template(body: Mapping[str, Any]) -> Excess | None:
    """What to keep in the place of a podTemplate that is too large; None if it is not."""
    path = ("spec", "podTemplate")
    words = _too_long(body, path, FREE_PARTS[path])
    return None if words is None else Excess(words)


def read_json(raw: bytes | str) -> Any:
    """A JSON document; without what is deeper than READ_LEVELS, if Python cannot read it all.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(raw)
    except RecursionError:
        return json.loads(_cut(raw.encode() if isinstance(raw, str) else raw))


def _cut(raw: bytes) -> bytes:
    """The document with `{}` for everything deeper than READ_LEVELS.

    Raises:
        ValueError: it has no end.
    """
    kept, level, start = [], 0, 0
    for found in _STRUCTURE.finditer(raw):
        mark = found[0]
        if mark in (b"{", b"["):
            level += 1
            if level == READ_LEVELS + 1:
                kept.append(raw[start : found.start()])
        elif mark in (b"}", b"]"):
            if level == READ_LEVELS + 1:
                kept.append(b"{}")
                start = found.end()
            level -= 1
    if level:
        raise ValueError("brackets that do not close")
    return b"".join([*kept, raw[start:]])


def _too_deep(body: Any) -> str | None:
    size = 0
    waiting: list[tuple[Any, int, Link]] = [(body, 1, None)]
    while waiting:
        part, level, place = waiting.pop()
        if level > MAX_LEVELS:
            return f"{_path(place)}: is more than {MAX_LEVELS} levels deep: write it flatter"
        for name, value in _entries(part):
            if isinstance(part, dict) and not isinstance(name, str):
                return f"{_path((place, name))}: a name must be text: put {name} in quotes"
            size += len(str(name)) + (len(value) if isinstance(value, str) else 1) + QUOTES
            if isinstance(value, dict | list):
                waiting.append((value, level + 1, (place, name)))
            elif isinstance(value, Excess):
                return value.words
            elif value is not None and not isinstance(value, str | int | float):
                kind = type(value).__name__
                return f"{_path((place, name))}: {value} is a {kind} to YAML: put it in quotes"
        if size > MAX_SIZE:
            return f"spec: has more than {MAX_SIZE} characters, aliases written out: shorten it"
    return None


def _entries(part: Any) -> Any:
    if isinstance(part, dict):
        return part.items()
    return enumerate(part) if isinstance(part, list) else ()


def _too_long(body: Any, path: tuple[str, ...], most: int) -> str | None:
    part = body
    for name in path:
        part = part.get(name) if isinstance(part, Mapping) else None
    if not isinstance(part, dict | list):
        return None
    try:
        length = len(json.dumps(part, allow_nan=False, ensure_ascii=False))
    except ValueError:
        return f"{'.'.join(path)}: holds a number that is none in JSON, .inf or .nan: remove it"
    if length <= most:
        return None
    return f"{'.'.join(path)}: has {length} characters, and at most {most} are taken: shorten it"


def _path(place: Link) -> str:
    names: list[str] = []
    while place is not None:
        place, name = place
        names.append(f"[{name}]" if isinstance(name, int) else f".{name}")
    text = "".join(reversed(names)).removeprefix(".")
    return text if len(text) <= MAX_PATH else f"{text[:MAX_PATH]}..."
