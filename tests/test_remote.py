"""`osft watch` and `osft logs` on a cluster: what they show, which pod they read."""

from __future__ import annotations

import copy
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import job_samples
from cluster.api import wait_for
from cluster.fault_proxy import FaultProxy, Request, refusal
from cluster.fixtures import Cluster
from osft_operator import cli, remote_commands
from osft_operator.remote_view import NoPod, line, rank_zero_pod, view
from test_kubelet import pod

RUNNING: dict[str, Any] = {
    "metadata": {"name": "tone", "namespace": "team"},
    "status": {
        "phase": "Running",
        "reason": "PodsRunning",
        "attempt": 2,
        "restarts": 1,
        "pyTorchJobName": "tone-a2",
        "progress": {
            "summary": "42% 840/2000",
            "progressPercentage": 42,
            "step": 840,
            "epoch": 0.84,
            "loss": 1.235,
            "tokensPerSecond": 12300.0,
            "eta": "3h25m",
            "attempt": 2,
            "pod": "tone-a2-worker-1",
        },
        "checkpoint": {"latest": "/checkpoints/tone/checkpoints/step-00000800"},
        "conditions": [{"type": "Running", "status": "True", "reason": "PodsRunning"}],
    },
}


def changed(**status: Any) -> dict[str, Any]:
    found = copy.deepcopy(RUNNING)
    found["status"] |= status
    return found


def shown(job: dict[str, Any], note: str = "") -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, record=True)
    console.print(view(job, note))
    return console.export_text()


def test_a_running_job_in_a_line_and_on_a_screen() -> None:
    words = ["Running", "42% 840/2000", "loss 1.235", "tokens/s 12300.0", "left 3h25m"]
    assert all(word in line(RUNNING) for word in [*words, "restarts 1"])
    text = shown(RUNNING, "the cluster does not answer; trying again")
    for word in [*words, "team/tone", "step-00000800", "tone-a2-worker-1", "trying again"]:
        assert word in text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {
                "phase": "Starting",
                "reason": "Unschedulable",
                "conditions": [
                    {
                        "type": "Running",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": "0/5 nodes [/bold] are available",
                    }
                ],
            },
            "Unschedulable: 0/5 nodes [/bold] are available",
        ),
        ({"phase": None, "reason": None, "conditions": []}, "tone"),
    ],
)
def test_why_it_waits_is_shown_and_a_pods_words_are_no_markup(
    status: dict[str, Any], words: str
) -> None:
    assert words in shown(changed(**status))
    assert isinstance(line(changed(**status)), str)


def seen(name: str, index: int, kind: str = "worker") -> dict[str, Any]:
    labels = {"training.kubeflow.org/replica-index": str(index)}
    labels |= {"training.kubeflow.org/replica-type": kind}
    return {"metadata": {"name": name, "labels": labels}}


def test_the_pod_of_rank_zero() -> None:
    workers = [seen("w-10", 10), seen("w-2", 2), seen("tone-a2-worker-1", 1)]
    assert rank_zero_pod(RUNNING, workers) == "tone-a2-worker-1", "which the operator has heard"
    assert rank_zero_pod(changed(attempt=3), workers) == "tone-a2-worker-1", "the first"
    unheard = changed(progress={})
    assert rank_zero_pod(unheard, [*workers, seen("m", 0, "master")]) == "m"
    assert rank_zero_pod(unheard, [seen("w-10", 10), seen("w-2", 2)]) == "w-2"
    with pytest.raises(NoPod, match="tone has no pods: Running PodsRunning"):
        rank_zero_pod(RUNNING, [])


