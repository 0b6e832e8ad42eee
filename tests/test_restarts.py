"""The number of restarts beside a plain count of what happened, over drawn orders of losses."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import examples
from osft_operator import restarts
from osft_operator.observed import text_of
from world import START, running

NODES = 3


@dataclass
class Gang:
    """The pods of an attempt, the recorded status, and what has really happened."""

    nodes: int = NODES
    now: datetime.datetime = START
    status: dict[str, Any] = field(default_factory=lambda: {"restarts": 0})
    happened: int = 0

    def __post_init__(self) -> None:
        self.pods = [self._pod() for _ in range(self.nodes)]
        self.look()

    def _pod(self) -> dict[str, Any]:
        container = {"name": "pytorch", "restartCount": 0, "state": {"running": {}}}
        return {
            "metadata": {"name": "run-worker-0", "creationTimestamp": text_of(self.now)},
            "status": {"phase": "Running", "containerStatuses": [container]},
        }

    def look(self) -> int:
        """A pass of the operator; what is not in the status is forgotten after it."""
        restarts.count(self.status, {"spec": {}}, self.pods, self.nodes, self.now)
        return int(self.status["restarts"])

    def wait(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)

    def fail(self, index: int) -> None:
        """A container ends and is started again."""
        container = self.pods[index]["status"]["containerStatuses"][0]
        container["restartCount"] += 1
        container["lastState"] = {"terminated": {"exitCode": 75, "finishedAt": text_of(self.now)}}

    def lose(self, index: int) -> None:
        """A pod is lost; its place stays empty until it is made again."""
        self.pods[index] = {"metadata": {"name": "gone", "deletionTimestamp": text_of(self.now)}}

    def make(self, index: int) -> None:
        self.wait(2)
        self.pods[index] = self._pod()

    def round(self, lost: int | None, followers: list[int], made_after: int, looks: bool) -> None:
        """One failure of the run: a pod is lost, or none, and the trainers of all others fail.

        Args:
            lost: which pod.
            followers: in which order the others fail.
            made_after: after how many of them the lost pod is made again.
            looks: whether the operator looks between any two happenings.
        """
        self.happened += 1
        if lost is not None:
            self.lose(lost)
        for number, index in enumerate([*followers, None]):
            if lost is not None and number == min(made_after, len(followers)):
                self.make(lost)
                if looks:
                    self.look()
            if index is not None:
                self.fail(index)
                self.wait(3)
                if looks:
                    self.look()
        for _ in range(2):
            self.wait(100)
            if looks:
                self.look()


@st.composite
def rounds(draw: st.DrawFn, nodes: int) -> list[tuple[int | None, list[int], int]]:
    """Failures in a drawn order: which pod, how the others follow, what is seen first."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        lost = draw(st.one_of(st.none(), st.integers(0, nodes - 1)))
        followers = draw(st.permutations([each for each in range(nodes) if each != lost]))
        found.append((lost, followers, draw(st.integers(0, nodes))))
    return found


@settings(max_examples=examples(50), deadline=None)
@given(st.integers(1, 4).flatmap(lambda nodes: st.tuples(st.just(nodes), rounds(nodes))))
def test_every_loss_counts_once_in_whatever_order(
    drawn: tuple[int, list[tuple[int | None, list[int], int]]],
) -> None:
    nodes, happenings = drawn
    gang = Gang(nodes)
    for lost, followers, made_after in happenings:
        gang.round(lost, followers, made_after, looks=True)
        assert gang.look() == gang.happened


@settings(max_examples=examples(50), deadline=None)
@given(rounds(NODES), st.lists(st.booleans(), min_size=8, max_size=8))
def test_an_operator_that_was_away_counts_no_more_than_happened(
    happenings: list[tuple[int | None, list[int], int]], looks: list[bool]
) -> None:
    gang, before = Gang(), 0
    for (lost, followers, made_after), there in zip(happenings, looks, strict=False):
        gang.round(lost, followers, made_after, looks=there)
        if there:
            assert before <= gang.look() <= gang.happened
            before = gang.look()
    lost_pods = {lost for lost, _, _ in happenings} - {None}
    assert len(lost_pods) <= gang.look() <= gang.happened


@pytest.mark.parametrize("away", [False, True])
def test_three_pods_lost_one_after_the_other_are_three_restarts(away: bool) -> None:
    gang = Gang()
    for lost in (2, 1, 0):
        gang.round(lost, [each for each in range(3) if each != lost], 0, looks=not away)
    assert gang.look() == 3
    assert len(gang.status["countedPods"].get("earlierReplaced", ())) <= 2


def test_a_status_of_an_earlier_version_is_counted_on() -> None:
    gang = Gang()
    gang.wait(500)
    gang.make(0)
    made = gang.now
    gang.wait(200)
    gang.status = {
        "restarts": 4,
        "countedPods": {
            "newest": text_of(made),
            "replacedAfter": text_of(START),
            "restartsOfReplaced": 4,
            "restartsOfOthers": 1,
        },
    }
    assert gang.look() == 4
    gang.fail(0)
    assert gang.look() == 5
    gang.wait(200)
    gang.look()
    gang.make(1)
    assert gang.look() == 6


def test_the_budget_ends_over_different_pods() -> None:
    world = running({"spec.maxRestarts": 2}, count=3)
    for number, index in enumerate((2, 1, 0), 1):
        world.wait(200)
        world.replace_pod(index)
        world.settle()
        assert world.status["restarts"] == min(number, 2)
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "MaxRestartsExceeded")
