"""Metrics in TensorBoard, MLflow and Weights & Biases, read back from what they wrote."""

from __future__ import annotations

import importlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from osft_trainer import trackers
from osft_trainer.config import TrainingParameters
from osft_trainer.report import RunFolder
from osft_trainer.trackers import start_services
from osft_trainer.tracking import Tracker


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(base, base.parent / "data.jsonl", out, **changes)


def events(logs: Path, name: str) -> dict[int, float]:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(logs))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(name)}


def test_tensorboard_shows_the_run_of_two_ranks_once(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    told = parameters(base, tmp_path, tensorboard=True, validation_split=0.3)
    tiny.complete(told, ranks=2)
    logs = RunFolder(tmp_path).logs
    assert len(list(logs.iterdir())) == 1
    rows = tiny.rows(told)
    assert events(logs, "loss") == pytest.approx({r["step"]: r["loss"] for r in rows}, rel=1e-6)
    assert events(logs, "validationLoss") == pytest.approx(
        {rows[-1]["step"]: rows[-1]["validationLoss"]}, rel=1e-6
    )


def test_a_resumed_run_replaces_the_steps_that_it_does_again(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
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


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow_shows_the_run_and_a_later_attempt_continues_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """With the real package; a database needs all of it, files `pip install 'osft[mlflow]'`."""
    mlflow = pytest.importorskip("mlflow", reason="needs osft[mlflow], which is 78 MB")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    uri = (tmp_path / "store").as_uri()
    if store == "sqlite":
        pytest.importorskip("mlflow.store.db.utils", reason="needs the whole mlflow package")
        uri = f"sqlite:///{tmp_path / 'runs.db'}"
    told = parameters(
        base, tmp_path, mlflow_tracking_uri=uri,
        mlflow_experiment_name="skills", mlflow_run_name="first", seed=7,
    )  # fmt: skip
    tiny.run(told)
    client = mlflow.MlflowClient(tracking_uri=told.mlflow_tracking_uri)
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


def test_an_address_that_mlflow_does_not_know_is_bad_input(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs osft[mlflow], which is 78 MB")
    told = parameters(base, tmp_path, mlflow_tracking_uri="gopher://m")
    with pytest.raises(ValueError, match=r"'gopher://m': .*unsupported.*pip install mlflow"):
        tiny.run(told)


def wandb_records(file: Path) -> Iterator[Any]:
    """What an offline run holds: LevelDB's log format (blocks of 32 KiB) behind seven bytes."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, at, held = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<4xHB", content, at)
        held += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record.FromString(held)
            held = b""


def run_offline(told: TrainingParameters) -> None:
    """One rank of a run, in a process that was forked before the test began."""
    os.environ["WANDB_MODE"] = "offline"
    tiny.run(told)


def test_wandb_shows_the_run_of_two_ranks_once(base: Path, tmp_path: Path) -> None:
    """With the real package, offline: `pip install 'osft[wandb]'` runs it."""
    pytest.importorskip("wandb", reason="needs osft[wandb], which is 100 MB")
    told = parameters(base, tmp_path, wandb_project="skills", wandb_run_name="first", seed=7)
    assert tiny.finish(tiny.start_ranks(run_offline, 2, [(told,)] * 2)) == [0, 0]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(file))
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.project, run.display_name, run.run_id) == ("skills", "first", tiny.RUN_ID)
    config = {entry.key: entry.value_json for entry in run.config.update}
    assert (config["seed"], config["learning_rate"]) == ("7", "0.01")
    shown = [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records
        if r.HasField("history")
    ]
    numbers = ("step", "loss", "lr", "gradNorm", "tokens", "epoch")
    assert [[row[name] for name in numbers] for row in shown] == [
        [row[name] for name in numbers] for row in tiny.rows(told)
    ]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def fail_offline(told: TrainingParameters, folder: Path) -> None:
    """A run with a name of its own that ends badly."""
    os.environ["WANDB_MODE"] = "offline"
    services = start_services(told, "team/a:b#1", folder, folder / "logs", 0)
    tracker = Tracker(folder / "metrics.jsonl", 0, services)
    tracker.write({"step": 1, "loss": 0.5})
    with pytest.raises(KeyError), tracker:
        raise KeyError


def test_wandb_takes_any_run_id_and_hears_of_a_failure(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs osft[wandb], which is 100 MB")
    told = parameters(base, tmp_path, wandb_project="skills")
    assert tiny.finish(tiny.start_ranks(fail_offline, 1, [(told, tmp_path)])) == [0]
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.name == "run-team-a-b-1.wandb"
    assert [r.exit.exit_code for r in wandb_records(file) if r.HasField("exit")] == [1]


def refused(
    told: TrainingParameters, environment: dict[str, str], kind: type[Exception], words: str
) -> None:
    """A run whose server is nowhere."""
    os.environ.pop("WANDB_API_KEY", None)
    os.environ.update(environment, HOME=told.ckpt_output_dir, WANDB_BASE_URL="http://127.0.0.1:9")
    with pytest.raises(kind, match=f"(?s){words}"):
        tiny.run(told)


@pytest.mark.parametrize(
    ("environment", "kind", "words"),
    [
        ({}, ValueError, r"wandb_project 'skills': .*; set WANDB_API_KEY, or WANDB_MODE=offline"),
        (
            {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"},
            OSError,
            r"wandb_project 'skills': .*; check WANDB_API_KEY, WANDB_BASE_URL and the network",
        ),
    ],
    ids=["no key", "no server"],
)
def test_wandb_without_a_key_is_bad_input_and_without_a_server_worth_another_try(
    base: Path, tmp_path: Path, environment: dict[str, str], kind: type[Exception], words: str
) -> None:
    pytest.importorskip("wandb", reason="needs osft[wandb], which is 100 MB")
    told = parameters(base, tmp_path, wandb_project="skills")
    assert tiny.finish(tiny.start_ranks(refused, 1, [(told, environment, kind, words)])) == [0]


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