class Scene:
    """An OSFTJob whose status the test writes, and pods that say something."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.api = cluster.plane.api
        self.namespace = namespace
        self.jobs = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
        self.api.post(self.jobs, job_samples.job(name="run"))

    def tell(self, **status: Any) -> None:
        self.api.patch(f"{self.jobs}/run/status", {"status": status})

    def end(self, kind: str = "Complete") -> None:
        condition = {
            "type": kind,
            "status": "True",
            "reason": "Done",
            "message": "",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        phase = "Succeeded" if kind == "Complete" else "Failed"
        self.tell(phase=phase, reason="Done", conditions=[condition])

    def run_pod(self, name: str, script: str, attempt: int, **spec: Any) -> None:
        body = pod(name, script, **spec)
        body["metadata"]["labels"] = {"osft.dev/job": "run", "osft.dev/attempt": str(attempt)}
        self.api.post(f"/api/v1/namespaces/{self.namespace}/pods", body)


def use(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client package reads the variable once, when it is imported."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig)
    )


@pytest.fixture
def scene(cluster: Cluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Scene:
    use(cluster.plane.kubeconfig, monkeypatch)
    monkeypatch.setattr(remote_commands, "PAUSE_SECONDS", 0.1)
    return Scene(cluster, namespace)


def osft(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def in_background(part: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=part, daemon=True)
    thread.start()
    return thread


@pytest.mark.cluster
@pytest.mark.parametrize(("kind", "code"), [("Complete", 0), ("Failed", 1)])
def test_watch_tells_changes_until_the_end(
    scene: Scene,
    kind: str,
    code: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene.tell(phase="Running", reason="PodsRunning", progress=RUNNING["status"]["progress"])
    looked = threading.Event()
    monkeypatch.setattr(remote_commands, "line", lambda job: (looked.set(), line(job))[1])

    def story() -> None:
        looked.wait()
        scene.end(kind)

    thread = in_background(story)
    assert osft("watch", "run", "-n", scene.namespace) == code
    thread.join()
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Running  42% 840/2000")
    assert lines[1].startswith("Succeeded" if code == 0 else "Failed")


@pytest.mark.cluster
def test_what_is_not_there_is_said(scene: Scene, capfd: pytest.CaptureFixture[str]) -> None:
    assert osft("watch", "none", "-n", scene.namespace) == 2
    assert f"there is no OSFTJob none in namespace {scene.namespace}" in capfd.readouterr().err
    assert osft("logs", "run", "-n", scene.namespace) == 2
    assert "run has no pods" in capfd.readouterr().err
    assert osft("watch", "run", "--context", "elsewhere") == 2
    assert "elsewhere" in capfd.readouterr().err
    deep = json.dumps(job_samples.job({"spec.podTemplate.spec.affinity": "DEEP"}, name="deep"))
    scene.api.call("POST", scene.jobs, deep.replace('"DEEP"', '{"a":' * 1000 + "1" + "}" * 1000))
    assert osft("watch", "deep", "-n", scene.namespace) == 2
    assert "OSFTJob deep is too deep to be read here" in capfd.readouterr().err


@pytest.mark.cluster
def test_an_outage_is_sat_out(
    scene: Scene,
    cluster: Cluster,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    scene.tell(phase="Running")
    with FaultProxy(cluster.plane.kubeconfig, tmp_path) as proxy:
        use(proxy.kubeconfig, monkeypatch)

        looked = threading.Event()
        monkeypatch.setattr(remote_commands, "line", lambda job: (looked.set(), line(job))[1])

        def story() -> None:
            looked.wait()
            proxy.faults.answer = lambda _: refusal(503, "ServiceUnavailable")
            time.sleep(0.7)
            scene.end()
            proxy.heal()

        thread = in_background(story)
        assert osft("watch", "run", "-n", scene.namespace) == 0
        thread.join()
    assert "trying again" in capfd.readouterr().err


@pytest.mark.cluster
def test_logs_go_on_across_attempts_until_the_end(
    scene: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    scene.tell(phase="Running", attempt=1)
    scene.run_pod("run-master-0", "echo first; sleep 1; echo more; exit 1", 1)

    def story() -> None:
        time.sleep(3)
        scene.run_pod("run-a2-master-0", "echo second; sleep 1; echo done", 2)
        scene.tell(attempt=2)
        path = f"/api/v1/namespaces/{scene.namespace}/pods/run-a2-master-0"
        wait_for(
            "the end", lambda: scene.api.get(path).get("status", {}).get("phase") == "Succeeded"
        )
        time.sleep(0.5)
        scene.end()

    thread = in_background(story)
    assert osft("logs", "run", "-f", "-n", scene.namespace) == 0
    thread.join()
    words = capfd.readouterr().out.split()
    assert words == ["first", "more", "second", "done"], "all of it, and nothing twice"
    assert osft("logs", "run", "--tail", "1", "-n", scene.namespace) == 0
    assert capfd.readouterr().out == "done\n"


@pytest.mark.cluster
def test_a_kubelet_that_has_not_taken_up_the_pod_yet_is_waited_for(
    scene: Scene,
    cluster: Cluster,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    scene.tell(phase="Running", attempt=1)
    scene.run_pod("run-master-0", "echo first; echo second; echo third", 1)
    path = f"/api/v1/namespaces/{scene.namespace}/pods/run-master-0"
    refused, taken_up, read = (threading.Event() for _ in range(3))

    def answer(request: Request) -> bytes | None:
        if "/log?" not in request.path:
            return None
        if taken_up.is_set():
            read.set()
            return None
        refused.set()
        return refusal(404, "NotFound")

    def story() -> None:
        refused.wait()
        wait_for("its end", lambda: scene.api.get(path)["status"].get("phase") == "Succeeded")
        taken_up.set()
        read.wait()
        scene.end()

    with FaultProxy(cluster.plane.kubeconfig, tmp_path) as proxy:
        proxy.faults.answer = answer
        use(proxy.kubeconfig, monkeypatch)
        thread = in_background(story)
        assert osft("logs", "run", "-f", "--tail", "2", "-n", scene.namespace) == 0
        thread.join()
    said = capfd.readouterr()
    assert said.out == "second\nthird\n", "the tail that was asked for, and nothing twice"
    assert "pod run-master-0 has no log yet" in said.err
