"""How the operator's log looks: one JSON object a line, or plain text for people.

`configure` is called by __main__ once, before anything logs. What a call gives in `extra` becomes
fields, and so does what `about` says of the task that logs: service says which OSFTJob and which
pass it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Attributes that every record has; the others were given in `extra`."""


_about: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("about")


@contextlib.contextmanager
def about(**fields: str) -> Iterator[None]:
    """Whatever this task, and what it starts, logs meanwhile is about this."""
    token = _about.set({**_about.get({}), **fields})
    try:
        yield
    finally:
        _about.reset(token)


class JSONFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "timestamp": moment.isoformat(timespec="milliseconds"),
            "severity": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _fields(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for people: time, severity, what it is about, the words, and the other fields."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback, which follows it."""
        words = [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        return " ".join([_plain(super().formatMessage(record)), *words])


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a record is about, and what its call gave in `extra`."""
    given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return {**_about.get({}), **given}


def _plain(text: str) -> str:
    """One line without control characters: what others wrote must not look like a line of ours."""
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def _word(value: Any) -> str:
    text = str(value)
    return text if text and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def configure(style: str, level: str) -> None:
    """Set up the root logger.

    Args:
        style: json or text.
        level: least severity that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
