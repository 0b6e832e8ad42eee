"""The Helm chart on a real API server: its life as a release, and what its roles allow."""

from __future__ import annotations

import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import job_samples
import operators_page
from chart_release import ACCOUNT, for_server, installed
from cluster.api import ApiError, wait_for
from cluster.binaries import Binaries
from cluster.control_plane import ControlPlane
from operator_process import QUICK, OperatorProcess

pytestmark = pytest.mark.cluster
DEPLOYMENT = "/apis/apps/v1/namespaces/{0}/deployments/osft-{0}"
CLUSTER_ROLE = "/apis/rbac.authorization.k8s.io/v1/clusterroles/osft-{0}"
CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/osftjobs.osft.dev"


@pytest.fixture
def bare_plane(
    control_plane_binaries: Binaries,
    tmp_path: Path,
    session_mark: str,
    request: pytest.FixtureRequest,
) -> Iterator[ControlPlane]:
    """A server that takes the chart's own CRD; the session's where that cannot be."""
    if control_plane_binaries.joined:
        yield request.getfixturevalue("control_plane")
        return
    own = ControlPlane(control_plane_binaries, tmp_path / "plane", f"{session_mark}/chart")
    try:
        own.start()
        yield own
    finally:
        own.stop()


def exists(plane: ControlPlane, path: str) -> bool:
    """Whether the server has that object."""
    try:
        plane.api.get(path)
    except ApiError as error:
        if error.code != 404:
            raise
        return False
    return True


def allowed(plane: ControlPlane, home: str, namespace: str, verb: str, what: str) -> bool:
    """Whether the operator's account may do that in a namespace, as the server says."""
    group, _, resource = what.rpartition(" ")
    resource, _, part = resource.partition("/")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{home}:{ACCOUNT}",
            "resourceAttributes": {
                "namespace": namespace,
                "verb": verb,
                "group": group,
                "resource": resource,
                "subresource": part,
            },
        },
    }
    answer = plane.api.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


def test_install_upgrade_rollback_uninstall(bare_plane: ControlPlane, tmp_path: Path) -> None:
    plane, home = bare_plane, f"chart-{uuid.uuid4().hex[:8]}"
    plane.create_namespace(home)
    deployment = DEPLOYMENT.format(home)
    crds = {"crds": {"enabled": not plane.binaries.joined}}
    with installed(plane, home, tmp_path / "first", crds) as helm:
        before = plane.api.get(deployment)
        assert before["spec"]["replicas"] == 1
        assert exists(plane, CLUSTER_ROLE.format(home))
        if not plane.binaries.joined:
            assert exists(plane, CRD)

        chart, needed = for_server(plane, tmp_path / "second")
        values: dict[str, Any] = {
            "fullnameOverride": f"osft-{home}",
            "serviceAccount": {"name": ACCOUNT},
            "replicas": 2,
            "networkPolicy": {"enabled": True},
            **crds,
            **needed,
        }
        helm.upgrade(chart, home, values, namespace=home)
        after = plane.api.get(deployment)
        assert after["metadata"]["uid"] == before["metadata"]["uid"], "made anew"
        assert after["spec"]["selector"] == before["spec"]["selector"]
        assert after["spec"]["replicas"] == 2
        assert after["spec"]["strategy"]["type"] == "RollingUpdate"
        policy = f"/apis/networking.k8s.io/v1/namespaces/{home}/networkpolicies/osft-{home}"
        assert exists(plane, policy)

        helm.rollback(home, version=1)
        back = plane.api.get(deployment)
        assert back["spec"]["replicas"] == 1
        assert back["spec"]["strategy"] == {"type": "Recreate"}
        assert not exists(plane, policy)

    assert not exists(plane, deployment)
    assert not exists(plane, CLUSTER_ROLE.format(home))
    if not plane.binaries.joined:
        assert exists(plane, CRD), "uninstalling the operator deleted every OSFTJob"
    plane.delete_namespace(home)


