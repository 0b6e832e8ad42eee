"""Ends with a name: what the termination message says, and what the exit code asks for."""

from __future__ import annotations

import errno
import json
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from osft_trainer import last_words, worker
from osft_trainer import loop as loop_module
from osft_trainer.api import OSFTResult, _error
from osft_trainer.last_words import Result
from osft_trainer.outcome import Diverged, NoLossTokens, OutOfMemory, TrainResult
from osft_trainer.parallel import World
from osft_trainer.report import TERMINATION_LOG_ENV, ExitCode, Retention, RunFolder, Termination
from osft_trainer.shards import HostCopy

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def run(base: Path, out: Path, **changes: Any) -> TrainResult:
    told = tiny.arguments(
        base, base.parent / "data.jsonl", out, checkpoint_every_steps=1, **changes
    )
    return worker.run(told, ALONE, stop=threading.Event(), environ={})


def at_third_step(patch: pytest.MonkeyPatch, instead: Callable[..., Any]) -> None:
    """Let something else happen in the place of the third step's backward."""
    real, count = loop_module.backward, 0

    def counted(*told: Any) -> Any:
        nonlocal count
        count += 1
        return instead(*told) if count == 3 else real(*told)

    patch.setattr(loop_module, "backward", counted)


def too_much_for_torch(*_: Any) -> Any:
    return torch.empty(2**50)


def too_much_for_python(*_: Any) -> Any:
    return bytearray(2**60)


def too_much_for_a_library(*_: Any) -> Any:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def too_much_for_the_gpu(*_: Any) -> Any:
    return torch.empty(2**45, device="cuda")


ENDS = [
    (too_much_for_torch, OutOfMemory, ExitCode.TRY_AGAIN, "the host.*max_tokens_per_gpu .now 96."),
    (too_much_for_python, OutOfMemory, ExitCode.TRY_AGAIN, "the host.*memory limit of the pod"),
    (too_much_for_a_library, OutOfMemory, ExitCode.TRY_AGAIN, "the GPU.*max_tokens_per_gpu"),
    pytest.param(
        too_much_for_the_gpu, OutOfMemory, ExitCode.TRY_AGAIN, "the GPU.*max_tokens_per_gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
    (
        lambda *_: torch.tensor(math.nan), Diverged, ExitCode.DIVERGED,
        "loss is nan at step 3.*lower learning_rate",
    ),
    (
        lambda *_: torch.tensor(-math.inf), Diverged, ExitCode.DIVERGED,
        "loss is -inf at step 3.*lower learning_rate",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("instead", "kind", "code", "words"), ENDS)
def test_an_end_has_a_name_a_cure_and_a_state_before_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    instead: Callable[..., Any], kind: type[Exception], code: ExitCode, words: str,
) -> None:  # fmt: skip
    """What memory could not hold is asked of the real allocators."""
    with monkeypatch.context() as patch:
        at_third_step(patch, instead)
        with pytest.raises(kind, match=words) as ended:
            run(base, tmp_path)
    said = last_words.of_error(ended.value, rank=0)
    assert (said.reason, said.exit_code) == (kind.__name__, code)
    log = tmp_path / "termination"
    last_words.leave(said, {TERMINATION_LOG_ENV: str(log)})
    document = json.loads(log.read_text())
    assert Termination.model_validate(document).message == said.message
    assert RunFolder(tmp_path).complete_checkpoints()
    if kind is OutOfMemory:
        assert "after step 2" in said.message
        assert run(base, tmp_path).steps == 6, "another try goes on"


def test_pinned_memory_is_the_hosts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA says the same of it as of a device."""

    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(HostCopy, "take", full)
    cures = "train on more processes, which share the model, or raise the memory limit of the pod"
    with pytest.raises(OutOfMemory, match=rf"the host .* phase Saving.*\): {cures}$"):
        run(base, tmp_path)


def test_a_batch_without_loss_tokens_is_bad_input(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparation drops such samples, so the test takes the count away from one batch."""
    real = loop_module.batches

    def without(*told: Any, **named: Any) -> Any:
        for number, batch in enumerate(real(*told, **named), start=1):
            yield replace(batch, loss_tokens=0) if number == 2 else batch

    monkeypatch.setattr(loop_module, "batches", without)
    words = r"^data_path: step 2 \(epoch 1, batch 2\) has 8 samples and no token.*labels"
    with pytest.raises(NoLossTokens, match=words) as ended:
        run(base, tmp_path)
    said = last_words.of_error(ended.value)
    assert (said.reason, said.exit_code) == ("NoLossTokens", ExitCode.BAD_INPUT)
    assert len(tiny.rows(tiny.training(base, base, tmp_path))) == 1
    assert RunFolder(tmp_path).verdict.is_file(), "no retry helps"


def test_python_raises_what_launched_ranks_died_of() -> None:
    words = last_words.of_error(OutOfMemory("the GPU has no memory left"))
    with pytest.raises(OutOfMemory, match=r"no memory left \(calling again resumes\)"):
        raise _error(words)


def test_a_full_disk_is_told_with_a_cure_wherever_it_was_met() -> None:
    words = last_words.of_error(OSError(errno.ENOSPC, "No space left on device", "run/plan.json"))
    assert words.exit_code == ExitCode.TRY_AGAIN
    assert words.message == (
        "OSError: No space left on device: run/plan.json; free or add space on this volume"
    )


def test_a_result_survives_being_a_document() -> None:
    result = TrainResult(
        Path("/f"), 3, 0.5, 1e-7, retention=Retention(loss_before=0.5, loss_after=0.25),
        leak_exported=0.01, validation_loss=0.6, best_validation_loss=0.4, already_finished=True,
    )  # fmt: skip
    told = Result.parse(Result.of(result).to_json())
    assert told is not None
    assert told.to_result() == result
    assert vars(OSFTResult(**vars(result))) == vars(result)
