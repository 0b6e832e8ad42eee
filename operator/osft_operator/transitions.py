"""Tells the log and Prometheus what a status write changed: one line per change of state.

Called by reconcile after each status write, so a change is told once, by whoever wrote it. Must
never decide anything.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from osft_operator import job_metrics
from osft_operator.observed import find_condition
from osft_operator.queue import Key

logger = logging.getLogger(__name__)


def tell(key: Key, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Say what the new status says that the recorded one did not.

    Args:
        key: the OSFTJob.
        old: its status before the write; empty at first.
        new: its status as written.
    """
    job_metrics.changed(old, new)
    before, after = old.get("phase"), new.get("phase")
    if (before, old.get("reason")) == (after, new.get("reason")):
        return
    text = f"{before or 'New'} -> {after}" if before != after else f"still {after}"
    about = {
        "osftjob": str(key),
        "generation": new.get("observedGeneration"),
        "pytorchjob": new.get("pyTorchJobName"),
        "reason": new.get("reason"),
        "detail": _detail(new) or None,
    }
    logger.info(text, extra={name: value for name, value in about.items() if value is not None})


def _detail(status: Mapping[str, Any]) -> str:
    """The words of the condition that made the phase."""
    reason = status.get("reason")
    for kind in ("Failed", "Complete", "Suspended", "Running", "Accepted"):
        condition = find_condition(status, kind)
        if condition.get("reason") == reason and condition.get("message"):
            return str(condition["message"])
    return ""