class Running:
    """An OSFTJob whose PyTorchJob runs, and the operator of the installed release."""

    def __init__(self, plane: ControlPlane, home: str, folder: Path, mark: str) -> None:
        self._plane, self._home, self._folder, self._mark = plane, home, folder, mark
        self._operator: OperatorProcess | None = None
        self._jobs = f"/apis/osft.dev/v1alpha1/namespaces/{home}/osftjobs"
        self._pytorch_jobs = f"/apis/kubeflow.org/v1/namespaces/{home}/pytorchjobs"

    def roll_out(self) -> None:
        """What a Deployment's controller does: the old process ends, one of today's starts."""
        if self._operator is not None:
            assert self._operator.stop() == 0
        self._operator = OperatorProcess(self._plane, self._home, self._folder, self._mark)
        self._operator.start()

    def stop(self) -> None:
        assert self._operator is not None
        assert self._operator.stop() == 0

    def metrics(self) -> dict[str, float]:
        """What the operator tells Prometheus, by series."""
        assert self._operator is not None
        port = self._operator.environment["OSFT_METRICS_PORT"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if line[0] != "#"]
        return {name: float(value) for name, _, value in (each.rpartition(" ") for each in lines)}

    def start(self) -> None:
        self._plane.api.post(self._jobs, job_samples.job(name="run"))
        wait_for("the PyTorchJob", lambda: self._plane.api.get(self._pytorch_jobs)["items"])
        running = {"type": "Running", "status": "True", "reason": "R", "message": "m"}
        status = {"status": {"conditions": [running]}}
        self._plane.api.patch(f"{self._pytorch_jobs}/run/status", status)
        wait_for("the uid", lambda: "pyTorchJobUID" in self.job()["status"])

    def job(self) -> dict[str, Any]:
        return self._plane.api.get(f"{self._jobs}/run")

    def pytorch_job(self) -> dict[str, Any]:
        """The whole PyTorchJob: with its resourceVersion, so any write shows."""
        return self._plane.api.get(f"{self._pytorch_jobs}/run")

    def told(self, command: str) -> operators_page.Said:
        """What kubectl says of the PyTorchJob, as it stands on the page."""
        columns = "NAME:.metadata.name,GENERATION:.metadata.generation"
        columns += ",VERSION:.metadata.resourceVersion,RUNNING:.status.conditions[0].status"
        arguments = f"get pytorchjob run -o custom-columns={columns}"
        printed = self._plane.kubectl("-n", self._home, *arguments.split())
        return f"{command} -n team {arguments}", printed

    def decided(self, name: str) -> dict[str, Any]:
        """The PyTorchJob of a further job: this operator has looked at everything by then."""
        self._plane.api.post(self._jobs, job_samples.job(name=name))
        path = f"{self._pytorch_jobs}/{name}"
        wait_for(f"PyTorchJob {name}", lambda: exists(self._plane, path))
        return self._plane.api.get(path)


def _image(pytorch_job: dict[str, Any]) -> str:
    master = pytorch_job["spec"]["pytorchReplicaSpecs"]["Master"]
    image: str = master["template"]["spec"]["containers"][0]["image"]
    return image


