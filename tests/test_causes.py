"""Which failure explains the others: the same one in whatever order they are seen."""

from __future__ import annotations

import datetime
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from osft_operator import causes
from osft_operator.cache import Cache
from osft_operator.kinds import PODS
from osft_operator.observed import text_of
from osft_operator.queue import Key
from world import START, World, last_words, running

RESET = "RuntimeError: [pair.cc:553] Connection reset by peer [10.0.0.3]:41352"
SYMPTOMS = {
    "reset": RESET,
    "closed": "RuntimeError: [pair.cc:547] Connection closed by peer [10.0.0.3]:41352",
    "refused": "DistNetworkError: The client socket has timed out after 600000ms",
    "store": "DistStoreError: Timed out after 601 seconds waiting for clients. 1/2 joined",
    "nccl": "DistBackendError: NCCL error: ncclRemoteError: A call failed possibly due to ...",
    "name": "[Errno -2] Name or service not known",
}


def later(seconds: float) -> str:
    return text_of(START + datetime.timedelta(seconds=seconds))


def pod(name: str, at: float, code: int = 75, message: str = "", **status: Any) -> dict[str, Any]:
    """A pod whose trainer has ended at that second."""
    ended = {"exitCode": code, "reason": "Error", "message": message, "finishedAt": later(at)}
    container = {"name": "pytorch", "restartCount": 1, "lastState": {"terminated": ended}}
    return {
        "metadata": {"name": name},
        "status": {"phase": "Running", "containerStatuses": [container], **status},
    }


def evicted(at: float) -> dict[str, Any]:
    body = pod("lost", at, 137, phase="Failed", reason="Evicted", message="low on memory")
    return body


def taken(at: float, reason: str) -> dict[str, Any]:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
    condition |= {"message": "taken away", "lastTransitionTime": later(at)}
    words = last_words("Preempted", 143, "saved")
    body = pod("lost", at + 3, 143, words, conditions=[condition])
    body["metadata"] |= {"deletionTimestamp": later(at + 30), "deletionGracePeriodSeconds": 30}
    return body


def out_of_memory(at: float) -> dict[str, Any]:
    body = pod("lost", at, 137)
    body["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"] = "OOMKilled"
    return body


def node_lost(at: float) -> dict[str, Any]:
    """Its containers' states are old: they say that it runs."""
    ready = {"type": "Ready", "status": "False", "lastTransitionTime": later(at)}
    container = {"name": "pytorch", "restartCount": 0, "state": {"running": {}}}
    status = {"phase": "Running", "conditions": [ready], "containerStatuses": [container]}
    return {"metadata": {"name": "lost"}, "status": status}


def crashed(at: float) -> dict[str, Any]:
    words = last_words("Crashed", 75, "RuntimeError: CUDA error: an illegal memory access")
    return pod("lost", at, 75, words)


def follower(name: str, at: float, message: str = RESET) -> dict[str, Any]:
    return pod(name, at, 75, last_words("Crashed", 75, message))


CAUSES = {
    "evicted": (evicted(0), "Evicted"),
    "drained": (taken(-5, "EvictionByEvictionAPI"), "EvictionByEvictionAPI"),
    "preempted": (taken(0, "PreemptionByScheduler"), "PreemptionByScheduler"),
    "out of memory": (out_of_memory(0), "OOMKilled"),
    "node lost": (node_lost(45), "NodeLost"),
    "node lost, noticed late": (taken(345, "DeletionByTaintManager"), "DeletionByTaintManager"),
    "crashed": (crashed(0), "Crashed"),
}


@dataclass
class Watched:
    """The recorded status of a run, and the pods that the operator sees now."""

    status: dict[str, Any] = field(default_factory=lambda: {"attempt": 1})
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    gone: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runs("True", -1000)

    def runs(self, value: str, at: float) -> None:
        condition = {"type": "Running", "status": value, "lastTransitionTime": later(at)}
        self.status["conditions"] = [condition]

    def miss(self, body: dict[str, Any], at: float = 60) -> None:
        """A pod fails and is deleted before the operator looks; its watch tells of it."""
        cache = Cache()
        labels = {"osft.dev/job": "run"}
        metadata = {**body["metadata"], "namespace": "ns", "uid": "u", "labels": labels}
        start = {**body, "metadata": {**metadata, "resourceVersion": "1"}, "status": {}}
        cache.put(PODS, start)
        cache.remove(PODS, {**body, "metadata": {**metadata, "resourceVersion": "2"}})
        self.gone = cache.failed_and_gone(Key("ns", "run"))
        self.look(at)

    def see(self, body: dict[str, Any], at: float = 60) -> None:
        self.pods[body["metadata"]["name"]] = body
        self.look(at)

    def look(self, at: float = 60) -> None:
        now = START + datetime.timedelta(seconds=at)
        causes.record(self.status, list(self.pods.values()), now, gone=self.gone)

    @property
    def reason(self) -> str:
        return str(self.status["failure"]["reason"])


@pytest.mark.parametrize("goes", [True, False], ids=["evidence goes", "evidence stays"])
@pytest.mark.parametrize(("body", "reason"), CAUSES.values(), ids=CAUSES)
def test_the_cause_is_kept_in_every_order(body: dict[str, Any], reason: str, goes: bool) -> None:
    for words in SYMPTOMS.values():
        others = [follower("a", 2, words), follower("b", 3, words)]
        for order in itertools.permutations([body, *others]):
            watched = Watched()
            watched.runs("False", 1)
            for each in order:
                watched.see(each)
                if each is body and goes and reason != "NodeLost":
                    del watched.pods["lost"]
                    watched.look()
            assert watched.reason == reason, [each["metadata"]["name"] for each in order]
            assert watched.status["failure"]["pod"] == "lost"


