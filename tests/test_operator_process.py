"""The operator as a process of its own, with the chart's rights, against a real API server.

No node and no training-operator here: what is proven is that objects come once, whatever kills the
operator, and that what cannot be done is said.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bare_plane
import job_samples
import operator_process
from cluster.api import wait_for
from cluster.binaries import Binaries
from cluster.control_plane import ControlPlane
from cluster.fixtures import pytorchjob_crd
from operator_process import OperatorProcess
from osft_operator.names import JOB_LABEL, REPLICA_INDEX_LABEL, REPLICA_TYPE_LABEL
from osft_operator.observed import time_of

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]


@pytest.fixture
def operator(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, session_mark: str
) -> Iterator[OperatorProcess]:
    """An operator at work in the test's namespace."""
    with operator_process.running(
        control_plane, namespace, tmp_path, session_mark, operator_process.QUICK
    ) as process:
        yield process
        assert '"severity": "error"' not in process.log(), process.log()[-5000:]


class Scene:
    """What stands in a namespace."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane = plane
        self.namespace = namespace

    def path(self, group: str, plural: str) -> str:
        return f"{group}/namespaces/{self.namespace}/{plural}"

    @property
    def jobs(self) -> str:
        return self.path("/apis/osft.dev/v1alpha1", "osftjobs")

    @property
    def pytorch_jobs(self) -> str:
        return self.path("/apis/kubeflow.org/v1", "pytorchjobs")

    def uids(self, path: str) -> dict[str, str]:
        items = self.plane.api.get(path)["items"]
        return {item["metadata"]["name"]: item["metadata"]["uid"] for item in items}

    def children(self) -> dict[str, str]:
        return self.uids(self.pytorch_jobs) | self.uids(
            self.path("/api/v1", "persistentvolumeclaims")
        )

    def apply(self, body: dict[str, Any]) -> None:
        self.plane.api.post(self.jobs, body)

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.plane.api.get(f"{self.jobs}/{name}").get("status") or {}
        return found

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        conditions = self.status(name).get("conditions") or []
        return next((each for each in conditions if each["type"] == kind), {})

    def until(self, name: str, kind: str, value: str, reason: str) -> dict[str, Any]:
        """Wait for a condition."""

        def reached() -> dict[str, Any] | None:
            found = self.condition(name, kind)
            return found if (found.get("status"), found.get("reason")) == (value, reason) else None

        found: dict[str, Any] = wait_for(f"{kind}={value} {reason} of {name}", reached)
        return found

    def events(self, name: str) -> list[tuple[str, int]]:
        items = self.plane.api.get(self.path("/api/v1", "events"))["items"]
        return [
            (item["reason"], item["count"])
            for item in items
            if item["involvedObject"]["name"] == name
        ]


@pytest.fixture
def scene(control_plane: ControlPlane, namespace: str) -> Scene:
    """The test's namespace."""
    return Scene(control_plane, namespace)


def test_objects_come_once_and_stay_when_the_operator_is_killed(
    operator: OperatorProcess, scene: Scene
) -> None:
    scene.apply(job_samples.job(name="run"))
    wait_for("the PyTorchJob", lambda: scene.uids(scene.pytorch_jobs))
    wait_for("the status", lambda: scene.status("run").get("pyTorchJobName"))
    made = scene.children()
    assert set(made) == {"run", "run-checkpoints"}
    (pytorch_job,) = scene.plane.api.get(scene.pytorch_jobs)["items"]
    (owner,) = pytorch_job["metadata"]["ownerReferences"]
    assert owner["uid"] == scene.uids(scene.jobs)["run"]
    operator.kill()
    operator.start()
    scene.apply(job_samples.job(name="second"))
    wait_for("the second PyTorchJob", lambda: "second" in scene.uids(scene.pytorch_jobs))
    assert made.items() <= scene.children().items()
    assert set(scene.children()) == {"run", "run-checkpoints", "second", "second-checkpoints"}


