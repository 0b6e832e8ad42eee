"""A small world of plain objects in which decisions are carried out, for the tests of decide.

No stand-in for the API: it only keeps what was made, as the caches of the operator would show it.
"""

from __future__ import annotations

import copy
import datetime
from typing import Any

import kstatus
from job_samples import Object, job
from osft_operator.decide import (
    CreateClaim,
    CreatePyTorchJob,
    Decision,
    DeleteOSFTJob,
    DeletePyTorchJob,
    SuspendPyTorchJob,
    decide,
)
from osft_operator.observed import Observed, Said, text_of
from osft_operator.resolved import RenderSettings
from osft_trainer.report import Progress, Termination

SETTINGS = RenderSettings(trainer_image="trainer:1")
START = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


class World:
    """One OSFTJob and what was made for it."""

    def __init__(self, changes: dict[str, Any] | None = None, **metadata: Any) -> None:
        self.settings = SETTINGS
        self.body = job(changes, uid="uid-1", namespace="ns", generation=1, **metadata)
        self.now = START
        self.jobs: dict[str, Object] = {}
        self.pods: list[Object] = []
        self.neighbours: list[Object] = []
        self.claim: Object | None = None
        self.kind_present = True
        self.progress: Progress | None = None
        self.since: datetime.datetime | None = None
        self.refusal: Said | None = None
        self.news: dict[str, Said] = {}
        self.workload: Object | None = None
        self.listening = float("inf")
        self.made = 0
        self.events: list[str] = []
        self.gone = False
        self.lingers = False
        """Whether pods that are deleted save first, until `pods_end`; and PyTorchJobs with them."""

    @property
    def status(self) -> Object:
        return self.body.get("status", {})

    def observed(self) -> Observed:
        return Observed(
            body=copy.deepcopy(self.body),
            settings=self.settings,
            pytorch_jobs=tuple(copy.deepcopy(list(self.jobs.values()))),
            pods=tuple(copy.deepcopy(self.pods)),
            neighbours=tuple(self.neighbours),
            claim=copy.deepcopy(self.claim),
            progress=self.progress,
            progress_since=self.since if self.progress else None,
            pytorch_job_kind_present=self.kind_present,
            refusal=self.refusal,
            news=self.news,
            workload=self.workload,
            listening_seconds=self.listening,
        )

    def step(self, *, act: bool = True, record: bool = True) -> Decision:
        """One pass; a crash is a pass that acts and does not record, or does neither."""
        decision = decide(self.observed(), self.now)
        explains_its_wait(decision, self.now)
        if act:
            for action in decision.actions:
                self._do(action)
        if record:
            self.body["status"] = copy.deepcopy(decision.status)
            self._check_readiness()
            self.events += [event.reason for event in decision.events]
        return decision

    def _check_readiness(self) -> None:
        """Tools that know nothing of OSFTJobs conclude what the phase says."""
        phase, seen = self.status["phase"], kstatus.of(self.body)
        if phase in ("Succeeded", "Failed"):
            assert seen == {"Succeeded": "Current", "Failed": "Failed"}[phase], self.status
        else:
            assert seen != "Current", self.status

    def settle(self) -> Decision:
        """Passes until one changes nothing."""
        for _ in range(12):
            before = copy.deepcopy((self.status, self.made, self.jobs, self.pods))
            decision = self.step()
            if before == (self.status, self.made, self.jobs, self.pods):
                return decision
        raise AssertionError(f"no end of changes: {self.status}")

    def wait(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)

    def edit(self, **spec: Any) -> None:
        self.body["spec"].update(spec)
        self.body["metadata"]["generation"] += 1

    def condition(self, kind: str) -> Object:
        return next(each for each in self.status["conditions"] if each["type"] == kind)

    def run_pods(self, name: str = "sample", count: int = 1) -> None:
        """All pods of a PyTorchJob run."""
        self.pods = [self._pod(name, index) for index in range(count)]

    def replace_pod(self, index: int = 0, name: str = "sample") -> None:
        """A pod was lost, and the training-operator has made it again."""
        self.pods[index] = self._pod(name, index)

    def end(self, code: int, message: str = "", *, index: int = 0, **terminated: Any) -> None:
        """The trainer's container of a pod ends, and is started again by the kubelet."""
        status = self.pods[index]["status"]["containerStatuses"][0]
        ended = {"exitCode": code, "reason": "Error", "message": message}
        ended |= {"finishedAt": text_of(self.now), **terminated}
        status["lastState"] = {"terminated": ended}
        status["restartCount"] += 1

    def delete_pods(self, name: str, grace_seconds: int = 600) -> None:
        """The pods of a PyTorchJob are told to end."""
        if not self.lingers:
            self.pods = []
        until = text_of(self.now + datetime.timedelta(seconds=grace_seconds))
        for pod in self.pods:
            if pod["metadata"]["ownerReferences"][0]["name"] == name:
                pod["metadata"].setdefault("deletionTimestamp", until)
                pod["metadata"].setdefault("deletionGracePeriodSeconds", grace_seconds)

    def pods_end(self) -> None:
        """Pods that were told to end have ended, and the PyTorchJobs that waited for them."""
        self.pods = [pod for pod in self.pods if "deletionTimestamp" not in pod["metadata"]]
        left = {pod["metadata"]["ownerReferences"][0]["name"] for pod in self.pods}
        self.jobs = {
            name: job
            for name, job in self.jobs.items()
            if "deletionTimestamp" not in job["metadata"] or name in left
        }

    def tell(self, name: str, condition: str, message: str = "") -> None:
        """The training-operator says something about a PyTorchJob."""
        status = self.jobs[name].setdefault("status", {})
        entry = {"type": condition, "status": "True", "message": message}
        status.setdefault("conditions", []).append(entry)

    def _pod(self, name: str, index: int) -> Object:
        job_uid = self.jobs[name]["metadata"]["uid"]
        masters = int("Master" in self.jobs[name]["spec"]["pytorchReplicaSpecs"])
        kind, number = ("master", 0) if index < masters else ("worker", index - masters)
        return {
            "metadata": {
                "name": f"{name}-{kind}-{number}",
                "labels": {
                    "osft.dev/job": "sample",
                    "osft.dev/attempt": name.partition("-a")[2] or "1",
                    "training.kubeflow.org/replica-type": kind,
                    "training.kubeflow.org/replica-index": str(number),
                },
                "uid": f"{name}-{index}-{text_of(self.now)}",
                "creationTimestamp": text_of(self.now),
                "ownerReferences": [
                    {"controller": True, "kind": "PyTorchJob", "name": name, "uid": job_uid}
                ],
            },
            "spec": {"nodeName": "node-1"},
            "status": {
                "phase": "Running",
                "podIP": f"10.0.0.{index + 1}",
                "containerStatuses": [
                    {"name": "pytorch", "restartCount": 0, "state": {"running": {}}}
                ],
            },
        }

    def _do(self, action: Any) -> None:
        match action:
            case CreateClaim(manifest):
                assert self.claim is None
                self.claim = copy.deepcopy(manifest)
            case CreatePyTorchJob(manifest):
                name = manifest["metadata"]["name"]
                if name in self.jobs:
                    return  # AlreadyExists
                self.made += 1
                made = copy.deepcopy(manifest)
                made["metadata"]["uid"] = f"job-{self.made}"
                made["metadata"]["creationTimestamp"] = text_of(self.now)
                self.jobs[name] = made
            case SuspendPyTorchJob(name, uid, suspend):
                assert self.jobs[name]["metadata"]["uid"] == uid
                self.jobs[name]["spec"]["runPolicy"]["suspend"] = suspend
                if suspend:
                    self.delete_pods(name)
            case DeletePyTorchJob(name, uid):
                assert self.jobs[name]["metadata"]["uid"] == uid
                self.delete_pods(name)
                if self.lingers and self.pods:
                    self.jobs[name]["metadata"]["deletionTimestamp"] = text_of(self.now)
                else:
                    del self.jobs[name]
            case DeleteOSFTJob(uid):
                assert uid == "uid-1"
                self.gone = True


def explains_its_wait(decision: Decision, now: datetime.datetime) -> None:
    """Whatever a job waits for: a reason, the object, and since when."""
    status = decision.status
    if status.get("phase") in (None, "Running", "Succeeded", "Failed"):
        return
    assert status["reason"], status
    waits = status.get("waitingFor")
    assert waits, f"{status['phase']} {status['reason']} waits for nothing"
    assert waits["kind"]
    assert waits["name"]
    assert waits["since"] <= text_of(now)


def running(changes: dict[str, object] | None = None, count: int = 1, **metadata: object) -> World:
    """A job whose pods, `count` of them, all run."""
    world = World({"spec.nnodes": count, **(changes or {})}, **metadata)
    world.settle()
    world.run_pods(count=count)
    world.settle()
    return world


def told(world: World, step: int, **changes: object) -> None:
    """Rank 0 answers."""
    attempt = world.status["attempt"]
    world.progress = Progress.model_validate(
        {"run_id": "uid-1", "step": step, "total_steps": 1000, "attempt": attempt, **changes}
    )


def last_words(reason: str, code: int, message: str, progress: Progress | None = None) -> str:
    """What a trainer writes to its termination log."""
    return Termination(reason=reason, exit_code=code, message=message, progress=progress).to_json()
