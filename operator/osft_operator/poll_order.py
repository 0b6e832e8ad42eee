"""Which training pod is asked for its progress next, so that no tenant's pods hold up another's.

Called by polling, which asks. Namespaces take turns, and within each its jobs. A pod that does not
answer, or slowly, holds a place for seconds, so such pods share a part of the places, and the mute
are asked ever more rarely; those that answer have the rest. Everything is counted from when a pod
was really asked. Pure: the clock comes in; must never open a connection.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from osft_operator.actions import PollTarget
from osft_operator.queue import Key

RETRY_SECONDS = 10.0
"""Longest wait before a pod that did not answer is asked again, the first few times."""
EARLY_TRIES = 3
"""So many failures in a row are no habit; after them the wait doubles with each."""
LONGEST_RETRY_SECONDS = 60.0
"""Longest wait of a pod that never answers, where pods that do are asked more often than that."""
OTHERS_TURNS = 4
"""Of so many turns one goes to the lane that has waited longest, whichever it is."""
SLOW_SECONDS = 0.5
"""An answer that took longer makes a pod one of the slow."""


class Lane(enum.Enum):
    """How a pod has answered so far; the order is that of who comes first."""

    PROMPT = enum.auto()
    NEW = enum.auto()
    SLOW = enum.auto()
    MUTE = enum.auto()


@dataclass(eq=False)
class Asked:
    """What is known of one pod's answers. Times are the clock's seconds."""

    due: float
    """When it is asked next."""
    first: float | None = None
    """When it was asked first; None before."""
    last: float | None = None
    """When the last question that has ended was asked."""
    answered: float | None = None
    """When the last question that it answered was asked; None before."""
    failures: int = 0
    """Questions without an answer since then."""
    is_slow: bool = False
    is_under_way: bool = False
    """Whether it waits for its turn, or is being asked."""

    @property
    def lane(self) -> Lane:
        """Where it waits."""
        if self.first is None:
            return Lane.NEW
        if self.failures:
            return Lane.MUTE
        return Lane.SLOW if self.is_slow else Lane.PROMPT

    @property
    def in_vain_seconds(self) -> float:
        """For how long it has been asked without an answer: up to the last question that ended."""
        since = self.first if self.answered is None else self.answered
        if since is None or self.last is None or not self.failures:
            return 0.0
        return self.last - since


class _Turns:
    """Pods that wait: each namespace in turn, in it each job, in that each pod."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, OrderedDict[Key, deque[PollTarget]]] = OrderedDict()

    def add(self, key: Key, pod: PollTarget) -> None:
        jobs = self._waiting.setdefault(key.namespace, OrderedDict())
        jobs.setdefault(key, deque()).append(pod)

    def pop(self) -> tuple[Key, PollTarget] | None:
        if not self._waiting:
            return None
        namespace, jobs = self._waiting.popitem(last=False)
        key, pods = jobs.popitem(last=False)
        pod = pods.popleft()
        if pods:
            jobs[key] = pods
        if jobs:
            self._waiting[namespace] = jobs
        return key, pod


