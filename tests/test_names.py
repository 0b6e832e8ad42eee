"""Names that are derived from a job's: no two jobs stand in each other's way, whatever their names.

`x-a2` is the PyTorchJob of job `x-a2`, and would be that of job `x` at its second attempt.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import examples
from job_samples import Object
from osft_operator import names
from osft_operator.render import pytorch_job
from osft_operator.resolved import resolve
from osft_operator.spec import OSFTJob
from world import World

ATTEMPTS = range(1, 5)
SUFFIXES = ("", "-a2", "-a3", "-a2-a2", "-a10", "-master-0", "-worker-0", "-checkpoints", "-a")
NAMES = st.builds(
    lambda name, suffix: f"{name}{suffix}",
    st.sampled_from(["x", "a", "a-a2", "x-a2"])
    | st.from_regex(r"[a-z][a-z0-9]{0,3}", fullmatch=True),
    st.sampled_from(SUFFIXES),
)


def children(pytorch_job_name: str) -> set[str]:
    """Pods and services that the training-operator makes for it."""
    return {f"{pytorch_job_name}-{kind}-{n}" for kind in ("master", "worker") for n in range(12)}


@settings(max_examples=examples(30))
@given(NAMES, NAMES)
def test_only_the_names_of_attempts_can_meet(one: str, other: str) -> None:
    if one == other:
        return
    assert names.claim_name(one) != names.claim_name(other)
    for first in ATTEMPTS:
        for second in ATTEMPTS:
            made = names.attempt_name(one, first), names.attempt_name(other, second)
            assert made[0] == made[1] or not children(made[0]) & children(made[1])


class Neighbours:
    """Two OSFTJobs of one namespace, and the PyTorchJobs of both."""

    def __init__(self, one: str, other: str) -> None:
        self.jobs: dict[str, Object] = {}
        self.worlds = [self._world(name, number) for number, name in enumerate((one, other))]
        self.owners: dict[str, str] = {}

    def _world(self, name: str, number: int) -> World:
        world = World({"spec.maxRestarts": 99}, name=name)
        world.body["metadata"]["uid"] = f"uid-{number}"
        world.jobs = self.jobs
        world.made = 1000 * number
        return world

    def settle(self, world: World) -> None:
        """What one does must leave what is the other's as it is."""
        uid = world.body["metadata"]["uid"]
        before = {name: job for name, job in self.jobs.items() if owner(job) != uid}
        world.settle()
        assert {name: job for name, job in self.jobs.items() if owner(job) != uid} == before
        made = [job for job in self.jobs.values() if owner(job) == uid]
        assert [job["metadata"]["name"] for job in made] == [world.status["pyTorchJobName"]]


def owner(job: Object) -> str:
    return str(job["metadata"]["ownerReferences"][0]["uid"])


@pytest.mark.parametrize("seed", range(examples(6)))
def test_two_jobs_whose_names_meet_get_all_their_attempts(seed: int) -> None:
    chance = random.Random(seed)
    one = chance.choice(["x", "x-a2", "a-a2-a2"])
    other = names.attempt_name(one, chance.randint(2, 4))
    neighbours = Neighbours(one, other)
    order = chance.sample(neighbours.worlds, 2)
    for _ in range(4):
        for world in order if chance.random() < 0.7 else order[:1]:
            before = world.status.get("attempt", 0)
            if before:
                world.tell(world.status["pyTorchJobName"], "Failed")
                world.settle()
                world.wait(10_000)
            neighbours.settle(world)
            assert world.status["attempt"] > before
    for world in order:
        assert "NameTaken" not in world.events
        assert world.status.get("restarts", 0) < 4


def test_a_name_that_is_taken_after_it_was_recorded_is_passed_by() -> None:
    neighbours = Neighbours("x", "x-a2")
    first, second = neighbours.worlds
    neighbours.settle(first)
    first.tell("x", "Failed")
    first.step()
    assert (first.status["attempt"], first.status["pyTorchJobName"]) == (2, "x-a2")
    due = first.status.get("nextAttemptTime")
    neighbours.settle(second)
    first.settle()
    assert (first.status["attempt"], first.status["pyTorchJobName"]) == (3, "x-a3")
    assert first.status.get("nextAttemptTime") == due, "it waits no less"
    first.wait(10_000)
    neighbours.settle(first)
    assert first.status["restarts"] == 1, "a number is no restart"
    neighbours.settle(second)


def test_a_first_attempt_of_a_free_name_is_called_as_its_job() -> None:
    world = World({}, name="x-a2")
    world.settle()
    assert list(world.jobs) == ["x-a2"]
    assert world.status["attempt"] == 1
    job = OSFTJob.model_validate(world.body)
    made = pytorch_job(job, resolve(job, world.settings))
    assert made["metadata"]["name"] == "x-a2"


def of_a_job(job: str, **metadata: Any) -> Object:
    reference = {"controller": True, "uid": "uid-9", "kind": "OSFTJob", "name": job}
    return {"metadata": {"ownerReferences": [reference], **metadata}, "spec": {}}


ANOTHERS = {
    "its owner": of_a_job("other"),
    "its label": {"metadata": {"labels": {names.JOB_LABEL: "other"}}, "spec": {}},
}


@pytest.mark.parametrize("body", ANOTHERS.values(), ids=ANOTHERS)
def test_nobody_is_told_to_delete_what_another_job_needs(body: Object) -> None:
    world = World()
    world.claim = {**body, "metadata": {**body["metadata"], "name": "sample-checkpoints"}}
    world.settle()
    claim = world.condition("Running")
    assert claim["reason"] == "ClaimTaken"
    assert "belongs to OSFTJob other" in claim["message"]
    assert "delete" not in claim["message"]
    world = World()
    world.jobs["sample"] = {**body, "metadata": {**body["metadata"], "name": "sample", "uid": "9"}}
    world.settle()
    assert list(world.jobs) == ["sample", "sample-a2"]
    assert world.jobs["sample"]["metadata"]["uid"] == "9"


def test_a_claim_that_goes_with_an_earlier_job_of_this_name_is_waited_for() -> None:
    world = World()
    world.claim = of_a_job("sample", name="sample-checkpoints")
    world.settle()
    condition = world.condition("Running")
    assert condition["reason"] == "ClaimTerminating"
    assert "delete it" not in condition["message"]
    world.claim = None
    world.settle()
    assert list(world.jobs) == ["sample"]