def test_killed_at_any_time_nothing_is_made_twice_and_nothing_is_lost(
    operator: OperatorProcess, scene: Scene
) -> None:
    chance = random.Random(7)
    names = [f"run-{number}" for number in range(12)]
    for name in names:
        scene.apply(job_samples.job(name=name))
        if chance.random() < 0.4:
            # At any moment, so also between two writes for one job.
            time.sleep(chance.random() * 0.2)
            operator.kill()
            operator.start()
    wait_for("all PyTorchJobs", lambda: set(scene.uids(scene.pytorch_jobs)) == set(names))
    wait_for(
        "all statuses", lambda: all(scene.status(name).get("pyTorchJobName") for name in names)
    )
    expected = {*names, *(f"{name}-checkpoints" for name in names)}
    assert set(scene.children()) == expected


def test_nothing_is_written_when_nothing_changes(operator: OperatorProcess, scene: Scene) -> None:
    scene.apply(job_samples.job(name="run"))
    wait_for("the whole status", lambda: "pyTorchJobUID" in scene.status("run"))
    time.sleep(1)
    before = scene.plane.api.get(f"{scene.jobs}/run")["metadata"]["resourceVersion"]
    operator.kill()
    operator.start()
    time.sleep(2)
    metadata = scene.plane.api.get(f"{scene.jobs}/run")["metadata"]
    assert metadata["resourceVersion"] == before
    assert "finalizers" not in metadata
    assert "annotations" not in metadata


def test_a_name_that_is_taken_is_said_and_left_alone(
    operator: OperatorProcess, scene: Scene
) -> None:
    foreign = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "run"},
        "spec": {"pytorchReplicaSpecs": {}},
    }
    scene.plane.api.post(scene.pytorch_jobs, foreign)
    uid = scene.uids(scene.pytorch_jobs)["run"]
    scene.apply(job_samples.job(name="run"))

    def said() -> bool:
        conditions = scene.status("run").get("conditions") or []
        return any(
            "run" in each.get("message", "")
            and each["status"] == "False"
            and "PyTorchJob" in each["message"]
            for each in conditions
        )

    wait_for("a condition that names the owner of the name", said)
    assert scene.uids(scene.pytorch_jobs) == {"run": uid}


LATE_SECONDS = 5.0
"""What is due at a time is done so soon after it."""


def test_a_deadline_a_time_to_live_and_a_stall_are_kept_on_time(
    operator: OperatorProcess, scene: Scene, record_property: Callable[[str, object], None]
) -> None:
    """In one test: a stall takes a minute, the shortest that can be asked for."""
    scene.apply(job_samples.job({"spec.stall": {"timeoutSeconds": 60}}, name="still"))
    wait_for("the PyTorchJob", lambda: scene.status("still").get("pyTorchJobUID"))
    _run_pod(scene, "still")
    wait_for("the run", lambda: scene.status("still").get("phase") == "Running")
    began = time_of(scene.condition("still", "Running")["lastTransitionTime"]).timestamp()

    limits = {"spec.activeDeadlineSeconds": 8, "spec.ttlSecondsAfterFinished": 6}
    scene.apply(job_samples.job(limits, name="short"))
    wait_for("the deadline", lambda: scene.status("short").get("completionTime"))
    status = scene.status("short")
    assert status["reason"] == "DeadlineExceeded"
    ended = time_of(status["completionTime"]).timestamp()
    deadline_late = ended - time_of(status["startTime"]).timestamp() - 8
    wait_for("its deletion", lambda: "short" not in scene.uids(scene.jobs))
    deletion_late = time.time() - ended - 6

    wait_for(
        "the stall",
        lambda: scene.condition("still", "Stalled")["status"] == "True",
        timeout_seconds=90,
    )
    noticed = time_of(scene.condition("still", "Stalled")["lastTransitionTime"]).timestamp()
    stall_late = noticed - began - 60
    record_property("deadline_late_seconds", deadline_late)
    record_property("deletion_late_seconds", deletion_late)
    record_property("stall_late_seconds", stall_late)
    print(
        f"late: deadline {deadline_late:.1f} s, deletion {deletion_late:.1f} s, "
        f"stall {stall_late:.1f} s"
    )
    assert 0 <= deadline_late < LATE_SECONDS
    assert -1 <= deletion_late < LATE_SECONDS  # times in a status are whole seconds
    assert 0 <= stall_late < LATE_SECONDS


