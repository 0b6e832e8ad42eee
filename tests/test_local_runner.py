"""Pods run as real processes: environment, paths, restarts, messages, and their end."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from osft_operator import process_tree
from osft_operator.local_runner import BackOff, PodProcess, Surroundings, free_port

SHORT = BackOff(first_seconds=0.05, cap_seconds=0.2)
DEADLINE_SECONDS = 30


def pod(command: list[str], **changes: object) -> dict:
    """A pod of one container; `changes` of the container, or `restartPolicy` of the pod."""
    policy = changes.pop("restartPolicy", "Never")
    spec_changes = changes.pop("spec", {})
    container = {"name": "pytorch", "image": "i", "command": command, **changes}
    metadata = {
        "name": "run-master-0",
        "namespace": "ns",
        "uid": "the-uid",
        "labels": {"training.kubeflow.org/replica-index": "0"},
    }
    spec = {"restartPolicy": policy, "containers": [container], **spec_changes}
    return {"metadata": metadata, "spec": spec}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., PodProcess]]:
    """Starts pods and ends whatever is left of them."""
    session = f"osft-test-{uuid.uuid4().hex}"

    def start(manifest: dict, **surroundings: object) -> PodProcess:
        number = len(list(tmp_path.glob("pod-*")))
        at = Surroundings(
            work_dir=tmp_path / f"pod-{number}", mark=f"{session}/{number}", **surroundings
        )
        process = PodProcess(manifest, at, back_off=SHORT)
        process.start()
        return process

    with process_tree.Watchdog(session):
        yield start


def until(process: PodProcess, done: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not done():
        assert time.monotonic() < end, process.status()
        process.poll()
        time.sleep(0.01)


def finish(process: PodProcess) -> dict:
    until(process, lambda: process.finished)
    return process.status()


def terminated(status: dict) -> dict:
    return status["containerStatuses"][0]["state"]["terminated"]


def log(process: PodProcess, previous: bool = False) -> str:
    path = process.log_path(previous=previous)
    assert path is not None
    return path.read_text()


def test_a_pod_that_ends_well(run) -> None:
    process = run(pod(["python", "-c", "print('hello')"]))
    assert process.status()["phase"] == "Running"
    assert process.status()["containerStatuses"][0]["ready"]
    status = finish(process)
    assert status["phase"] == "Succeeded"
    assert terminated(status)["exitCode"] == 0
    assert terminated(status)["reason"] == "Completed"
    assert log(process) == "hello\n"


def test_the_image_is_this_interpreter_and_brings_no_secret(run, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    script = "import os, sys; print(sys.executable, *sorted(os.environ))"
    process = run(pod(["python", "-c", script]))
    finish(process)
    words = log(process).split()
    assert Path(words[0]).parent == Path(sys.executable).parent
    assert "GLOO_SOCKET_IFNAME" in words
    assert not {"HF_TOKEN", "PYTHONPATH"} & set(words)


def test_environment_in_order_with_references(run) -> None:
    entries = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)-$$(A)-$(LATER)"},
        {"name": "A", "value": "2"},
        {"name": "LATER", "value": "x"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "UID_", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {
            "name": "INDEX",
            "valueFrom": {
                "fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}
            },
        },
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
        {
            "name": "ABSENT",
            "valueFrom": {"configMapKeyRef": {"name": "no", "key": "no", "optional": True}},
        },
    ]
    script = 'echo "$A|$B|$IP|$UID_|$INDEX|$TOKEN|${ABSENT-none}|$P_k|$0"'
    manifest = pod(
        ["sh", "-c", script],
        args=["$(LATER)-$(NONE)"],
        env=entries,
        envFrom=[{"prefix": "P_", "configMapRef": {"name": "more"}}],
    )
    data = {("Secret", "hub"): {"token": "t"}, ("ConfigMap", "more"): {"k": "v"}}
    process = run(
        manifest, pod_ip="127.1.0.9", references=lambda kind, name: data.get((kind, name))
    )
    finish(process)
    assert log(process) == "2|1-$(A)-$(LATER)|127.1.0.9|the-uid|0|t|none|v|x-$(NONE)\n"


def test_a_missing_secret_is_named(run) -> None:
    entry = {"name": "T", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    status = finish(run(pod(["true"], env=[entry])))
    assert status["phase"] == "Failed"
    assert terminated(status)["reason"] == "StartError"
    assert "no key 'token' in a Secret 'hub'" in terminated(status)["message"]


def test_an_unknown_program_is_named(run) -> None:
    status = finish(run(pod(["no-such-program"])))
    assert terminated(status)["exitCode"] == 128
    assert "no-such-program" in terminated(status)["message"]


def test_rendezvous_points_to_this_machine(run) -> None:
    entries = [
        {"name": "MASTER_ADDR", "value": "run-master-0"},
        {"name": "PET_MASTER_ADDR", "value": "run-master-0"},
        {"name": "MASTER_PORT", "value": "23456"},
        {"name": "PET_MASTER_PORT", "value": "23456"},
        {"name": "PET_RDZV_ENDPOINT", "value": "run-worker-0:23456"},
    ]
    script = 'echo "$MASTER_ADDR $PET_MASTER_ADDR $MASTER_PORT $PET_MASTER_PORT $PET_RDZV_ENDPOINT"'
    addresses = {"run-master-0": "127.1.0.1", "run-worker-0": "127.1.0.2"}
    process = run(
        pod(["sh", "-c", script], env=entries),
        host=lambda name: addresses[name],
        port=lambda port: port + 1,
    )
    finish(process)
    assert log(process) == "127.1.0.1 127.1.0.1 23457 23457 127.1.0.2:23457\n"


def test_mount_paths_become_folders_in_arguments_and_environment(run, tmp_path) -> None:
    mounts = [
        {"name": "claim", "mountPath": "/checkpoints"},
        {"name": "inner", "mountPath": "/checkpoints/logs", "subPath": "a/b"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    manifest = pod(
        ["sh", "-c", 'echo "$@" "$CACHE"', "sh"],
        args=["--out=/checkpoints/run", "/checkpoints/logs", "/checkpoints2", "--x=/dev/shm/y"],
        env=[{"name": "CACHE", "value": "/checkpoints/cache"}],
        volumeMounts=mounts,
    )
    claim, inner = tmp_path / "claim", tmp_path / "inner"
    process = run(manifest, volumes={"claim": claim, "inner": inner, "shm": tmp_path})
    finish(process)
    assert log(process).split() == [
        f"--out={claim}/run",
        f"{inner}/a/b",
        "/checkpoints2",
        "--x=/dev/shm/y",
        f"{claim}/cache",
    ]
    assert (inner / "a" / "b").is_dir()


def test_a_mount_without_a_folder_is_named(run) -> None:
    status = finish(run(pod(["true"], volumeMounts=[{"name": "lost", "mountPath": "/x"}])))
    assert "volume 'lost'" in terminated(status)["message"]


def test_the_termination_message_is_read_and_cut(run) -> None:
    entry = {"name": "LAST", "value": "/dev/termination-log"}
    script = "import os; open(os.environ['LAST'], 'w').write('x' * 5000 + 'end'); exit(3)"
    status = finish(run(pod(["python", "-c", script], env=[entry])))
    message = terminated(status)["message"]
    assert (len(message), message[-3:]) == (4096, "end")
    assert terminated(status)["exitCode"] == 3
    assert terminated(status)["reason"] == "Error"


@pytest.mark.parametrize(
    ("policy", "code", "expected"),
    [("FallbackToLogsOnError", 1, "last words\n"), ("FallbackToLogsOnError", 0, None),
     ("File", 1, None)],
)  # fmt: skip
def test_the_log_stands_in_for_a_message(run, policy, code, expected) -> None:
    command = ["sh", "-c", f"echo last words; exit {code}"]
    status = finish(run(pod(command, terminationMessagePolicy=policy)))
    assert terminated(status).get("message") == expected


def test_on_failure_restarts_until_it_ends_well(run, tmp_path) -> None:
    count = tmp_path / "count"
    script = (
        f"import pathlib; p = pathlib.Path({str(count)!r});"
        "n = int(p.read_text()) if p.exists() else 0; p.write_text(str(n + 1));"
        "print('attempt', n); exit(0 if n == 2 else 9)"
    )
    process = run(pod(["python", "-c", script], restartPolicy="OnFailure"))
    until(process, lambda: process.restart_count == 1)
    assert process.phase == "Running"
    status = finish(process)
    assert status["phase"] == "Succeeded"
    container = status["containerStatuses"][0]
    assert container["restartCount"] == 2
    assert container["lastState"]["terminated"]["exitCode"] == 9
    assert (log(process), log(process, previous=True)) == ("attempt 2\n", "attempt 1\n")


def test_waiting_for_a_restart_says_so_and_can_be_stopped(run) -> None:
    process = run(pod(["false"], restartPolicy="OnFailure"))
    until(process, lambda: "waiting" in process.status()["containerStatuses"][0]["state"])
    waiting = process.status()["containerStatuses"][0]
    assert waiting["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    process.stop(0)
    assert finish(process)["phase"] == "Failed"


def test_always_restarts_after_success_too(run) -> None:
    process = run(pod(["true"], restartPolicy="Always"))
    until(process, lambda: process.restart_count >= 2)
    assert process.phase == "Running"


def test_back_off_doubles_up_to_its_cap() -> None:
    waits = [BackOff().wait_seconds(failures) for failures in range(1, 8)]
    assert waits == [10, 20, 40, 80, 160, 300, 300]


def test_init_containers_run_first_and_the_controllers_own_is_skipped(run, tmp_path) -> None:
    flag = tmp_path / "flag"
    init = [
        {"name": "fetch", "image": "i", "command": ["sh", "-c", f"sleep 0.1; echo 1 > {flag}"]},
        {"name": "init-pytorch", "image": "alpine:3.10", "command": ["false"]},
    ]
    process = run(pod(["cat", str(flag)], spec={"initContainers": init}))
    assert process.phase == "Pending"
    status = finish(process)
    assert log(process) == "1\n"
    skipped = status["initContainerStatuses"][1]
    assert skipped["state"]["terminated"]["exitCode"] == 0
    assert "not run" in skipped["state"]["terminated"]["message"]


def test_a_failed_init_container_fails_the_pod(run) -> None:
    init = [{"name": "fetch", "image": "i", "command": ["false"]}]
    status = finish(run(pod(["true"], spec={"initContainers": init})))
    assert status["phase"] == "Failed"
    assert "waiting" in status["containerStatuses"][0]["state"]


def test_stop_lets_the_pod_save(run) -> None:
    script = (
        "import signal, time\n"
        "def save(*_):\n    print('saved', flush=True); raise SystemExit(143)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(600)"
    )
    process = run(pod(["python", "-c", script], restartPolicy="OnFailure"))
    until(process, lambda: "ready" in log(process))
    process.stop(20)
    status = finish(process)
    assert terminated(status)["exitCode"] == 143
    assert log(process) == "ready\nsaved\n"


def test_the_whole_tree_ends_after_the_grace_period(run) -> None:
    # the grandchild has its own session, ignores SIGTERM and loses its parent: none saves it
    grandchild = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    child = (
        "import subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True)"
    )
    parent = (
        f"{child}; import signal, time; signal.signal(15, signal.SIG_IGN);"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = run(pod(["python", "-c", parent], restartPolicy="OnFailure"))
    until(process, lambda: "ready" in log(process))
    assert len(process_tree.find(process.at.mark)) == 2
    process.stop(0.2)
    status = finish(process)
    assert terminated(status)["exitCode"] == 128 + signal.SIGKILL
    assert terminated(status)["reason"] == "Error"
    assert process_tree.find(process.at.mark) == []


def test_what_the_first_process_leaves_behind_dies_with_it(run) -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    process = run(pod(["python", "-c", script]))
    assert finish(process)["phase"] == "Succeeded"
    assert process_tree.find(process.at.mark) == []


def test_a_killed_owner_leaves_nothing_behind(tmp_path) -> None:
    mark = f"osft-test-{uuid.uuid4().hex}"
    owner = f"""
import os, pathlib, time
from osft_operator import process_tree
from osft_operator.local_runner import PodProcess, Surroundings
watchdog = process_tree.Watchdog({mark!r})
at = Surroundings(work_dir=pathlib.Path({str(tmp_path)!r}), mark={mark + "/pod"!r})
container = {{"name": "pytorch", "command": ["sleep", "600"]}}
pod = PodProcess({{"metadata": {{"name": "p"}}, "spec": {{"containers": [container]}}}}, at)
pod.start()
print("started", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    assert len(process_tree.find(mark)) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + DEADLINE_SECONDS
    while process_tree.find(mark):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_mark_does_not_reach_its_neighbours() -> None:
    mark = f"osft-test-{uuid.uuid4().hex}"
    environment = {"PATH": "/usr/bin:/bin", process_tree.VARIABLE: f"{mark}1/a"}
    process = subprocess.Popen(["sleep", "600"], env=environment)
    try:
        assert process_tree.find(mark) == []
        assert process_tree.find(f"{mark}1") == [process.pid]
    finally:
        process_tree.kill(f"{mark}1")
        process.wait()


def test_free_ports_can_be_taken() -> None:
    assert 20000 <= free_port() < 32000
