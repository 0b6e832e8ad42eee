"""Containers that outlive the training: a proxy or an agent beside trainers that all ended well.

Called by steps. The PyTorchJob of such pods never succeeds, since a pod has ended only when all of
its containers have; so its GPUs would be held for ever. Pure. A trainer that ended with an error is
no business of this module: its exit code is seen beside any other container.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from osft_operator.names import CONTAINER
from osft_operator.observed import Object

REASON = "SidecarsRunning"
"""The reason of Running=True while nothing but such containers runs."""


@dataclass(frozen=True)
class Outliving:
    """A container that runs on after every trainer."""

    pod: str
    container: str
    since: str | None
    """When the last trainer ended."""

    def words(self) -> str:
        """For a condition's message."""
        since = f" since {self.since}" if self.since else ""
        return (
            f"every trainer has ended well{since}, and container {self.container} of pod "
            f"{self.pod} still runs"
        )


def outliving(pods: Sequence[Object], nodes: int) -> Outliving | None:
    """What still runs though every trainer has ended well; None while one has not.

    Args:
        pods: those of the attempt.
        nodes: how many it has when all are there.
    """
    if len(pods) < nodes or not all(map(_trainer_ended, pods)):
        return None
    times = [ended for pod in pods for ended in _trainers_ends(pod) if ended]
    for pod in pods:
        for container in _containers(pod):
            if container.get("name") != CONTAINER and not _ended_well(container):
                name = str(pod["metadata"]["name"])
                return Outliving(name, str(container.get("name")), max(times, default=None))
    return None


def _trainer_ended(pod: Object) -> bool:
    trainers = [each for each in _containers(pod) if each.get("name") == CONTAINER]
    done = bool(trainers) and all(map(_ended_well, trainers))
    return done or (pod.get("status") or {}).get("phase") == "Succeeded"


def _trainers_ends(pod: Object) -> Iterator[str | None]:
    for container in _containers(pod):
        if container.get("name") == CONTAINER:
            yield ((container.get("state") or {}).get("terminated") or {}).get("finishedAt")


def _ended_well(container: Any) -> bool:
    return ((container.get("state") or {}).get("terminated") or {}).get("exitCode") == 0


def _containers(pod: Object) -> list[Any]:
    return list((pod.get("status") or {}).get("containerStatuses") or [])