def _run_pod(scene: Scene, job: str) -> None:
    """A pod as the training-operator makes it, that runs and does not answer."""
    pods = scene.path("/api/v1", "pods")
    owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": job}
    owner |= {"uid": scene.status(job)["pyTorchJobUID"], "controller": True}
    name = f"{job}-master-0"
    labels = {JOB_LABEL: job, REPLICA_TYPE_LABEL: "master", REPLICA_INDEX_LABEL: "0"}
    metadata = {"name": name, "labels": labels, "ownerReferences": [owner]}
    spec = {"containers": [{"name": "pytorch", "image": "trainer:1"}]}
    scene.plane.api.post(
        pods, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    )
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    container = {"name": "pytorch", "image": "trainer:1", "imageID": "", "ready": True}
    container |= {"restartCount": 0, "state": state}
    status = {"phase": "Running", "podIP": "127.0.0.1", "containerStatuses": [container]}
    scene.plane.api.patch(f"{pods}/{name}/status", {"status": status})


def test_a_retained_claim_is_taken_again(operator: OperatorProcess, scene: Scene) -> None:
    scene.apply(job_samples.job(name="run"))
    wait_for("the PyTorchJob", lambda: scene.uids(scene.pytorch_jobs))
    claims = scene.path("/api/v1", "persistentvolumeclaims")
    first_claim, first_job = scene.uids(claims), scene.uids(scene.pytorch_jobs)
    scene.plane.api.delete(f"{scene.jobs}/run")
    wait_for("the PyTorchJob's end", lambda: not scene.uids(scene.pytorch_jobs))
    assert scene.uids(claims) == first_claim
    scene.apply(job_samples.job(name="run"))
    wait_for("the next PyTorchJob", lambda: scene.uids(scene.pytorch_jobs))
    assert scene.uids(claims) == first_claim
    assert scene.uids(scene.pytorch_jobs) != first_job


def test_sigterm_ends_it_at_once_and_frees_the_lease(
    operator: OperatorProcess, scene: Scene
) -> None:
    wait_for("the leader", lambda: "This replica is the leader" in operator.log())
    assert operator.stop() == 0
    (lease,) = scene.plane.api.get(scene.path("/apis/coordination.k8s.io/v1", "leases"))["items"]
    assert not lease["spec"].get("holderIdentity")


def test_without_pytorchjobs_it_says_so_and_goes_on_when_they_come(
    control_plane_binaries: Binaries,
    session_mark: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder, namespace = tmp_path_factory.mktemp("plane"), bare_plane.NAMESPACE
    with (
        bare_plane.running(control_plane_binaries, folder, session_mark) as plane,
        operator_process.running(
            plane, namespace, tmp_path, session_mark, operator_process.QUICK
        ) as operator,
    ):
        scene = Scene(plane, namespace)
        scene.apply(job_samples.job(name="run"))
        told = scene.until("run", "Running", "False", "PyTorchJobKindMissing")
        assert "training-operator" in told["message"]
        plane.install_crd(pytorchjob_crd())
        wait_for("the PyTorchJob", lambda: scene.uids(scene.pytorch_jobs))
        assert operator.log().count('"Serving"') == 1, "it ended and was started anew"
        assert '"severity": "error"' not in operator.log(), operator.log()


def test_two_replicas_make_everything_once_and_the_second_takes_over(
    operator: OperatorProcess,
    scene: Scene,
    control_plane: ControlPlane,
    tmp_path_factory: pytest.TempPathFactory,
    session_mark: str,
) -> None:
    folder = tmp_path_factory.mktemp("second")
    second = OperatorProcess(control_plane, scene.namespace, folder, session_mark)
    second.environment["OSFT_INSTANCE_NAME"] = "operator-1"
    wait_for("the leader", lambda: "This replica is the leader" in operator.log())
    second.start()
    scene.apply(job_samples.job(name="run"))
    wait_for("the PyTorchJob", lambda: scene.uids(scene.pytorch_jobs))
    assert "This replica is the leader" not in second.log()
    operator.kill()
    scene.apply(job_samples.job(name="next"))
    wait_for("the second's work", lambda: "next" in scene.uids(scene.pytorch_jobs))
    expected = {"run", "run-checkpoints", "next", "next-checkpoints"}
    wait_for("the claim", lambda: set(scene.children()) == expected)
    assert second.stop() == 0
