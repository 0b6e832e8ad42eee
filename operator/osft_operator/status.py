"""Builds the status: conditions that keep their times, the phase, progress for people.

Called by decide. Pure: the time comes in. A condition keeps lastTransitionTime while its status
stays; the phase follows from the conditions alone. It decides nothing about what happens next.
"""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Sequence
from typing import Any

from osft_operator import causes, failure, restarts
from osft_operator.observed import Object, Observed, find_condition, replicas, text_of
from osft_operator.status_model import (
    CheckpointStatus,
    NamedValue,
    ProgressStatus,
    RetentionStatus,
)
from osft_trainer.report import Progress, Retention, duration, percentage, summary

Status = dict[str, Any]

CONDITIONS = ("Accepted", "Running", "Suspended", "Stalled", "Complete", "Failed", "Ready")
"""All of them, in the order they are shown; each is set from the first pass on."""
STARTING = ("Starting", "PodsStarting")
"""Reasons of Running=False while all goes as it should."""
STUCK = ("NodeLost", "PodsNotEnding")
"""Reasons of Running=False while a pod has to end and does not by itself."""
WRITE_FAILED = "WriteFailed"
"""The reason of Running=False while the API server does not take what an attempt needs."""
SUSPENDING = "Suspending"
"""The reason of Suspended=False, and the phase, until no pod is left of a job to be suspended."""
ENDING = ("PodsStopping", "PodsNotEnding", "FolderInUse")
"""Reasons of Running=False while pods of before have to end."""
MAX_CONDITION_MESSAGE = 4096
LARGEST_NUMBER = 1e300
"""What a pod tells beyond it says nothing, and rounding it may overflow."""


def derive(observed: Observed, now: datetime.datetime) -> Status:
    """The recorded status brought up to date with what is seen, before anything is decided."""
    status = copy.deepcopy(observed.status)
    status["observedGeneration"] = observed.generation
    for condition in CONDITIONS:
        if not find_condition(status, condition):
            set_condition(status, observed.generation, now, condition, "False", "NotYet")
    status.setdefault("restarts", 0)
    name = status.get("pyTorchJobName")
    current = observed.job_named(name) if name else None
    if current is None:
        return status
    pods = observed.pods_of(current)
    status["pyTorchJobUID"] = current["metadata"].get("uid", "")
    if not any(find_condition(status, end)["status"] == "True" for end in ("Failed", "Complete")):
        # later ends come from our own deletion, or are of pods whose work is done
        restarts.count(status, current, pods, replicas(current), now)
        causes.record(status, pods, now, gone=observed.gone_pods_of(current))
    # whoever answers now has gone on from the last words of before
    words = failure.last_progress(pods, ended_only=observed.progress is not None)
    for progress in (observed.progress, words):
        if progress is not None and _is_news(progress, observed, status):
            status["progress"] = _progress(progress, observed, status, now)
            status["checkpoint"] = _checkpoint(progress)
            if progress.retention is not None:
                status["retention"] = _retention(progress.retention)
    return status


def set_condition(
    status: Status,
    generation: int,
    now: datetime.datetime,
    kind: str,
    value: str,
    reason: str,
    message: str = "",
) -> None:
    """Say one thing; the time of the last change stays when the status does."""
    assert kind in CONDITIONS, kind
    old = find_condition(status, kind)
    same = old.get("status") == value
    new = {
        "type": kind,
        "status": value,
        "reason": reason,
        "message": message[:MAX_CONDITION_MESSAGE],
        "observedGeneration": generation,
        "lastTransitionTime": old["lastTransitionTime"] if same else text_of(now),
    }
    others = {each["type"]: each for each in status.get("conditions") or []}
    others[kind] = new
    status["conditions"] = [others[each] for each in CONDITIONS if each in others]


def wait_for(status: Status, recorded: Object, kind: str, name: str, since: str) -> str:
    """Name what is waited for; what is recorded as waited for already keeps its time.

    Args:
        status: changed in place.
        recorded: the status of before.
        kind: kind of the object.
        name: its name.
        since: since when, if it is not recorded.

    Returns:
        Since when it has been waited for.
    """
    known = recorded.get("waitingFor") or {}
    if (known.get("kind"), known.get("name")) == (kind, name):
        since = str(known.get("since"))
    status["waitingFor"] = {"kind": kind, "name": name, "since": since}
    return since


def set_phase(status: Status) -> None:
    """Phase and reason, from the conditions: Failed, Complete, Suspended, then Running's reason."""
    status["phase"], status["reason"] = phase(status)


