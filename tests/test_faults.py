"""Faults between the operator and a real API server: afterwards all is as if they had not been.

Each fault lasts some seconds, in which a job is made and another one's attempt fails. Within 30 s
of its end both have what they should have, once. With OSFT_SOAK set the settings are those that are
shipped, and the faults last longer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import urllib3

import job_samples
from cluster.api import ApiError, wait_for
from cluster.control_plane import ControlPlane
from cluster.fault_proxy import FaultProxy, Request, refusal, too_old
from drawn import SOAK
from operator_thread import OperatorThread

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

RECOVERY_SECONDS = 30.0
"""What is promised."""
HOLD_SECONDS = 40.0 if SOAK else 1.0
"""How long a fault lasts."""
SETTINGS: dict[str, Any] = (
    {"lease_duration_seconds": 15, "lease_renew_seconds": 5}
    if SOAK
    else {"watch_check_seconds": 0.5, "api_timeout_seconds": 3}
)


@dataclass
class Scene:
    """A namespace, seen past the proxy."""

    plane: ControlPlane
    namespace: str
    proxy: FaultProxy
    operator: OperatorThread

    def path(self, group: str, plural: str) -> str:
        return f"{group}/namespaces/{self.namespace}/{plural}"

    @property
    def jobs(self) -> str:
        return self.path("/apis/osft.dev/v1alpha1", "osftjobs")

    @property
    def pytorch_jobs(self) -> str:
        return self.path("/apis/kubeflow.org/v1", "pytorchjobs")

    def names(self, path: str) -> set[str]:
        return {each["metadata"]["name"] for each in self.plane.api.get(path)["items"]}

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.plane.api.get(f"{self.jobs}/{name}").get("status") or {}
        return found

    def apply(self, name: str) -> None:
        self.plane.api.post(self.jobs, job_samples.job({"spec.maxRestarts": 9}, name=name))

    def fail(self, pytorch_job: str) -> None:
        """The training-operator says that an attempt has failed."""
        condition = {"type": "Failed", "status": "True", "message": "by the tests"}
        told = {"status": {"conditions": [condition]}}
        self.plane.api.patch(f"{self.pytorch_jobs}/{pytorch_job}/status", told)


@pytest.fixture(scope="module")
def scene(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    namespace = "faults"
    control_plane.create_namespace(namespace)
    folder = tmp_path_factory.mktemp("proxy")
    with (
        pytest.MonkeyPatch.context() as patch,
        FaultProxy(control_plane.kubeconfig, folder) as proxy,
    ):
        patch.setenv("KUBECONFIG", str(proxy.kubeconfig))
        with OperatorThread(namespace, **SETTINGS) as operator:
            yield Scene(control_plane, namespace, proxy, operator)
    control_plane.delete_namespace(namespace)


def answering(code: int, reason: str, retry_after: int | None = None) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        scene.proxy.faults.answer = lambda _: refusal(code, reason, retry_after=retry_after)
        scene.proxy.drop()

    return fault


def only_writes(code: int, reason: str) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        def answer(request: Request) -> bytes | None:
            return refusal(code, reason) if request.is_write else None

        scene.proxy.faults.answer = answer

    return fault


def delayed(scene: Scene) -> None:
    scene.proxy.faults.delay_seconds = 0.7


def cut_off(scene: Scene) -> None:
    scene.proxy.faults.closed = True
    scene.proxy.drop()


def expired_versions(scene: Scene) -> None:
    def answer(request: Request) -> bytes | None:
        return too_old() if "watch=true" in request.path else None

    scene.proxy.faults.answer = answer
    scene.proxy.drop()


def silent_watches(scene: Scene) -> None:
    scene.proxy.faults.silent_watches = True
    scene.proxy.drop()


FAULTS: dict[str, Callable[[Scene], None]] = {
    "dropped": lambda scene: scene.proxy.drop(),
    "cut off": cut_off,
    "delayed": delayed,
    "half-open": lambda scene: scene.proxy.freeze(),
    "half-open watches": lambda scene: scene.proxy.freeze_watches(),
    "silent watches": silent_watches,
    "410": expired_versions,
    "403": answering(403, "Forbidden"),
    "403 to writes": only_writes(403, "Forbidden"),
    "429": answering(429, "TooManyRequests", retry_after=1),
    "500": answering(500, "InternalError"),
    "503 to writes": only_writes(503, "ServiceUnavailable"),
    "expired token": answering(401, "Unauthorized"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_after_a_fault_all_is_as_it_should_be(
    name: str,
    scene: Scene,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    new, old = (f"{kind}-{list(FAULTS).index(name)}" for kind in ("new", "old"))
    scene.apply(old)
    wait_for("the first attempt", lambda: old in scene.names(scene.pytorch_jobs))
    FAULTS[name](scene)
    scene.apply(new)
    scene.fail(old)
    time.sleep(HOLD_SECONDS)
    scene.proxy.heal()
    began = time.monotonic()
    wait_for(
        f"recovery; ends: {scene.operator.ends}",
        lambda: (
            scene.status(new).get("phase") == "Starting"
            and scene.status(old).get("attempt") == 2
            and {new, f"{old}-a2"} <= set(scene.names(scene.pytorch_jobs))
        ),
        timeout_seconds=RECOVERY_SECONDS,
    )
    recovery_seconds = time.monotonic() - began
    record_property("fault_seconds", HOLD_SECONDS)
    record_property("recovery_seconds", recovery_seconds)
    print(f"{name}: recovered after {recovery_seconds:.1f} s")
    made = {each for each in scene.names(scene.pytorch_jobs) if each.startswith((new, old))}
    assert made == {new, f"{old}-a2"}
    claims = scene.names(scene.path("/api/v1", "persistentvolumeclaims"))
    assert {f"{new}-checkpoints", f"{old}-checkpoints"} <= claims
    assert scene.status(old)["restarts"] == 1
    assert [each for each in caplog.records if "A bug" in each.getMessage()] == []
    assert scene.operator.problems() == []


def restarted(scene: Scene) -> None:
    scene.plane.restart_servers()


def without_etcd(scene: Scene) -> None:
    scene.plane.pause_etcd(True)
    time.sleep(HOLD_SECONDS)
    scene.plane.pause_etcd(False)


@pytest.mark.skipif(not SOAK, reason="the other tests of the control plane would wait for it")
@pytest.mark.parametrize("outage", [restarted, without_etcd])
def test_after_an_outage_of_the_server_itself(
    outage: Callable[[Scene], None],
    scene: Scene,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    old, new = (f"{kind}-{outage.__name__.replace('_', '-')}" for kind in ("old", "new"))
    scene.apply(old)
    wait_for("the first attempt", lambda: scene.status(old).get("pyTorchJobUID"))
    uid = scene.status(old)["pyTorchJobUID"]
    outage(scene)
    began = time.monotonic()
    wait_for("a server that takes jobs", lambda: _applied(scene, new), timeout_seconds=60)
    wait_for(
        f"recovery; ends: {scene.operator.ends}",
        lambda: (
            scene.status(new).get("phase") == "Starting" and new in scene.names(scene.pytorch_jobs)
        ),
        timeout_seconds=RECOVERY_SECONDS,
    )
    recovery_seconds = time.monotonic() - began
    record_property("recovery_seconds", recovery_seconds)
    print(f"{outage.__name__}: recovered after {recovery_seconds:.1f} s")
    assert scene.status(old)["pyTorchJobUID"] == uid
    assert scene.status(old).get("restarts") == 0
    assert [each for each in caplog.records if "A bug" in each.getMessage()] == []


def _applied(scene: Scene, name: str) -> bool:
    try:
        scene.apply(name)
    except (ApiError, urllib3.exceptions.HTTPError) as error:
        return isinstance(error, ApiError) and error.code == 409
    return True


def test_a_write_that_fails_again_and_again_is_told_in_the_servers_words(scene: Scene) -> None:
    """The PyTorchJobs' webhook is away, or that of claims: what is asked for is not what is."""
    scene.apply("asked-to-stop")
    wait_for("the PyTorchJob", lambda: "asked-to-stop" in scene.names(scene.pytorch_jobs))

    def answer(request: Request) -> bytes | None:
        about = "/pytorchjobs" in request.path or "/persistentvolumeclaims" in request.path
        return refusal(500, "InternalError") if request.is_write and about else None

    def has_words(name: str, kind: str, lead: str) -> bool:
        status = scene.status(name)
        found = [each for each in status.get("conditions") or [] if each["type"] == kind]
        words = found[0]["message"] if found else ""
        if "InternalError by the tests" not in words:
            return False
        assert words.startswith(lead)
        assert found[0]["status"] == "False"
        assert status["waitingFor"]["name"] in lead
        return True

    scene.proxy.faults.answer = answer
    try:
        scene.plane.api.patch(f"{scene.jobs}/asked-to-stop", {"spec": {"suspend": True}})
        scene.apply("asked-to-begin")
        for name, kind, lead in (
            ("asked-to-stop", "Suspended", "PyTorchJob asked-to-stop could not be suspended"),
            ("asked-to-begin", "Running", "PersistentVolumeClaim asked-to-begin-checkpoints could"),
        ):
            wait_for(f"words of {name}", partial(has_words, name, kind, lead))
        assert scene.status("asked-to-stop")["phase"] == "Suspending"
        assert scene.status("asked-to-begin")["reason"] == "WriteFailed"
    finally:
        scene.proxy.heal()
    wait_for("suspended", lambda: scene.status("asked-to-stop").get("phase") == "Suspended")
    wait_for("made", lambda: "asked-to-begin" in scene.names(scene.pytorch_jobs))
    wait_for("no words left", lambda: "InternalError" not in str(scene.status("asked-to-begin")))


