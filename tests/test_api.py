"""The Python API: names, values, errors, and one model however the processes are started."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from launching import children, free_port, is_alive, until
from osft_trainer import (
    Backend,
    MiniTrainerOSFTBackend,
    OSFTAlgorithm,
    OSFTResult,
    api,
    last_words,
    osft,
)
from osft_trainer.config import LaunchParameters, RunParameters, TrainingParameters
from osft_trainer.outcome import Diverged, Preempted
from osft_trainer.report import ExitCode, Progress, RunFolder, read_document


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither here nor in processes: several ranks may not share one, and bfloat16 rounds."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def given(base: Path, out: Path, **changes: Any) -> dict[str, Any]:
    told = tiny.training(base, base.parent / "data.jsonl", out, **changes)
    return told.model_dump(exclude_defaults=True)


def test_the_signature_is_the_contract() -> None:
    parameters = inspect.signature(osft).parameters
    models = (TrainingParameters, RunParameters, LaunchParameters)
    fields = {name: info for model in models for name, info in model.model_fields.items()}
    assert set(parameters) == set(fields)
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in parameters.values())
    assert parameters["model_path"].default is inspect.Parameter.empty
    assert parameters["beta2"].default == 0.95
    assert parameters["lr_scheduler_kwargs"].default == {}
    text = inspect.getdoc(osft) or ""
    assert all(f"{name}: " in text for name in fields)


def test_the_package_loads_no_torch() -> None:
    code = (
        "import sys, inspect\n"
        "from osft_trainer import osft, OSFTAlgorithm, MiniTrainerOSFTBackend, Backend\n"
        "inspect.signature(osft)\n"
        "try: osft(model_path='m')\n"
        "except TypeError: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_refused_with_the_nearest(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="'learning_rat'; did you mean 'learning_rate'"):
        osft(**given(base, tmp_path), learning_rat=1e-5)
    with pytest.raises(TypeError, match="'modelPath'; did you mean 'model_path'"):
        OSFTAlgorithm().train(modelPath="m")


def test_missing_names_are_all_told() -> None:
    with pytest.raises(TypeError, match=r"missing parameters: data_path, ckpt_output_dir, "):
        osft(model_path="m")


def test_wrong_values_are_all_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        osft(**given(base, tmp_path) | {"unfreeze_rank_ratio": 2, "attempt": 0})
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["unfreeze_rank_ratio", "attempt"]


class Recorder(Backend):
    """Keeps what it is asked to do."""

    def execute_training(self, algorithm_params: dict[str, Any]) -> OSFTResult:
        self.asked = algorithm_params
        return OSFTResult(None, 0, None, None)


def test_an_algorithm_uses_its_backend(base: Path, tmp_path: Path) -> None:
    backend = Recorder()
    told = given(base, tmp_path)
    assert OSFTAlgorithm(backend=backend).train(**told) == OSFTResult(None, 0, None, None)
    assert backend.asked == told
    algorithm = OSFTAlgorithm()
    assert isinstance(algorithm.backend, MiniTrainerOSFTBackend)
    assert algorithm.get_required_params()["learning_rate"] is float
    assert "num_epochs" in algorithm.get_optional_params()
    assert not algorithm.get_required_params().keys() & algorithm.get_optional_params().keys()


def test_one_process_trains_here_and_once(base: Path, tmp_path: Path) -> None:
    told = given(base, tmp_path, learning_rate=0.01) | {"learning_rate": "1e-2"}
    first = OSFTAlgorithm(backend=MiniTrainerOSFTBackend()).train(**told)
    assert (first.final_dir, first.steps, first.already_finished) == (tmp_path / "final", 6, False)
    assert first.loss == tiny.rows(tiny.training(base, base, tmp_path))[-1]["loss"]
    assert first.leak is not None
    assert first.leak < 1e-5
    again = osft(**told)
    assert again.already_finished
    assert (again.final_dir, again.steps, again.loss) == (first.final_dir, 6, first.loss)
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 there, 0.02 here"):
        osft(**told | {"learning_rate": 0.02})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_path": "/nowhere/model"}, "model_path: there is no folder '/nowhere/model'"),
        ({"data_path": "/nowhere/data"}, "data_path '/nowhere/data' does not exist"),
        ({"ckpt_output_dir": "/proc/nowhere"}, "ckpt_output_dir: user"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler"),
    ],
)
def test_bad_input_is_a_value_error(
    base: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        osft(**given(base, tmp_path) | changes)


def test_a_folder_below_a_file_is_refused_with_user_and_cure(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"user {os.getuid()}, group .*/file/out.*fsGroup"):
        osft(**given(base, tmp_path / "file" / "out"))


def test_a_stopped_call_is_continued_by_the_next(base: Path, tmp_path: Path) -> None:
    told = given(base, tmp_path, training_mode="step", max_steps=400, lr_scheduler="constant")
    folder = RunFolder(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    stopper = threading.Thread(target=terminate_after_steps, args=(folder, 2))
    stopper.start()
    with pytest.raises(Preempted, match="the run can go on"):
        osft(**told)
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) is before
    (checkpoint,) = folder.complete_checkpoints()
    done = RunFolder.step_of(checkpoint)
    assert done is not None
    assert done < 400
    # Another last step would be another training; the same call goes on, and is stopped again.
    stopper = threading.Thread(target=terminate_after_steps, args=(folder, done + 1))
    stopper.start()
    with pytest.raises(Preempted):
        osft(**told)
    stopper.join()
    rows = tiny.rows(tiny.training(base, base, tmp_path))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > done


def terminate_after_steps(folder: RunFolder, count: int) -> None:
    until(lambda: steps(folder) >= count)
    os.kill(os.getpid(), signal.SIGTERM)


def steps(folder: RunFolder) -> int:
    progress = read_document(folder.progress, Progress)
    return 0 if progress is None else progress.step


def test_two_calls_on_two_nodes_train_one_model(base: Path, tmp_path: Path) -> None:
    """Each call in a process of its own, as on two machines; they meet at the endpoint."""
    endpoint = f"127.0.0.1:{free_port()}"
    code = (
        "import json, sys\n"
        "from osft_trainer import osft\n"
        "r = osft(**json.loads(sys.argv[1]))\n"
        "print('RESULT', r.final_dir, r.steps, r.loss, flush=True)"
    )

    def node(rank: int) -> str:
        told = given(base, tmp_path / "two") | {
            "nnodes": 2, "node_rank": rank, "rdzv_endpoint": endpoint, "rdzv_id": "two",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(told)],
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))

    with ThreadPoolExecutor(2) as nodes:
        said = list(nodes.map(node, range(2)))
    assert said[0] == said[1]
    alone = tiny.training(base, base.parent / "data.jsonl", tmp_path / "one")
    tiny.run(alone)
    two = tiny.rows(tiny.training(base, base, tmp_path / "two"))
    assert [row["loss"] for row in two] == pytest.approx(
        [row["loss"] for row in tiny.rows(alone)], abs=1e-4
    )
    assert said[0].startswith(f"RESULT {tmp_path / 'two' / 'final'} 6 ")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ExitCode.BAD_INPUT, ValueError),
        (ExitCode.DIVERGED, Diverged),
        (ExitCode.PREEMPTED, Preempted),
        (ExitCode.TRY_AGAIN, RuntimeError),
    ],
)
def test_the_launchers_end_is_the_same_error(code: ExitCode, kind: type[Exception]) -> None:
    error = api._error(last_words.of_code(code, "Reason", "what happened"))
    assert type(error) is kind
    assert "what happened" in str(error)


def test_exit_codes_and_errors_are_two_ways_to_say_the_same() -> None:
    for error in (ValueError("x"), Diverged("x"), Preempted("x")):
        assert type(api._error(last_words.of_error(error))) is type(error)
    assert last_words.of_error(KeyError("x")).exit_code == ExitCode.TRY_AGAIN


def test_launcher_and_ranks_end_with_the_process_that_called(base: Path, tmp_path: Path) -> None:
    told = given(base, tmp_path, training_mode="infinite", lr_scheduler="constant",
                 save_final_checkpoint=False) | {"nproc_per_node": 2}  # fmt: skip
    code = "import json, sys; from osft_trainer import osft; osft(**json.loads(sys.argv[1]))"
    folder = RunFolder(tmp_path)
    caller = subprocess.Popen([sys.executable, "-c", code, json.dumps(told)])
    try:
        until(lambda: steps(folder) > 1, 240)
        (launcher,) = children(caller.pid)
        ranks = children(launcher)
    finally:
        caller.kill()
        caller.wait()
    assert len(ranks) == 2
    until(lambda: not any(is_alive(pid) for pid in (launcher, *ranks)), 120)
    assert folder.complete_checkpoints()
