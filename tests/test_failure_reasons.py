"""Why a job failed, in words: one row for each reason that people meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from world import World, last_words, running

NCCL = (
    "[rank1]:[E ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=12, OpType=ALLREDUCE, NumelIn=1, Timeout(ms)=600000) ran for 600015 "
    "milliseconds before timing out."
)


@dataclass(frozen=True)
class Fails:
    """A pod that ended, and what the status says of it."""

    name: str
    terminated: dict[str, Any]
    reason: str
    words: tuple[str, ...]
    final: bool = False
    pod: dict[str, Any] = field(default_factory=dict)
    """Changes to the pod's status."""


FAILED = [
    Fails(
        "out of memory",
        {"exitCode": 137, "reason": "OOMKilled"},
        "OOMKilled",
        ("resources.limits.memory", "maxTokensPerGpu"),
    ),
    Fails(
        "out of memory, with words",
        {"exitCode": 137, "reason": "OOMKilled", "message": last_words("Crashed", 75, "killed")},
        "OOMKilled",
        ("resources.limits.memory", "killed"),
    ),
    Fails(
        "evicted",
        {"exitCode": 137, "reason": "Error"},
        "Evicted",
        ("low on resource: ephemeral-storage",),
        pod={
            "phase": "Failed",
            "reason": "Evicted",
            "message": "The node was low on resource: ephemeral-storage.",
        },
    ),
    Fails(
        "evicted for what it wrote",
        {"exitCode": 137, "reason": "Error"},
        "Evicted",
        ('EmptyDir volume "cache" exceeds', "raise spec.storage.cache.sizeLimit"),
        pod={
            "phase": "Failed",
            "reason": "Evicted",
            "message": 'Usage of EmptyDir volume "cache" exceeds the limit "10Gi". ',
        },
    ),
    Fails(
        "no trainer in the image",
        {"exitCode": 128, "reason": "StartError", "message": 'exec: "python": not found in $PATH'},
        "StartError",
        ("spec.image must be a trainer image", "not found in $PATH"),
    ),
    Fails(
        "node drained",
        {"exitCode": 143, "reason": "Error", "message": last_words("Preempted", 143, "saved")},
        "EvictionByEvictionAPI",
        ("Eviction API",),
        pod={
            "conditions": [
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "EvictionByEvictionAPI",
                    "message": "Eviction API: evicting",
                }
            ]
        },
    ),
    Fails(
        "collective timed out, from the log",
        {"exitCode": 134, "reason": "Error", "message": NCCL},
        "NCCLTimeout",
        ("first error in the logs of all pods", "OpType=ALLREDUCE"),
    ),
    Fails(
        "collective timed out, from the trainer",
        {"exitCode": 75, "message": last_words("Crashed", 75, f"DistBackendError: {NCCL}")},
        "NCCLTimeout",
        ("first error in the logs", "SeqNum=12"),
    ),
    Fails(
        "a rank ended itself",
        {"exitCode": 75, "message": last_words("Crashed", 75, "rank 1 was ended by SIGABRT")},
        "Crashed",
        ("rank 1 was ended by SIGABRT", "collective times out"),
    ),
    Fails(
        "bad data",
        {"exitCode": 2, "message": last_words("BadInput", 2, "/data/a.jsonl:7: no JSON")},
        "BadInput",
        ("/data/a.jsonl:7: no JSON",),
        final=True,
    ),
    Fails(
        "diverged",
        {"exitCode": 3, "message": last_words("Diverged", 3, "the loss is not finite at step 9")},
        "Diverged",
        ("not finite at step 9",),
        final=True,
    ),
    Fails("crashed", {"exitCode": 1, "message": "Traceback: boom"}, "Error", ("boom",)),
]


@pytest.mark.parametrize(
    ("name", "cure"),
    [("proxy", "raise it in spec.podTemplate"), ("init-pytorch", "worker-only")],
)
def test_memory_of_another_container_is_no_word_on_the_trainers(name: str, cure: str) -> None:
    world = running()
    world.end(137, reason="OOMKilled")
    world.pods[0]["status"]["containerStatuses"][0]["name"] = name
    world.settle()
    failure = world.status["failure"]
    assert (failure["container"], failure["reason"]) == (name, "OOMKilled")
    assert cure in failure["message"]
    assert "spec.resources" not in failure["message"]


@pytest.mark.parametrize("case", FAILED, ids=lambda case: case.name)
@pytest.mark.parametrize("restarts_left", [True, False])
def test_why_it_failed(case: Fails, restarts_left: bool) -> None:
    world = World({"spec.maxRestarts": 5 if restarts_left else 0})
    world.settle()
    world.run_pods()
    world.settle()
    world.end(case.terminated["exitCode"], **{"reason": "Error", **case.terminated})
    (pod,) = world.pods
    pod["status"] |= case.pod
    pod["status"]["containerStatuses"][0]["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
    world.settle()
    failure = world.status["failure"]
    assert failure["reason"] == case.reason
    assert failure["pod"] == "sample-master-0"
    for words in case.words:
        assert words in failure["message"]
    if case.final:
        assert (world.status["phase"], world.status["reason"]) == ("Failed", case.reason)
        assert world.made == 1, "no retry can help"
    elif not restarts_left:
        assert (world.status["phase"], world.status["reason"]) == ("Failed", "MaxRestartsExceeded")
    if world.status["phase"] == "Failed":
        for words in case.words:
            assert words in world.condition("Failed")["message"]
