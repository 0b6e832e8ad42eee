"""What kstatus makes of an object: its rules for kinds that it does not know, as a test reads them.

Written from the library's published rules (cli-utils, pkg/kstatus): deleted, then the generation,
then the conditions Reconciling and Stalled in their order, then Ready, else current.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def of(body: Mapping[str, Any]) -> str:
    """Terminating, InProgress, Failed or Current."""
    metadata, status = body["metadata"], body.get("status") or {}
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    generation, observed = metadata.get("generation"), status.get("observedGeneration")
    if generation is not None and observed is not None and observed != generation:
        return "InProgress"
    conditions = status.get("conditions") or []
    for condition in conditions:
        if condition["status"] == "True" and condition["type"] in ("Reconciling", "Stalled"):
            return "InProgress" if condition["type"] == "Reconciling" else "Failed"
    for condition in conditions:
        if condition["type"] == "Ready":
            return "Current" if condition["status"] == "True" else "InProgress"
    return "Current"
