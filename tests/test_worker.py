"""One rank's way from arguments to result: folder, claim, verdict, pages."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from launching import free_port, probe_ranks
from osft_trainer import worker
from osft_trainer.arguments import TrainerArguments
from osft_trainer.config import LaunchParameters, RunParameters
from osft_trainer.identity import OwnerRecord
from osft_trainer.launch import already_over
from osft_trainer.outcome import Superseded, TrainResult
from osft_trainer.parallel import World
from osft_trainer.report import ExitCode, Progress, RunFolder, Verdict, read_document

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def arguments(base: Path, out: Path, **changes: Any) -> TrainerArguments:
    data = changes.pop("data", base.parent / "data.jsonl")
    return tiny.arguments(base, data, out, training_mode="step", max_steps=2, **changes)


def run(told: TrainerArguments) -> TrainResult:
    return worker.run(told, ALONE, stop=threading.Event(), environ={})


def test_bad_data_leaves_a_verdict_that_the_launcher_obeys(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("no JSON\n")
    told = arguments(base, tmp_path / "run", data=data)
    with pytest.raises(ValueError, match=r"data.jsonl, line 1"):
        run(told)
    verdict = read_document(RunFolder(tmp_path / "run").verdict, Verdict)
    assert verdict is not None
    assert (verdict.run_id, verdict.exit_code) == (tiny.RUN_ID, ExitCode.BAD_INPUT)
    over = already_over(told)
    assert over is not None
    assert (over.exit_code, over.message) == (ExitCode.BAD_INPUT, verdict.message)
    # Even a rank that is started all the same does not try again.
    data.write_text((base.parent / "data.jsonl").read_text())
    with pytest.raises(ValueError, match=r"data.jsonl, line 1"):
        run(told)
    # A person who calls without a name has mended it; nothing is in the way.
    nameless = dataclasses.replace(told, run=RunParameters())
    assert run(nameless).steps == 2
    assert not RunFolder(tmp_path / "run").verdict.exists()


def test_a_refused_run_writes_nothing_into_the_others_folder(base: Path, tmp_path: Path) -> None:
    run(arguments(base, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = dataclasses.replace(arguments(base, tmp_path, seed=1), run=RunParameters(run_id="new"))
    with pytest.raises(ValueError, match="seed: 42 there, 1 here"):
        run(other)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_old_attempt_does_not_start(base: Path, tmp_path: Path) -> None:
    told = arguments(base, tmp_path)
    RunFolder(tmp_path).owner.write_text(OwnerRecord(run_id=tiny.RUN_ID, attempt=2).to_json())
    with pytest.raises(Superseded):
        run(told)
    assert not RunFolder(tmp_path).verdict.exists()


def test_progress_is_served_while_it_trains(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    seen: list[Progress | None] = []

    def train(*_: Any, reporter: Any, **__: Any) -> TrainResult:
        reporter.update(phase="Training", step=5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress") as page:
            seen.append(Progress.parse(page.read()))
        return TrainResult(None, 5, None, None)

    monkeypatch.setattr(worker, "train", train)
    told = dataclasses.replace(
        arguments(base, tmp_path), launch=LaunchParameters(metrics_port=port)
    )
    run(told)
    assert seen[0] is not None
    assert (seen[0].run_id, seen[0].step) == (tiny.RUN_ID, 5)
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_a_taken_port_does_not_stop_the_training(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launch = LaunchParameters(metrics_port=taken.getsockname()[1])
        assert run(dataclasses.replace(arguments(base, tmp_path), launch=launch)).steps == 2
    assert "are not served on 127.0.0.1" in caplog.text


def test_ranks_must_share_one_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert probe_ranks([one, one]) == [0, 0]
    assert list(one.iterdir()) == []
    two.mkdir()
    assert probe_ranks([one, two]) == [2, 2]
    for folder, word in ((one, "sees"), (two, "does not see")):
        assert (
            f"rank {int(folder == two)} {word} what rank 0 wrote" in (folder / "said").read_text()
        )
        assert [path.name for path in folder.iterdir()] == ["said"]


@pytest.mark.parametrize(
    ("configuration", "words"),
    [("{", "is no JSON"), ('{"quantization_config": {"quant_method": "fp8"}}', "are quantized")],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    base: Path, tmp_path: Path, configuration: str, words: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "config.json").write_text(configuration)
    data = base.parent / "data.jsonl"
    with pytest.raises(ValueError, match=f"model_path: .*{words}"):
        run(arguments(model, tmp_path / "out", data=data))


def test_a_model_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny.data_file(tmp_path / "data.jsonl")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    told = arguments(tmp_path / "model", tmp_path / "out", data=tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"model_path: .* holds no \*\.safetensors"):
        run(told)
