"""A path may be pathlib's in Python, and begin with `~` where a user of this machine writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import tiny
from bench import machine
from osft_operator import cli
from osft_trainer import api, inspect
from osft_trainer.arguments import from_argv
from osft_trainer.base_model import local_folder
from osft_trainer.config import LaunchParameters, RunParameters, TrainingParameters
from osft_trainer.parameters import path_fields

PATHS = sorted(path_fields(TrainingParameters) & set(TrainingParameters.model_fields))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def _given(**changes: Any) -> dict[str, Any]:
    told = tiny.training(Path("/model"), Path("/data"), Path("/out"), training_mode="epoch")
    return {**told.model_dump(exclude_unset=True, exclude_none=True), "num_epochs": 1, **changes}


@pytest.mark.parametrize("model", [TrainingParameters, RunParameters, LaunchParameters])
def test_what_is_called_a_path_is_one(model: type[BaseModel]) -> None:
    """A parameter to come is a path by its type, not by its name alone."""
    named = {n for n in model.model_fields if n.endswith(("_path", "_dir", "_file", "_folder"))}
    found = path_fields(model) & set(model.model_fields)
    assert found == named


@pytest.mark.parametrize("name", PATHS)
def test_osft_takes_paths_of_either_kind(name: str, home: Path) -> None:
    for value in (Path("~/folder"), "~/folder", home / "folder"):
        training = api._arguments(_given(**{name: value})).training
        assert getattr(training, name) == str(home / "folder")


@pytest.mark.parametrize("name", PATHS)
def test_a_command_line_takes_a_home(name: str, home: Path) -> None:
    argv = api._arguments(_given()).to_argv()
    flag = "--" + name.replace("_", "-")
    told = [argument for argument in argv if not argument.startswith(f"{flag}=")]
    training = from_argv([*told, f"{flag}=~/folder"]).training
    assert getattr(training, name) == str(home / "folder")


def test_a_job_that_runs_here_takes_a_home(home: Path) -> None:
    """One for a cluster does not: its pods have another."""
    body = {
        "apiVersion": "osft.dev/v1alpha1",
        "kind": "OSFTJob",
        "metadata": {"name": "here"},
        "spec": {
            "training": {
                "modelPath": "~/model",
                "dataPath": "~/data.jsonl",
                "unfreezeRankRatio": 0.25,
                "effectiveBatchSize": 4,
                "maxTokensPerGpu": 512,
                "maxSeqLen": 512,
                "learningRate": "5e-3",
                "numEpochs": 1,
            },
            "storage": {"checkpoints": {"size": "1Gi"}},
        },
    }
    file = home / "job.yaml"
    file.write_text(yaml.safe_dump(body))
    here, cluster = cli._for_this_machine(str(file)), cli._one(str(file))
    assert here is not None
    assert cluster is not None
    assert here["spec"]["training"]["modelPath"] == str(home / "model")
    assert here["spec"]["training"]["dataPath"] == str(home / "data.jsonl")
    assert here["spec"]["storage"] == cluster["spec"]["storage"]
    assert cluster["spec"]["training"]["modelPath"] == "~/model"


def test_commands_and_benchmarks_take_a_home(home: Path) -> None:
    for parser, argv, name in (
        (inspect._parser(), ["export", "~/c", "~/out", "--model=~/m"], "out"),
        (inspect._parser(), ["spectrum", "~/model", "--data=~/out"], "data"),
        (inspect._parser(), ["spectrum", "~/model", "--plot=~/out"], "plot"),
        (cli._parser(), ["plan", "job.yaml", "--volumes=~/out"], "volumes"),
    ):
        assert getattr(parser.parse_args(argv), name) == home / "out"
    assert machine.path("~/out") == home / "out"


def test_a_model_is_found_in_the_home(home: Path) -> None:
    folder = tiny.model_folder(home / "model")
    for path in ("~/model", Path("~/model"), folder):
        assert local_folder(path) == folder
