"""Metrics in TensorBoard and MLflow, read back by their own packages."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from osft_trainer import trackers
from osft_trainer.config import TrainingParameters
from osft_trainer.report import RunFolder
from osft_trainer.trackers import start_services
from osft_trainer.tracking import Tracker

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(base, base.parent / "data.jsonl", out, **changes)


def events(logs: Path, name: str) -> dict[int, float]:
    found = accumulator.EventAccumulator(str(logs))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(name)}


def test_tensorboard_shows_the_run(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, tensorboard=True, validation_split=0.3)
    tiny.run(told)
    logs = RunFolder(tmp_path).logs
    rows = tiny.rows(told)
    assert events(logs, "loss") == pytest.approx({r["step"]: r["loss"] for r in rows}, rel=1e-6)
    assert events(logs, "validationLoss") == pytest.approx(
        {rows[-1]["step"]: rows[-1]["validationLoss"]}, rel=1e-6
    )


def test_a_resumed_run_replaces_the_steps_that_it_does_again(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, tensorboard=True)
    for done, losses in ((0, {1: 9.0, 2: 8.0, 3: 7.0}), (1, {2: 5.0})):
        services = start_services(told, "run", tmp_path, RunFolder(tmp_path).logs, done)
        with Tracker(RunFolder(tmp_path).metrics, done, services) as tracker:
            for step, loss in losses.items():
                tracker.write({"step": step, "loss": loss, "timestamp": "now"})
    assert events(RunFolder(tmp_path).logs, "loss") == {1: 9.0, 2: 5.0}


def test_without_being_asked_there_are_no_logs(base: Path, tmp_path: Path) -> None:
    tiny.run(parameters(base, tmp_path))
    assert not RunFolder(tmp_path).logs.exists()


@pytest.mark.parametrize(
    ("changes", "module", "words"),
    [
        ({"tensorboard": True}, "tensorboard", r"tensorboard needs.*pip install 'osft\[tensorbo"),
        ({"mlflow_tracking_uri": "http://m"}, "mlflow", r"'http://m' needs.*'osft\[mlflow\]'"),
        ({"wandb_project": "p"}, "wandb", r"wandb_project 'p' needs.*'osft\[wandb\]'"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], module: str, words: str,
) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=words):
        tiny.run(parameters(base, tmp_path, **changes))


def test_mlflow_shows_the_run_and_a_later_attempt_continues_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real package and a store of files: `pip install 'osft[mlflow]'` runs it."""
    mlflow = pytest.importorskip("mlflow", reason="needs osft[mlflow], which is 78 MB")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    told = parameters(
        base, tmp_path, mlflow_tracking_uri=(tmp_path / "store").as_uri(),
        mlflow_experiment_name="skills", mlflow_run_name="first", seed=7,
    )  # fmt: skip
    client = mlflow.MlflowClient(tracking_uri=told.mlflow_tracking_uri)
    tiny.run(told)
    experiment = client.get_experiment_by_name("skills").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert (run.data.params["seed"], run.data.params["learning_rate"]) == ("7", "0.01")
    shown = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss")}
    assert shown == pytest.approx({row["step"]: row["loss"] for row in tiny.rows(told)})
    services = start_services(told, tiny.RUN_ID, tmp_path, tmp_path / "logs", 6)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    tracker = Tracker(tmp_path / "metrics.jsonl", 6, services)
    tracker.write({"step": 7, "loss": 0.5})
    with pytest.raises(KeyError), tracker:
        raise KeyError
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.data.metrics["loss"]) == ("FAILED", 0.5)


def test_an_mlflow_server_that_cannot_be_used_is_worth_another_try(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs osft[mlflow], which is 78 MB")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    told = parameters(base, tmp_path, mlflow_tracking_uri="http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"mlflow_tracking_uri 'http://127.0.0.1:9': .*MLFLOW_TRACK"):
        tiny.run(told)


class Broken:
    """A service that is down."""

    def log(self, row: trackers.Row) -> None:
        raise ConnectionError("down")

    def close(self, failed: bool) -> None:
        raise ConnectionError("down")


class Kept:
    """A service that remembers."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.ended: list[bool] = []

    def log(self, row: trackers.Row) -> None:
        self.steps.append(row["step"])

    def close(self, failed: bool) -> None:
        self.ended.append(failed)


def test_a_service_that_fails_is_left_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept()
    with Tracker(tmp_path / "metrics.jsonl", 0, [Broken(), kept]) as tracker:
        tracker.write({"step": 1})
        tracker.write({"step": 2})
    assert (kept.steps, kept.ended) == ([1, 2], [False])
    assert caplog.text.count("Broken takes no more metrics") == 1
    with pytest.raises(KeyError), Tracker(tmp_path / "metrics.jsonl", 2, [Broken(), kept]):
        raise KeyError
    assert kept.ended == [False, True]
