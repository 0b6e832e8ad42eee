"""The decision of a pass while it is being made.

Used by decide, steps and endings only. Holds the status as it will be, and compares it with the
recorded one to find the events.
"""

from __future__ import annotations

import datetime

from osft_operator import sidecars
from osft_operator.actions import Action, Decision, Event, PollTarget
from osft_operator.observed import Observed, find_condition, text_of, time_of
from osft_operator.readiness import NO_PROGRESS, conclude
from osft_operator.status import (
    CONDITIONS,
    ENDING,
    derive,
    set_condition,
    wait_for,
)

QUIET = (
    "NotYet",
    "Starting",
    "PodsStarting",
    "PodsStopping",
    "Waiting",
    "Suspended",
    "Failed",
    "Complete",
)
"""Reasons of Running=False that are no news of their own, and Running=True after them is none: the
status says so, and each event is one more object for the cluster to hold."""


class Draft:
    """Status, actions, events and the next look, as far as they are known."""

    def __init__(self, observed: Observed, now: datetime.datetime) -> None:
        self.observed = observed
        self.now = now
        self.now_text = text_of(now)
        self.status = derive(observed, now)
        # whatever still waits says so again
        self.status.pop("waitingFor", None)
        self.actions: list[Action] = []
        self.poll: tuple[PollTarget, ...] = ()
        self._requeue: float | None = None

    def condition(self, kind: str, value: str, reason: str, message: str = "") -> None:
        """Say one thing about the job."""
        generation = self.observed.generation
        set_condition(self.status, generation, self.now, kind, value, reason, message)

    def waits_for(self, kind: str, name: str, since: str | None = None) -> str:
        """Name the object that must change before the job goes on.

        Args:
            kind: its kind.
            name: its name.
            since: since when it is so; absent: since it was first named.

        Returns:
            Since when it has been waited for.
        """
        return wait_for(self.status, self.observed.status, kind, name, since or self.now_text)

    def do(self, *actions: Action) -> None:
        """Do something in this pass."""
        self.actions += actions

    def look_again(self, seconds: float) -> None:
        """Look again after so many seconds, or earlier."""
        seconds = max(0.0, seconds)
        self._requeue = seconds if self._requeue is None else min(seconds, self._requeue)

    def seconds_since(self, time: str) -> float:
        """Seconds since a time of the API."""
        return (self.now - time_of(time)).total_seconds()

    def recorded(self, kind: str) -> tuple[str | None, str | None]:
        """Status and reason of a condition as it is recorded."""
        condition = find_condition(self.observed.status, kind)
        return condition.get("status"), condition.get("reason")

    def decision(self) -> Decision:
        """The decision, with the phase and the events that follow from what changed."""
        conclude(self.status, self.observed.generation, self.now)
        news = tuple(self._news())
        return Decision(self.status, tuple(self.actions), news, self._requeue, self.poll)

    def _news(self) -> list[Event]:
        found = []
        for kind in CONDITIONS:
            new = find_condition(self.status, kind)
            if (new["status"], new["reason"]) == self.recorded(kind):
                continue
            event = self._event(kind, new["status"], new["reason"], new["message"])
            was_suspended = self.recorded("Suspended")[0] == "True"
            if kind == "Suspended" and new["status"] == "False" and was_suspended:
                event = Event("Normal", "Resumed", "the job goes on")
            if event is not None:
                found.append(event)
        return found

    def _event(self, kind: str, status: str, reason: str, message: str) -> Event | None:
        if kind == "Accepted" and status == "False" and reason != "NotYet":
            return Event("Warning", reason, message)
        if kind == "Running" and reason == sidecars.REASON:
            return Event("Normal", reason, message)
        if kind == "Running" and status == "True":
            is_over = self.recorded(kind)[1] not in (None, *QUIET)
            return Event("Normal", "Running", message) if is_over else None
        if kind == "Running" and reason == "Restarting" and self.recorded(kind)[1] in ENDING:
            return None  # the same restart, which has waited for pods of before
        if kind == "Running" and reason not in QUIET:
            return Event("Warning", reason, message)
        if kind == "Stalled" and reason in (NO_PROGRESS, "Progressing"):
            return Event("Warning" if status == "True" else "Normal", reason, message)
        if kind in ("Suspended", "Complete") and status == "True":
            return Event("Normal", reason, message)
        if kind == "Failed" and status == "True":
            return Event("Warning", reason, message)
        return None