class PollOrder:
    """All pods to ask, when, and how many at one time."""

    def __init__(self, interval: float, places: int, clock: Callable[[], float]) -> None:
        """Prepare it.

        Args:
            interval: seconds between two questions to a pod that answers.
            places: pods that are asked at one time.
            clock: seconds.
        """
        self._interval = interval
        self._clock = clock
        self._places = places
        few = max(1, places // 4)
        # Whatever the others do, some places are left for the mute and most for the prompt.
        self._limits = {
            Lane.PROMPT: max(1, places - few),
            Lane.NEW: max(1, places - few),
            Lane.SLOW: max(1, places // 2),
            Lane.MUTE: few,
        }
        self._number = 0
        self._served = dict.fromkeys(Lane, 0)
        self._under_way = dict.fromkeys(Lane, 0)
        self._lanes: dict[tuple[Key, PollTarget], Lane] = {}
        self._turns = {lane: _Turns() for lane in Lane}
        self._pods: dict[Key, dict[PollTarget, Asked]] = {}
        self._jobs: Counter[str] = Counter()
        self._due: list[tuple[float, int, Key, PollTarget]] = []
        self._numbers = itertools.count()

    def set(self, key: Key, targets: Sequence[PollTarget]) -> bool:
        """Ask these pods of a job from now on, and no others; whether there are new ones."""
        if not targets:
            if self._pods.pop(key, None) is not None:
                self._jobs[key.namespace] -= 1
                self._jobs += Counter()  # without those that have none left
            return False
        self._jobs[key.namespace] += key not in self._pods
        known = self._pods.get(key, {})
        self._pods[key] = {}
        for pod in targets:
            self._pods[key][pod] = known.get(pod) or Asked(self._clock())
            if pod not in known:
                self._plan(key, pod, self._clock())
        return any(pod not in known for pod in targets)

    def asked(self, key: Key) -> dict[PollTarget, Asked]:
        """What is known of a job's pods; empty when none is asked."""
        return self._pods.get(key, {})

    def next(self) -> tuple[Key, PollTarget] | None:
        """The pod to ask now; `done` must follow. None while none is due or no place is free."""
        self._move_due()
        for lane in self._lanes_in_turn():
            while self._has_place(lane) and (turn := self._turns[lane].pop()) is not None:
                record = self.asked(turn[0]).get(turn[1])
                # Meanwhile it may be watched no more, or anew.
                if record is None or not record.is_under_way or turn in self._lanes:
                    continue
                if record.first is None:
                    record.first = self._clock()
                self._lanes[turn] = lane
                self._under_way[lane] += 1
                self._number += 1
                self._served[lane] = self._number
                return turn
        return None

    def done(self, key: Key, pod: PollTarget, *, asked: float, is_answered: bool) -> None:
        """A question has ended.

        Args:
            key: the job.
            pod: its pod.
            asked: when it was asked.
            is_answered: whether an answer came.
        """
        self._under_way[self._lanes.pop((key, pod))] -= 1
        record = self.asked(key).get(pod)
        if record is None:
            return
        record.is_under_way = False
        record.last = asked
        record.is_slow = is_answered and self._clock() - asked > SLOW_SECONDS
        record.failures = 0 if is_answered else record.failures + 1
        if is_answered:
            record.answered = asked
        self._plan(key, pod, asked + self._wait(record.failures))

    def wait_seconds(self) -> float | None:
        """Until the next pod is due; None when none will be."""
        return max(0.0, self._due[0][0] - self._clock()) if self._due else None

    def _wait(self, failures: int) -> float:
        if not failures:
            return self._interval
        first = min(self._interval, RETRY_SECONDS)
        wait: float = first * 2 ** min(max(0, failures - EARLY_TRIES), 30)
        return min(wait, max(self._interval, LONGEST_RETRY_SECONDS))

    def _plan(self, key: Key, pod: PollTarget, due: float) -> None:
        self._pods[key][pod].due = due
        heapq.heappush(self._due, (due, next(self._numbers), key, pod))

    def _move_due(self) -> None:
        while self._due and self._due[0][0] <= self._clock():
            due, _, key, pod = heapq.heappop(self._due)
            record = self.asked(key).get(pod)
            # An entry counts only while it agrees with the record.
            if record is not None and record.due == due and not record.is_under_way:
                record.is_under_way = True
                self._turns[record.lane].add(key, pod)

    def _lanes_in_turn(self) -> list[Lane]:
        if (self._number + 1) % OTHERS_TURNS:
            return list(Lane)
        return sorted(Lane, key=self._served.__getitem__)

    def _has_place(self, lane: Lane) -> bool:
        all_places = sum(self._under_way.values())
        return all_places < self._places and self._under_way[lane] < self._limits[lane]

    def crowd(self, namespace: str) -> int:
        """As many jobs as if each namespace had as many as this one, and at most as there are."""
        return min(len(self._pods), self._jobs[namespace] * len(self._jobs))

    def __len__(self) -> int:
        """Jobs whose pods are asked."""
        return len(self._pods)

    def __iter__(self) -> Iterator[tuple[Key, PollTarget]]:
        """Every pod that is asked."""
        return ((key, pod) for key, pods in self._pods.items() for pod in pods)
