"""Of all events about an object, the one is told that says why it waits."""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import pytest

from osft_operator import evidence
from osft_operator.observed import Said, text_of
from world import START

Event = tuple[str, str, float]
"""Type, reason, and at which second it was last said."""


def body(said: Event) -> dict[str, Any]:
    kind, reason, second = said
    when = text_of(START + datetime.timedelta(seconds=second))
    metadata = {"name": reason, "creationTimestamp": text_of(START)}
    words = f"words of {reason}"
    return {
        "metadata": metadata, "type": kind, "reason": reason, "message": words,
        "lastTimestamp": when,
    }  # fmt: skip


def normal(reason: str, second: float) -> Event:
    return "Normal", reason, second


def warning(reason: str, second: float) -> Event:
    return "Warning", reason, second


TELLING: dict[str, tuple[list[Event], str]] = {
    "nothing is wrong": ([normal("Scheduled", 0), normal("Pulling", 2)], "Pulling"),
    "a volume cannot be mounted": (
        [normal("Scheduled", 0), warning("FailedMount", 130)],
        "FailedMount",
    ),
    "the volume came": (
        [normal("Scheduled", 0), warning("FailedMount", 5), normal("Pulling", 9)],
        "Pulling",
    ),
    "the image is tried again": (
        [
            normal("Pulling", 60),
            warning("Failed", 61),
            normal("BackOff", 75),
            normal("Pulling", 90),
        ],
        "Failed",
    ),
    "the image came": (
        [warning("Failed", 61), normal("Pulling", 90), normal("Pulled", 99)],
        "Pulled",
    ),
    "the same second": ([warning("FailedMount", 7), normal("Pulling", 7)], "FailedMount"),
    "a node came": ([warning("FailedScheduling", 5), normal("Scheduled", 6)], "Scheduled"),
    "attached and not mounted": (
        [normal("SuccessfulAttachVolume", 9), warning("FailedMount", 8)],
        "FailedMount",
    ),
    "attached at last": (
        [normal("SuccessfulAttachVolume", 9), warning("FailedAttachVolume", 8)],
        "SuccessfulAttachVolume",
    ),
    "a provisioner that fails says each time that it tries": (
        [
            warning("ProvisioningFailed", 30),
            normal("Provisioning", 31),
            normal("ExternalProvisioning", 40),
        ],
        "ProvisioningFailed",
    ),
    "a claim for its first pod": ([normal("WaitForFirstConsumer", 3)], "WaitForFirstConsumer"),
    "a hint that holds nothing up": (
        [warning("DNSConfigForming", 30), normal("Pulling", 20)],
        "Pulling",
    ),
    "of two the newer": ([warning("NodeNotReady", 5), warning("FailedMount", 6)], "FailedMount"),
}


@pytest.mark.parametrize(("said", "told"), TELLING.values(), ids=TELLING)
def test_why_a_pod_or_claim_waits(said: list[Event], told: str) -> None:
    for order in itertools.permutations(map(body, said)):
        found = evidence.telling(order)
        assert found is not None
        assert found.reason == told
        assert found.is_warning == (("Warning", told) in [each[:2] for each in said])


def test_nothing_is_told_of_no_events() -> None:
    assert evidence.telling([]) is None
    assert evidence.refusal([], START) is None


REFUSAL: dict[str, tuple[list[Event], str | None]] = {
    "each try that fails says again that the job is resumed": (
        [warning("FailedCreatePod", 100), normal("PyTorchJobResumed", 100)],
        "FailedCreatePod",
    ),
    "the other pods are made": (
        [warning("FailedCreatePod", 100), normal("SuccessfulCreatePod", 130)],
        "FailedCreatePod",
    ),
    "what is said of the restart is no refusal": (
        [warning("FailedCreatePod", 100), warning("PyTorchJobRestarting", 120)],
        "FailedCreatePod",
    ),
    "services are made like pods": ([warning("FailedCreateService", 9)], "FailedCreateService"),
    "another warning is better than none": (
        [warning("PyTorchJobFailedValidation", 100), normal("PyTorchJobCreated", 100)],
        "PyTorchJobFailedValidation",
    ),
    "what was before says nothing of now": ([warning("FailedCreatePod", -600)], None),
    "nobody warns": ([normal("PyTorchJobResumed", 100)], None),
}


@pytest.mark.parametrize(("said", "told"), REFUSAL.values(), ids=REFUSAL)
def test_why_pods_are_not_made(said: list[Event], told: str | None) -> None:
    for order in itertools.permutations(map(body, said)):
        found = evidence.refusal(order, START)
        assert (found and found.reason) == told


def test_words_about_pods_that_are_there_are_no_refusal() -> None:
    other = body(warning("ContainersNotReady", 200))
    other["message"] = "Error pod run-master-0 condition message: containers with unready status"
    found = evidence.refusal([body(warning("FailedCreatePod", 100)), other], START)
    assert found == Said("FailedCreatePod", "words of FailedCreatePod")


def test_times_are_read_from_wherever_a_recorder_writes_them() -> None:
    series = body(warning("FailedScheduling", 0))
    series |= {
        "lastTimestamp": None,
        "eventTime": "2026-01-02T03:04:05.123456Z",
        "series": {"count": 9, "lastObservedTime": "2026-01-02T04:00:00.000000Z"},
    }
    found = evidence.telling([series, body(warning("FailedMount", 600))])
    assert found is not None
    assert found.reason == "FailedScheduling"
    assert evidence.last_time({"metadata": {"creationTimestamp": text_of(START)}}) == START


def test_combined_events_keep_their_words_only() -> None:
    combined = body(warning("FailedCreatePod", 0))
    combined["message"] = f"{evidence.COMBINED}Error creating: exceeded quota"
    found = evidence.refusal([combined], START)
    assert found == Said("FailedCreatePod", "Error creating: exceeded quota")
