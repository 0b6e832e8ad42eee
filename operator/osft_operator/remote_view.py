"""What `osft watch` shows of an OSFTJob, and which pod `osft logs` reads: pure functions.

Called by remote_commands with objects as the API server gives them. Numbers and words are those of
the status, so that `osft watch` and `kubectl get` never say different things.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from osft_operator import names
from osft_operator.endings import is_finished
from osft_operator.observed import Object, find_condition

COLOURS = {"Running": "green", "Succeeded": "green", "Failed": "red", "Restarting": "yellow"}
BAR_WIDTH = 40


class NoPod(ValueError):
    """The job has no pod whose log could be read, and why."""


def rank_zero_pod(job: Object, pods: Sequence[Object]) -> str:
    """Name of the pod whose log tells how the run goes.

    Raises:
        NoPod: when there is none (yet).
    """
    status = job.get("status") or {}
    progress = status.get("progress") or {}
    known = {pod["metadata"]["name"] for pod in pods}
    heard: str | None = progress.get("pod")
    if heard in known and progress.get("attempt") == status.get("attempt"):
        assert heard is not None
        return heard

    def place(pod: Object) -> tuple[bool, int, str]:
        labels = pod["metadata"].get("labels") or {}
        index = str(labels.get(names.REPLICA_INDEX_LABEL, "0"))
        is_master = labels.get(names.REPLICA_TYPE_LABEL) == "master"
        number = int(index) if index.isdigit() else 0
        return not is_master, number, pod["metadata"]["name"]

    if not pods:
        words = " ".join(text for text in _why(status) if text)
        raise NoPod(f"{job['metadata']['name']} has no pods: {words or 'it has not begun'}")
    name: str = min(pods, key=place)["metadata"]["name"]
    return name


def line(job: Object) -> str:
    """The job in one line, for a pipe."""
    status = job.get("status") or {}
    phase, why = _why(status)
    words = [phase, *(text for _, text in _numbers(status))]
    if phase not in ("Running", "Succeeded"):
        words.append(why)
    return "  ".join(filter(None, words))


def view(job: Object, note: str = "") -> RenderableType:
    """The job for a terminal.

    Args:
        job: the OSFTJob.
        note: a line about the connection.
    """
    status = job.get("status") or {}
    phase, why = _why(status)
    metadata = job["metadata"]
    head = Text.assemble(
        (f"{metadata.get('namespace', '')}/{metadata['name']}  ", "bold"),
        (phase or "not seen by the operator yet", COLOURS.get(phase, "cyan")),
    )
    percentage = (status.get("progress") or {}).get("progressPercentage", 0)
    table = Table.grid(padding=(0, 2))
    for name, text in [*_numbers(status), *_places(status)]:
        # a pod's words may look like markup
        table.add_row(Text(name, style="dim"), Text(text))
    parts: list[RenderableType] = [head, ProgressBar(100, percentage, BAR_WIDTH), table]
    if phase != "Running" or status.get("reason") != "PodsRunning":
        parts.append(Text(why))
    if note:
        parts.append(Text(note, style="yellow"))
    return Group(*parts)


def _numbers(status: Object) -> list[tuple[str, str]]:
    progress = status.get("progress") or {}
    found: list[tuple[str, Any]] = [
        ("progress", progress.get("summary")),
        ("epoch", progress.get("epoch")),
        ("loss", progress.get("loss")),
        ("tokens/s", progress.get("tokensPerSecond")),
        ("left", None if is_finished(status) else progress.get("eta")),
        ("restarts", status.get("restarts") or None),
    ]
    return [
        (name, str(value) if name == "progress" else f"{name} {value}")
        for name, value in found
        if value is not None
    ]


def _places(status: Object) -> list[tuple[str, str]]:
    checkpoint, progress = status.get("checkpoint") or {}, status.get("progress") or {}
    waits = status.get("waitingFor") or {}
    found = [
        ("waits for", waits and f"{waits['kind']} {waits['name']} since {waits['since']}"),
        ("attempt", status.get("pyTorchJobName")),
        ("rank 0", progress.get("pod")),
        ("checkpoint", checkpoint.get("latest")),
        ("model", checkpoint.get("final")),
        ("heard", progress.get("lastUpdatedTime")),
    ]
    return [(name, str(value)) for name, value in found if value]


def _why(status: Object) -> tuple[str, str]:
    """Phase, and the reason with its words."""
    reason = status.get("reason") or ""
    for kind in ("Failed", "Complete", "Suspended", "Stalled", "Running", "Accepted"):
        condition = find_condition(status, kind)
        if condition.get("reason") == reason and reason:
            return status.get("phase") or "", f"{reason}: {condition.get('message', '')}".rstrip(
                ": "
            )
    return status.get("phase") or "", reason