@pytest.mark.e2e
def test_running_jobs_notice_nothing_of_the_operators_life(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, session_mark: str
) -> None:
    plane, home = control_plane, namespace
    with installed(plane, home, tmp_path / "first", QUICK) as helm:
        running = Running(plane, home, tmp_path, session_mark)
        running.roll_out()
        running.start()
        before, resolved = running.pytorch_job(), running.job()["status"]["resolved"]
        said = [running.told("kubectl")]

        chart, needed = for_server(plane, tmp_path / "second")
        values: dict[str, Any] = {
            **QUICK,
            "fullnameOverride": f"osft-{home}",
            "serviceAccount": {"name": ACCOUNT},
            "crds": {"enabled": False},
            "replicas": 2,
            "trainer": {"image": {"tag": "newer"}, "runAsUser": 2000},
            "policy": {"images": ["nothing"]},
            **needed,
        }
        helm.upgrade(chart, home, values, namespace=home)
        running.roll_out()
        assert _image(running.decided("after-upgrade")) == "osft-trainer:newer"
        assert running.pytorch_job() == before
        assert running.job()["status"]["resolved"] == resolved
        said.append(running.told("helm upgrade ...; kubectl"))
        told = running.metrics()
        assert told["osftjob_pytorchjobs_created_total"] >= 1
        assert told[f'leader_election_master_status{{name="osft-{home}"}}'] == 1
        assert told["osft_operator_queue_oldest_seconds"] >= 0
        # surveyed when it began, among others the job that ran already
        assert told['osftjob_jobs{phase="Starting"}'] >= 1
        assert "osft_operator_watch_last_event_timestamp_seconds{" in " ".join(told)

        helm.rollback(home, version=1)
        running.roll_out()
        assert _image(running.decided("after-rollback")) == _image(before)
        assert running.pytorch_job() == before
        said.append(running.told("helm rollback ...; kubectl"))
        job = running.job()
        running.stop()
    # uninstalled: no controller of ours is left, and no finalizer waits for one
    assert running.pytorch_job() == before
    assert running.job() == job
    assert "finalizers" not in job["metadata"]
    said.append(running.told("helm uninstall ...; kubectl"))
    operators_page.record("upgrade", *said)


def test_account_may_do_its_work_and_no_more(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    with installed(control_plane, namespace, tmp_path / "chart"):
        for verb, what in [
            ("watch", "osft.dev osftjobs"),
            ("patch", "osft.dev osftjobs/status"),
            ("create", "kubeflow.org pytorchjobs"),
            ("create", " persistentvolumeclaims"),
            ("list", " pods"),
            ("patch", " events"),
        ]:
            assert allowed(control_plane, namespace, "default", verb, what), (verb, what)
        for verb, what in [
            ("get", " secrets"),
            ("list", " secrets"),
            ("create", " pods"),
            ("delete", " pods"),
            ("create", " pods/exec"),
            ("get", " configmaps"),
            ("delete", " persistentvolumeclaims"),
            ("patch", "osft.dev osftjobs"),
            ("update", "osft.dev osftjobs/status"),
            ("deletecollection", "kubeflow.org pytorchjobs"),
            ("list", "apiextensions.k8s.io customresourcedefinitions"),
            ("create", "rbac.authorization.k8s.io rolebindings"),
            ("create", "coordination.k8s.io leases"),
        ]:
            assert not allowed(control_plane, namespace, "default", verb, what), (verb, what)
        assert allowed(control_plane, namespace, namespace, "create", "coordination.k8s.io leases")
        assert not allowed(
            control_plane, namespace, namespace, "list", "coordination.k8s.io leases"
        )


def test_namespaced_operator_stays_in_its_namespaces(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    team = f"{namespace}-team"
    control_plane.create_namespace(team)
    values = {"watch": {"namespaces": [team]}, "rbac": {"userRoles": {"create": False}}}
    with installed(control_plane, namespace, tmp_path / "chart", values):
        assert not exists(control_plane, CLUSTER_ROLE.format(namespace))
        assert allowed(control_plane, namespace, team, "create", "kubeflow.org pytorchjobs")
        assert not allowed(control_plane, namespace, "default", "list", "osft.dev osftjobs")
        assert not allowed(control_plane, namespace, namespace, "list", "osft.dev osftjobs")
    control_plane.delete_namespace(team)


def test_token_of_the_account_lists_jobs_but_no_secrets(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    with installed(control_plane, namespace, tmp_path / "chart"):
        kubeconfig = control_plane.service_account_kubeconfig(namespace, ACCOUNT)
        as_operator = ("--kubeconfig", str(kubeconfig))
        assert "No resources" in control_plane.kubectl(
            *as_operator, "get", "osftjobs.osft.dev", "-n", namespace, check=False
        )
        refusal = control_plane.kubectl(
            *as_operator, "get", "secrets", "-n", namespace, check=False
        )
        assert "forbidden" in refusal
