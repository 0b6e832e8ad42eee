"""A job on this machine, with a stand-in for the trainer: stops, claims, secrets, logs."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.api import wait_for
from job_samples import job as sample
from osft_operator import cli, local_command
from osft_operator.local import LocalJob
from osft_operator.terminal import Screen

PYTHON = sys.executable
TRAINER = """#!/bin/sh
case "$*" in *osft_trainer.launch*) ;; *) exec {python} "$@" ;; esac
save() {{
  touch {folder}/stopping
  until [ -e {folder}/disk-is-fast ]; do sleep 0.05; done
  touch {folder}/saved
  exit 143
}}
trap save TERM
touch {folder}/begun
while true; do sleep 0.05; done
"""
"""In the place of `python`: a trainer that saves when it is asked to end."""


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the stand-in says what it did."""
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    program.write_text(TRAINER.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return tmp_path


@pytest.fixture
def started(trainer: Path) -> Iterator[Any]:
    """Starts a job's processes; they end with the test."""
    with contextlib.ExitStack() as jobs:

        def start(changes: dict[str, Any]) -> LocalJob:
            job = LocalJob(sample(changes), trainer / "volumes", trainer / "work")
            jobs.enter_context(job)
            for _ in range(100):
                job.poll()
                if job.pytorch_job is not None:
                    return job
                time.sleep(0.05)
            raise AssertionError(f"no PyTorchJob was made: {job.status}")

        yield start


@pytest.mark.parametrize("twice", [False, True])
def test_the_first_interrupt_lets_the_trainer_save_the_second_kills(
    trainer: Path, twice: bool
) -> None:
    file = trainer / "job.yaml"
    file.write_text(yaml.safe_dump(sample()))
    if not twice:
        (trainer / "disk-is-fast").touch()
    program = [
        "import sys",
        f"sys.executable = {sys.executable!r}",
        "from osft_operator import cli",
        "cli.main(sys.argv[1:])",
    ]
    command = [PYTHON, "-c", "\n".join(program), "run", str(file)]
    with subprocess.Popen(
        [*command, "--volumes", str(trainer / "volumes")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        wait_for("the trainer", (trainer / "begun").exists, timeout_seconds=60)
        running.send_signal(signal.SIGINT)
        wait_for("its stop", (trainer / "stopping").exists, timeout_seconds=60)
        if twice:
            running.send_signal(signal.SIGINT)
        out, words = running.communicate(timeout=60)
    assert running.returncode == cli.INTERRUPTED, words
    assert "run the same command again" in out
    assert "Traceback" not in words
    assert (trainer / "saved").exists() is not twice


def test_a_second_run_of_the_same_job_is_refused(trainer: Path, capsys: Any) -> None:
    file = trainer / "job.yaml"
    file.write_text(yaml.safe_dump(sample()))
    command = ["run", str(file), "--volumes", str(trainer / "volumes")]
    name = sample()["metadata"]["name"]
    with cli._alone(trainer / "volumes" / ".run" / name), pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == cli.BAD_INPUT
    assert "another `osft run`" in capsys.readouterr().err
    assert not (trainer / "begun").exists()


def test_a_suspended_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"spec\.suspend"):
        LocalJob(sample({"spec.suspend": True}), tmp_path, tmp_path / "work")


def test_a_users_claim_is_a_folder(started: Any, trainer: Path) -> None:
    job = started({"spec.storage.checkpoints": {"claimName": "mine"}})
    assert job.pytorch_job is not None
    assert job.run_folder.progress.is_relative_to(trainer / "volumes" / "mine")
    assert (trainer / "volumes" / "mine").is_dir()


def test_secrets_are_folders(started: Any, trainer: Path) -> None:
    secret = trainer / "volumes" / "secrets" / "hub"
    secret.mkdir(parents=True)
    (secret / "token").write_text("hf_x\n")
    mounts = [{"name": "keys", "secretName": "hub", "mountPath": "/keys"}]
    secrets = {"hfToken": {"name": "hub", "key": "token"}}
    job = started({"spec.storage.mounts": mounts, "spec.secrets": secrets})
    pod = job.pods[0]
    container = pod.pod["spec"]["containers"][0]
    assert local_command.environment(pod.pod, container, pod.at)["HF_TOKEN"] == "hf_x"
    assert pod.at.volumes["keys"] == secret


def test_words_of_the_trainer_are_printed_as_they_are(tmp_path: Path, capsys: Any) -> None:
    words = f"no [/INST] in [bold]line[/bold] 3 {'x' * 200}"
    with LocalJob(sample(), tmp_path, tmp_path / "work") as job, Screen(job) as screen:
        screen.say(words)
    assert words in capsys.readouterr().err


def test_a_failed_job_still_knows_its_logs(trainer: Path) -> None:
    secrets = {"hfToken": {"name": "missing", "key": "token"}}
    changes = {"spec.secrets": secrets, "spec.maxRestarts": 0}
    with LocalJob(sample(changes), trainer / "volumes", trainer / "work") as job:
        status = job.run(lambda _: None)
    assert status["phase"] == "Failed"
    (log,) = [path for _, path in job.log_paths()]
    assert "missing" in log.read_text()
