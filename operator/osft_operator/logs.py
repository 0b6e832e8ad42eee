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
        line |= _about.get({})
        line |= {k: v for k, v in vars(record).items() if k not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(style: str, level: str) -> None:
    """Set up the root logger.

    Args:
        style: json or text.
        level: least severity that is logged.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JSONFormatter()
        if style == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
