"""What decide hands to reconcile: actions, events, pods to ask, and when to look again.

Plain frozen values; they know nothing of how they are carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]


@dataclass(frozen=True)
class CreateClaim:
    """Make the claim for checkpoints."""

    manifest: Object


@dataclass(frozen=True)
class CreatePyTorchJob:
    """Make the PyTorchJob of an attempt."""

    manifest: Object


@dataclass(frozen=True)
class DeletePyTorchJob:
    """Delete a PyTorchJob and, before it goes, its pods."""

    name: str
    uid: str


@dataclass(frozen=True)
class SuspendPyTorchJob:
    """Set spec.runPolicy.suspend."""

    name: str
    uid: str
    suspend: bool


@dataclass(frozen=True)
class DeleteOSFTJob:
    """Delete the OSFTJob itself: it finished, and its time to live is over."""

    uid: str


Action = CreateClaim | CreatePyTorchJob | DeletePyTorchJob | SuspendPyTorchJob | DeleteOSFTJob


@dataclass(frozen=True)
class Event:
    """Something to tell people who look at the OSFTJob."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class PollTarget:
    """A pod to ask for its progress."""

    pod: str
    ip: str
    port: int


@dataclass(frozen=True)
class Decision:
    """The outcome of one pass."""

    status: Object
    """The whole new status."""
    actions: tuple[Action, ...] = ()
    """What to do, in this order."""
    events: tuple[Event, ...] = ()
    """What to say once the status is written."""
    requeue_after: float | None = None
    """Seconds after which to look again; None: only when something changes."""
    poll: tuple[PollTarget, ...] = ()
    """Pods to ask from now on."""
