"""The `osft` command on real processes: run, stop and go on, fail, render, validate."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from cluster.api import wait_for

OSFT = str(Path(sys.executable).with_name("osft"))
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def osft(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OSFT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        **options,
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with claims `models` and `data`."""
    folder = tmp_path_factory.mktemp("volumes")
    for name in ("models", "data"):
        (folder / name).mkdir()
    tiny.model_folder(folder / "models" / "tiny")
    tiny.data_file(folder / "data" / "chats.jsonl")
    return folder


def write_job(path: Path, name: str, spec: dict[str, Any] | None = None, **training: Any) -> Path:
    job = {
        "apiVersion": "osft.dev/v1alpha1",
        "kind": "OSFTJob",
        "metadata": {"name": name},
        "spec": {
            "training": {
                "modelPath": "/models/tiny",
                "dataPath": "/data/chats.jsonl",
                "unfreezeRankRatio": 0.25,
                "effectiveBatchSize": 4,
                "maxTokensPerGpu": 512,
                "maxSeqLen": 512,
                "learningRate": "5e-3",
                "trainingMode": "step",
                "maxSteps": 4,
                "activationCheckpointing": False,
                **training,
            },
            "storage": {
                "checkpoints": {"size": "1Gi"},
                "mounts": [
                    {"name": "models", "claimName": "models", "mountPath": "/models"},
                    {"name": "data", "claimName": "data", "mountPath": "/data"},
                ],
            },
            **(spec or {}),
        },
    }
    path.write_text(yaml.safe_dump(job))
    return path


def losses(volumes: Path, name: str) -> list[float]:
    path = volumes / f"{name}-checkpoints" / name / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()]


def test_run_on_two_nodes_ends_with_the_status(material: Path, tmp_path: Path) -> None:
    done = osft(
        "run",
        write_job(tmp_path / "job.yaml", "both", {"nnodes": 2}),
        "--volumes",
        material,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("osftjob/both  Succeeded  100% 4/4")
    final = material / "both-checkpoints" / "both" / "final"
    assert f"model        {final}" in done.stdout
    assert (final / "model.safetensors").is_file()
    assert "both-worker-0" in done.stdout
    again = osft("run", tmp_path / "job.yaml", "--volumes", material)
    assert again.returncode == 0
    assert len(losses(material, "both")) == 4


def test_interrupt_saves_and_the_same_command_goes_on(material: Path, tmp_path: Path) -> None:
    calm = write_job(tmp_path / "calm.yaml", "calm", maxSteps=80)
    assert osft("run", calm, "--volumes", material).returncode == 0
    file = write_job(tmp_path / "stopped.yaml", "stopped", maxSteps=80)
    command = [OSFT, "run", str(file), "--volumes", str(material)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for("some steps", lambda: len(losses(material, "stopped")) >= 3, timeout_seconds=120)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "go on from the newest checkpoint" in out
    assert 3 <= len(losses(material, "stopped")) < 80
    assert list((material / "stopped-checkpoints" / "stopped" / "checkpoints").glob("*/COMPLETE"))
    done = osft("run", file, "--volumes", material)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(material, "stopped") == losses(material, "calm")


def test_killed_command_leaves_no_process(material: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path / "job.yaml", "killed", maxSteps=100_000)
    command = [OSFT, "run", str(file), "--volumes", str(material), "--quiet"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)

    def trees() -> list[int]:
        every = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in every if pid != running.pid and _is_below(pid, str(material))]

    wait_for("a step", lambda: losses(material, "killed"), timeout_seconds=120)
    assert trees()
    running.kill()
    running.wait()
    wait_for("no process left", lambda: not trees(), timeout_seconds=20)


def _is_below(pid: int, folder: str) -> bool:
    try:
        return folder.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_failure_names_pod_code_and_reason(material: Path, tmp_path: Path) -> None:
    (material / "data" / "broken.jsonl").write_text('{"messages": "none"}\n')
    file = write_job(tmp_path / "job.yaml", "broken", dataPath="/data/broken.jsonl")
    done = osft("run", file, "--volumes", material)
    assert done.returncode == 1
    assert "osftjob/broken  Failed" in done.stdout
    assert "pod broken-master-0 container pytorch" in done.stdout
    assert "exit code 2" in done.stdout
    assert "broken.jsonl" in done.stdout
    assert "line 1" in done.stdout


def test_a_terminal_gets_a_progress_bar(material: Path, tmp_path: Path) -> None:
    file = write_job(tmp_path / "job.yaml", "shown")
    ours, theirs = pty.openpty()
    command = [OSFT, "run", str(file), "--volumes", str(material)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**ENVIRONMENT, "TERM": "xterm"}
    ) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert running.wait() == 0
    os.close(ours)
    text = shown.decode(errors="replace")
    assert "100% 4/4" in text
    assert "━" in text


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_and_render(file: Path) -> None:
    checked = osft("validate", file)
    assert checked.returncode == 0, checked.stderr
    assert "is valid" in checked.stdout
    rendered = osft("render", file, "--image", "registry/trainer:1")
    kinds = [item["kind"] for item in yaml.safe_load_all(rendered.stdout)]
    assert kinds[-1] == "PyTorchJob"
    assert "ownerReferences" not in rendered.stdout


def test_validate_prints_every_problem(tmp_path: Path) -> None:
    file = write_job(
        tmp_path / "job.yaml", "Bad_Name", {"nnodes": 0}, unfreezeRankRatio=2, lerningRate=1
    )
    done = osft("validate", file)
    assert done.returncode == 2
    for words in ("metadata.name", "nnodes", "lerningRate", "learningRate"):
        assert words in done.stderr
    assert osft("render", file).returncode == 2
    assert osft("run", file).returncode == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "is not YAML"), ("kind: Pod", "no document of kind OSFTJob")],
)
def test_what_is_no_osftjob_is_refused_in_a_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    done = osft("validate", file)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    missing = osft("run", tmp_path / "missing.yaml")
    assert missing.returncode == 2
    assert "missing.yaml" in missing.stderr
