"""Whose turn it is to be asked for progress: fair, and in time whatever others do. No sockets."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable

import pytest

from osft_operator.actions import PollTarget
from osft_operator.poll_order import LONGEST_RETRY_SECONDS, PollOrder
from osft_operator.queue import Key
from osft_operator.settings import Settings

SETTINGS = Settings()
INTERVAL, PLACES = SETTINGS.progress_poll_seconds, SETTINGS.progress_concurrency
TIMEOUT = SETTINGS.progress_timeout_seconds
MUTE = None
"""A pod that never answers."""


class Pods:
    """Pods that answer after so many seconds or never, asked in the order's turn."""

    def __init__(self, places: int = PLACES, interval: float = INTERVAL) -> None:
        self.now = 0.0
        self.order = PollOrder(interval, places, lambda: self.now)
        self.answers: dict[Key, float | None] = {}
        self.asked: dict[Key, list[float]] = defaultdict(list)
        self.most = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._under_way = 0

    def watch(self, namespace: str, name: str, answers_after: float | None, pods: int = 1) -> Key:
        key = Key(namespace, name)
        self.answers[key] = answers_after
        targets = [PollTarget(f"{name}-{number}", "10.0.0.1", 1) for number in range(pods)]
        self.order.set(key, targets)
        return key

    def at(self, time: float, what: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self.events, (time, self._number, what))

    def run(self, until: float) -> None:
        while True:
            while (turn := self.order.next()) is not None:
                self._ask(*turn)
            due = self.order.wait_seconds()
            times = [self.events[0][0]] if self.events else []
            # what is due and has no place waits for the next answer
            times += [self.now + due] if due else []
            if not times or min(times) > until:
                self.now = until
                return
            self.now = min(times)
            while self.events and self.events[0][0] <= self.now:
                heapq.heappop(self.events)[2]()

    def _ask(self, key: Key, pod: PollTarget) -> None:
        self.asked[key].append(self.now)
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        after, asked = self.answers[key], self.now
        is_answered = after is not None and after <= TIMEOUT

        def done() -> None:
            self._under_way -= 1
            self.order.done(key, pod, asked=asked, is_answered=is_answered)

        self.at(self.now + (after if is_answered and after is not None else TIMEOUT), done)

    def longest_gap(self, key: Key, since: float = 0.0) -> float:
        """Longest time between two questions to a job's pods, from so late on."""
        times = [since, *(each for each in self.asked[key] if each >= since), self.now]
        return max(after - before for before, after in itertools.pairwise(times))


@pytest.mark.parametrize("namespace", ["crowd", "other"])
@pytest.mark.parametrize("answers_after", [MUTE, 1.9, 0.4], ids=["mute", "slow", "just prompt"])
def test_a_healthy_job_is_asked_in_time_beside_640_others(
    namespace: str, answers_after: float | None
) -> None:
    pods = Pods()
    healthy = pods.watch(namespace, "healthy", 0.01)
    for number in range(640):
        pods.watch("crowd", f"job-{number}", answers_after)
    late = pods.watch(namespace, "late", 0.01)
    pods.run(600)
    # its first answer comes in its turn; within one namespace, after those that came before
    settled = 60.0 if namespace == "crowd" else 3.0
    for key in (healthy, late):
        assert pods.asked[key][0] <= settled
        assert pods.longest_gap(key, since=settled) < INTERVAL + 2 * TIMEOUT
        assert pods.order.asked(key).popitem()[1].in_vain_seconds == 0.0
    assert pods.most <= PLACES


def test_a_pod_that_never_answers_is_asked_ever_more_rarely_and_never_given_up() -> None:
    pods = Pods()
    mute = pods.watch("n", "mute", MUTE)
    pods.run(1000)
    times = pods.asked[mute]
    gaps = [round(after - before) for before, after in itertools.pairwise(times)]
    assert gaps[:5] == [10, 10, 10, 20, 40]
    assert set(gaps[5:]) == {round(LONGEST_RETRY_SECONDS)}
    pods.answers[mute] = 0.01
    pods.run(1100)
    times = [each for each in pods.asked[mute] if each > 1000]
    assert len(times) >= 4, "once it answers, it is asked as often as others"


def test_a_mute_crowd_does_not_starve_and_tells_when_it_was_asked() -> None:
    pods = Pods()
    keys = [pods.watch("n", f"job-{number}", MUTE) for number in range(640)]
    pods.run(3)
    waiting = [key for key in keys if not pods.asked[key]]
    assert waiting
    for key in waiting:
        (record,) = pods.order.asked(key).values()
        assert record.in_vain_seconds == 0.0, "who was not asked is not silent"
    pods.run(1000)
    gaps = [pods.longest_gap(key, since=100) for key in keys]
    assert max(gaps) < 200
    assert min(len(pods.asked[key]) for key in keys) >= 5


def test_namespaces_take_turns_and_so_do_jobs() -> None:
    pods = Pods(places=1)
    pods.watch("big", "gang", 0.01, pods=100)
    pods.watch("big", "single", 0.01)
    pods.watch("small", "job", 0.01)
    first = []
    for _ in range(5):
        turn = pods.order.next()
        assert turn is not None
        assert pods.order.next() is None, "there is one place"
        first.append(turn[0].name)
        pods.order.done(*turn, asked=pods.now, is_answered=True)
    assert sorted(first[:2]) == ["gang", "job"]
    assert set(first[:3]) == {"gang", "job", "single"}


def test_the_jobs_of_one_namespace_crowd_no_other() -> None:
    pods = Pods()
    assert pods.order.crowd("n") == 0
    for number in range(600):
        pods.watch("crowd", f"job-{number}", 0.01)
    pods.watch("crowd", "job-0", 0.01)
    pods.watch("other", "job", 0.01)
    assert (pods.order.crowd("crowd"), pods.order.crowd("other")) == (601, 2)
    pods.order.set(Key("other", "job"), ())
    assert (pods.order.crowd("crowd"), pods.order.crowd("other")) == (600, 0)


def test_what_is_watched_no_more_is_asked_no_more() -> None:
    pods = Pods()
    key = pods.watch("n", "job", 0.01)
    pods.run(15)
    assert len(pods.asked[key]) == 2
    pods.order.set(key, ())
    pods.run(100)
    assert len(pods.asked[key]) == 2
    assert len(pods.order) == 0


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_and_goes_every_pod_keeps_its_turn(seed: int) -> None:
    chance = random.Random(seed)
    pods = Pods(places=chance.choice([1, 2, 4, 32]), interval=chance.choice([0.5, 10.0, 60.0]))
    keys: list[Key] = []
    for number in range(60):
        after = chance.choice([MUTE, 0.01, 0.01, 0.3, 1.0])
        keys.append(pods.watch(f"n-{chance.randrange(4)}", f"job-{number}", after))
        if chance.random() < 0.3:
            again = chance.choice(keys)
            targets = list(pods.order.asked(again))
            pods.order.set(again, ())
            pods.order.set(again, targets)
        pods.run(pods.now + chance.random())
    pods.run(pods.now + 1000)
    assert sum(pods.order._under_way.values()) == pods._under_way
    for key in keys:
        assert pods.asked[key], "never asked"
        assert pods.now - pods.asked[key][-1] < 300
