"""`osft plan`, `osft spectrum`, `osft export`: as processes, on the folders of `osft run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import tiny
from osft_operator import cli, inspection
from osft_trainer import inspect
from osft_trainer.report import RunFolder

OSFT = str(Path(sys.executable).with_name("osft"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def osft(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [OSFT, *map(str, arguments)], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The same command in this process, which has torch already; a start of torch costs seconds."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == [sys.executable, "-m", inspection.MODULE]
        with pytest.raises(SystemExit) as ended:
            inspect.main(command[3:])
        return subprocess.CompletedProcess(command, int(ended.value.code or 0))

    monkeypatch.setattr(inspection, "subprocess", SimpleNamespace(run=run))

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return subprocess.CompletedProcess([], int(ended.value.code or 0), said.out, said.err)

    return call


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "models").mkdir()
    (folder / "data").mkdir()
    tiny.model_folder(folder / "models" / "tiny")
    tiny.data_file(folder / "data" / "chats.jsonl")
    return folder


def write_job(path: Path, spec: dict[str, Any] | None = None, **training: Any) -> Path:
    mounts = [
        {"name": name, "claimName": name, "mountPath": f"/{name}"} for name in ("models", "data")
    ]
    job = {
        "apiVersion": "osft.dev/v1alpha1",
        "kind": "OSFTJob",
        "metadata": {"name": "planned"},
        "spec": {
            "training": {
                "modelPath": "/models/tiny",
                "dataPath": "/data/chats.jsonl",
                "unfreezeRankRatio": 0.25,
                "effectiveBatchSize": 4,
                "maxTokensPerGpu": 128,
                "maxSeqLen": 64,
                "learningRate": "5e-3",
                **training,
            },
            "storage": {"checkpoints": {"size": "1Gi"}, "mounts": mounts},
            **(spec or {}),
        },
    }
    path.write_text(yaml.safe_dump(job))
    return path


def test_plan_reads_the_job_as_run_does(volumes: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", {"nnodes": 2, "nprocPerNode": 2})
    done = osft("plan", job, "--volumes", volumes, "--json", "--energy")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["processes"] == 4
    assert found["device"] == "cpu"
    assert found["model_path"] == str(volumes / "models" / "tiny")
    assert found["data"]["rows"] == 22
    assert found["steps"] == 6
    assert all(0.9 < target["energy_kept"] < 1 for target in found["targets"])
    # The run's own folder, so that the run finds what was tokenised.
    cache = volumes / "planned-checkpoints" / "planned" / "cache" / "data"
    assert len(list(cache.iterdir())) == 1


def test_plan_refuses_what_cannot_fit(here: Any, volumes: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", {"resources": {"limits": {"nvidia.com/gpu": 1}}})
    done = here("plan", job, "--volumes", volumes, "--memory-gib", "0.00001")
    assert done.returncode == 2
    assert "bfloat16" in done.stdout
    assert "osft: --memory-gib: 1e-05 GiB a process cannot hold this run" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_refuses_what_the_jobs_own_limit_cannot_hold(
    here: Any, volumes: Path, tmp_path: Path
) -> None:
    limits = {"resources": {"limits": {"memory": "100Ki"}}, "nprocPerNode": 2}
    job = write_job(tmp_path / "job.yaml", limits)
    done = here("plan", job, "--volumes", volumes)
    assert done.returncode == 2
    assert "spec.resources.limits.memory: 4.77e-05 GiB for each process" in done.stderr
    assert "Raise the limit" in done.stderr
    assert here("plan", job, "--volumes", volumes, "--memory-gib", "8").returncode == 0


def test_a_gpu_pods_limit_is_about_loading_only(here: Any, volumes: Path, tmp_path: Path) -> None:
    limits = {"nvidia.com/gpu": 1, "memory": "1Ki"}
    job = write_job(tmp_path / "job.yaml", {"resources": {"limits": limits}})
    done = here("plan", job, "--volumes", volumes, "--memory-gib", "80")
    assert done.returncode == 2
    assert "the model while it loads needs" in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataPath": "/data/none.jsonl"}, "none.jsonl' does not exist"),
        ({"modelPath": "/models/none"}, "there is no folder"),
        ({"lrSchedulerKwargs": {"nonsense": 1}}, "nonsense unknown to lr_scheduler cosine"),
        ({"targetPatterns": ["nowhere"]}, "'nowhere' matches no matrix"),
        ({"unfreezeRankRatio": 3}, "less than or equal to 1"),
    ],
)
def test_plan_refuses_what_the_run_would_refuse(
    here: Any, volumes: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    done = here("plan", write_job(tmp_path / "job.yaml", **changes), "--volumes", volumes)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_spectrum_and_export_pass_their_arguments_on(
    here: Any, volumes: Path, tmp_path: Path
) -> None:
    model, data = volumes / "models" / "tiny", volumes / "data" / "chats.jsonl"
    shown = here("spectrum", "--data", data, "--ratios=0.25,0.5", model)
    assert shown.returncode == 0, shown.stderr
    assert "recommended unfreezeRankRatio: " in shown.stdout
    refused = here("spectrum", model, "--ratios=0.25,2")
    assert refused.returncode == 2
    assert "'0.25,2' must be ratios between 0 and 1" in refused.stderr
    told = tiny.training(model, data, tmp_path / "run")
    tiny.run(told)
    folder = RunFolder(tmp_path / "run")
    last = folder.complete_checkpoints()[-1]
    exported = osft("export", last, tmp_path / "out")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout == f"wrote the model after step 6 to {tmp_path / 'out'}\n"
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder.final / name).read_bytes()
    again = here("export", last, tmp_path / "out")
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr


def test_a_plot_needs_matplotlib_and_a_known_suffix(
    here: Any, volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = volumes / "models" / "tiny"
    for suffix, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"plot{suffix}"
        data = volumes / "data" / "chats.jsonl"
        done = here("spectrum", model, "--data", data, "--plot", path)
        assert done.returncode == 0, done.stderr
        assert path.read_bytes().startswith(begin)
    refused = here("spectrum", model, "--plot", tmp_path / "plot.gif")
    assert refused.returncode == 2
    assert "must end in .png or .svg" in refused.stderr
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused = here("spectrum", model, "--plot", tmp_path / "plot.png")
    assert refused.returncode == 2
    assert "pip install matplotlib" in refused.stderr


@pytest.mark.parametrize("command", ["plan", "spectrum", "export"])
def test_without_the_trainer_it_says_what_to_install(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(inspection, "NEEDED", ("no_such_module",))
    arguments = {
        "plan": [str(write_job(tmp_path / "job.yaml")), "--volumes", str(tmp_path)],
        "spectrum": ["model"],
        "export": ["checkpoint", "out"],
    }
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *arguments[command]])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"osft: `osft {command}` needs the trainer, and no_such_module is not")
    assert "pip install 'osft[trainer]'" in said


def test_the_help_names_all_commands(here: Any) -> None:
    done = here("--help")
    for command in ("run", "plan", "render", "validate", "spectrum", "export"):
        assert f"\n    {command} " in done.stdout
    assert "--tolerance" in here("spectrum", "--help").stdout
    assert "--dtype" in here("export", "--help").stdout