@pytest.mark.parametrize("kind", ["evicted", "drained", "preempted", "node lost, noticed late"])
def test_a_pod_that_was_deleted_before_anybody_looked_is_evidence(kind: str) -> None:
    body, reason = CAUSES[kind]
    watched = Watched()
    watched.runs("False", 1)
    watched.pods["a"] = follower("a", 2)
    watched.miss(body)
    assert watched.reason == reason
    watched.runs("True", 400)
    watched.see(follower("a", 500), 501)
    assert watched.reason == "Crashed", "its evidence is of the round before"


@pytest.mark.parametrize(
    "body", [crashed(0), pod("a", 0, 0), pod("a", 40, 143, phase="Failed")], ids=range(3)
)
def test_a_pod_that_was_told_to_end_leaves_no_evidence(body: dict[str, Any]) -> None:
    body["metadata"] |= {"deletionTimestamp": later(30), "deletionGracePeriodSeconds": 30}
    watched = Watched()
    watched.miss(body)
    assert "failure" not in watched.status


@pytest.mark.parametrize("late", [5, 100, 620])
def test_who_waited_in_vain_does_not_hide_why(late: float) -> None:
    """The others notice when a collective or the rendezvous times out, and that again and again."""
    watched = Watched()
    watched.see(evicted(0))
    watched.runs("False", 1)
    watched.pods.clear()
    for at in (late, late + 620, late + 1240):
        watched.see(follower("a", at, SYMPTOMS["store"]), at)
        assert watched.reason == "Evicted"


@pytest.mark.parametrize("seen", [True, False], ids=["seen to run", "not seen to run"])
def test_another_failure_after_the_run_went_on_is_another_story(seen: bool) -> None:
    watched = Watched()
    watched.see(evicted(0))
    watched.runs("False", 1)
    watched.pods.clear()
    watched.see(follower("a", 2))
    assert watched.reason == "Evicted"
    watched.runs("True", 30)
    watched.look(40)
    assert watched.reason == "Evicted", "what the others said then is no later failure"
    if not seen:
        watched.runs("False", 500)
    watched.see(follower("a", 500), 501)
    assert (watched.reason, watched.status["failure"]["pod"]) == ("Crashed", "a")


def test_another_cause_is_told_also_before_the_run_went_on() -> None:
    watched = Watched()
    watched.see(evicted(0))
    watched.runs("False", 1)
    watched.pods.clear()
    watched.see(out_of_memory(400), 401)
    assert watched.reason == "OOMKilled"


def test_an_old_end_of_another_pod_explains_nothing_new() -> None:
    watched = Watched()
    watched.pods["a"] = pod("a", -3600, 137, "old")
    watched.see(follower("b", 0))
    assert watched.status["failure"]["pod"] == "b"
    del watched.pods["b"]
    watched.look()
    assert watched.status["failure"]["pod"] == "b"


def test_what_a_pod_says_after_it_was_told_to_end_is_no_failure() -> None:
    body = pod("a", 10, 143, last_words("Preempted", 143, "saved"))
    body["metadata"] |= {"deletionTimestamp": later(35), "deletionGracePeriodSeconds": 30}
    assert causes.cause([body]) is None
    ended = body["status"]["containerStatuses"][0]["lastState"]["terminated"]
    ended |= {"exitCode": 75, "message": "CUDA error", "finishedAt": later(3)}
    before = causes.cause([body])
    assert before is not None
    assert before.message == "CUDA error"


def test_a_verdict_on_the_input_comes_before_all() -> None:
    watched = Watched()
    watched.see(evicted(0))
    watched.see(pod("a", 50, 2, last_words("BadInput", 2, "no such file")))
    assert watched.reason == "BadInput"


def test_the_end_of_the_job_names_the_cause_whose_evidence_is_gone() -> None:
    world: World = running({"spec.maxRestarts": 0}, count=2)
    world.wait(100)
    world.pods[1]["status"] |= {"phase": "Failed", "reason": "Evicted", "message": "low on memory"}
    world.settle()
    assert world.status["failure"]["reason"] == "Evicted"
    world.pods.pop()
    world.settle()
    world.wait(3)
    world.end(75, last_words("Crashed", 75, RESET))
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Failed", "MaxRestartsExceeded")
    assert world.status["failure"]["reason"] == "Evicted"
    assert "low on memory" in world.condition("Failed")["message"]
    assert "Connection reset" not in world.condition("Failed")["message"]


def test_a_new_attempt_begins_without_a_cause() -> None:
    world = running({"spec.maxRestarts": 9})
    world.end(137, reason="OOMKilled")
    world.tell("sample", "Failed")
    world.settle()
    assert world.status["attempt"] == 2
    assert world.status["failure"]["attempt"] == 1, "kept for people"
    world.wait(10)
    world.settle()
    world.run_pods("sample-a2")
    world.settle()
    world.tell("sample-a2", "Failed", "backoff")
    world.settle()
    assert "OOMKilled" not in world.condition("Running")["message"]