def phase(status: Object) -> tuple[str, str]:
    """Phase and the reason of the condition that made it."""
    by_type = {kind: find_condition(status, kind) for kind in CONDITIONS}
    for kind, word in (("Failed", "Failed"), ("Complete", "Succeeded")):
        if by_type[kind].get("status") == "True":
            return word, by_type[kind]["reason"]
    suspended = by_type["Suspended"]
    if suspended.get("status") == "True":
        return ("Queued" if suspended["reason"] == "Queued" else "Suspended"), suspended["reason"]
    running, accepted = by_type["Running"], by_type["Accepted"]
    if suspended.get("reason") == SUSPENDING:
        stuck = running if running.get("reason") in STUCK else suspended
        return "Suspending", stuck["reason"]
    if running.get("status") == "True":
        stalled = by_type["Stalled"]
        return "Running", (stalled if stalled.get("status") == "True" else running)["reason"]
    begun = "pyTorchJobUID" in status
    if accepted.get("status") == "False" and not begun:
        return "Pending", accepted.get("reason", "")
    held_up = (*ENDING, WRITE_FAILED) if begun else (*ENDING, WRITE_FAILED, *STUCK)
    restarts_after = running.get("reason") in held_up and status.get("attempt", 1) > 1
    if running.get("reason") == "Restarting" or restarts_after:
        return "Restarting", running["reason"]
    begun = begun or running.get("reason") in STARTING
    return ("Starting" if begun else "Pending"), running.get("reason", "")


def _is_news(progress: Progress, observed: Observed, status: Status) -> bool:
    """Whether a document is about this run and not older than what is known."""
    if progress.run_id != observed.uid or progress.global_rank != 0:
        return False
    if progress.attempt > status.get("attempt", 1):
        return False
    known = status.get("progress", {})
    attempt, before = max(1, progress.attempt), int(known.get("attempt", 0))
    if attempt != before:
        return attempt > before
    done = status.get("checkpoint", {}).get("final")
    if done is not None and progress.final is None:
        return False
    # A restart goes back to the newest checkpoint, so fewer steps than before can be news.
    if (progress.last_updated_time or "") >= str(known.get("lastUpdatedTime", "")):
        return True
    # Or it went on at a node whose clock is behind. Then our own clock tells.
    if progress is observed.progress and observed.progress_since is not None:
        return text_of(observed.progress_since) > str(known.get("advancedTime", ""))
    return progress.step > int(known.get("step", 0))


def _progress(
    progress: Progress, observed: Observed, status: Status, now: datetime.datetime
) -> Status:
    eta = progress.estimated_remaining_seconds
    metrics: Sequence[NamedValue] = [
        NamedValue(name=failure.clean(each.name, 64), value=failure.clean(each.value, 64))
        for each in progress.metrics[:16]
    ]
    return ProgressStatus(
        progress_percentage=percentage(progress),
        summary=summary(progress),
        eta=None if eta is None else duration(eta),
        step=progress.step,
        total_steps=progress.total_steps,
        epoch=round(progress.epoch, 2),
        total_epochs=_rounded(progress.total_epochs, 4),
        loss=_rounded(progress.loss, 4),
        learning_rate=_rounded(progress.learning_rate, 3),
        tokens_per_second=_rounded(progress.tokens_per_second, 3),
        estimated_remaining_seconds=eta,
        last_updated_time=_text(progress.last_updated_time, 32),
        attempt=max(1, progress.attempt),
        pod=observed.progress_pod if progress is observed.progress else _recorded_pod(status),
        phase=_text(progress.phase, 32),
        advanced_time=_advanced(progress, observed, status, now),
        metrics=list(metrics) or None,
    ).model_dump(by_alias=True, exclude_none=True)


def _retention(kept: Retention) -> Status:
    before, after = (_rounded(loss, 4) or 0.0 for loss in (kept.loss_before, kept.loss_after))
    known = kept.loss_after is not None
    return RetentionStatus(
        loss_before=before,
        loss_after=after if known else None,
        change=_rounded(kept.change, 3),
        summary=f"{before:.4g} -> {after:.4g}" if known else f"{before:.4g}",
    ).model_dump(by_alias=True, exclude_none=True)


def _recorded_pod(status: Status) -> str | None:
    pod: str | None = status.get("progress", {}).get("pod")
    return pod


def _advanced(
    progress: Progress, observed: Observed, status: Status, now: datetime.datetime
) -> str:
    """When the run last came forward, as far as it was seen."""
    known = status.get("progress", {})
    place = (known.get("attempt"), known.get("step"), known.get("phase"))
    newest = status.get("checkpoint", {}).get("latest")
    here = (max(1, progress.attempt), progress.step, _text(progress.phase, 32))
    same = place == here and newest == _text(progress.latest_checkpoint, 1024)
    if same and "advancedTime" in known:
        return str(known["advancedTime"])
    seen = observed.progress_since if progress is observed.progress else None
    return text_of(seen or now)


def _checkpoint(progress: Progress) -> Status:
    return CheckpointStatus(
        latest=_text(progress.latest_checkpoint, 1024),
        latest_step=progress.latest_checkpoint_step,
        final=_text(progress.final, 1024),
    ).model_dump(by_alias=True, exclude_none=True)


def _text(text: str | None, limit: int) -> str | None:
    return None if text is None else failure.clean(text, limit)


def _rounded(value: float | None, digits: int) -> float | None:
    """A number to so many significant digits."""
    if value is None or value == 0:
        return value
    if abs(value) > LARGEST_NUMBER:
        return None
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