def test_liveness_fails_when_the_watches_stay_silent(scene: Scene) -> None:
    """What they do not tell is found by other means; the process is restarted nevertheless."""
    health = scene.operator.service._health  # type: ignore[union-attr]
    silent_watches(scene)
    try:
        scene.apply("unheard")
        wait_for("the PyTorchJob", lambda: "unheard" in scene.names(scene.pytorch_jobs))
        wait_for("a verdict", lambda: health._behind > 0)
        behind = scene.operator.settings.watch_stall_seconds
        assert behind + 20 + 10 < 120, "with the shipped settings: within two minutes"
        health._behind += behind
        assert "behind the API server" in health.problems()[0]
    finally:
        scene.proxy.heal()
        scene.proxy.drop()
    wait_for("watches that tell again", lambda: scene.operator.problems() == [])


@pytest.fixture(autouse=True)
def _quiet_kopf() -> Iterator[None]:
    """What kopf says of broken connections is expected here."""
    before = logging.getLogger("kopf").level
    logging.getLogger("kopf").setLevel(logging.CRITICAL)
    yield
    logging.getLogger("kopf").setLevel(before)


def test_the_proxy_changes_nothing_by_itself(scene: Scene, tmp_path: Path) -> None:
    methods = {request.method for request in scene.proxy.requests}
    assert {"GET", "POST", "PATCH", "PUT"} <= methods
