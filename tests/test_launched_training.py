"""The two commands of a trainer's container, with real training behind them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from transformers import AutoModelForCausalLM

import tiny
from launching import free_port, listeners
from osft_trainer.report import ExitCode, Progress, RunFolder, read_document


def test_two_launched_ranks_are_stopped_and_one_process_finishes(tmp_path: Path) -> None:
    model = tiny.model_folder(tmp_path / "model")
    data = tiny.data_file(tmp_path / "data.jsonl")
    folder = RunFolder(tmp_path / "run")
    told = tiny.argv(model, data, folder.root, num_epochs=20)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    launcher = subprocess.Popen(
        [sys.executable, "-m", "osft_trainer.launch", *told, "--nproc-per-node=2"], env=environ
    )
    try:
        wait_for_lines(folder.metrics, 2, launcher)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == ExitCode.PREEMPTED
    finally:
        launcher.kill()
    (state,) = folder.complete_checkpoints()
    step = folder.step_of(state)
    assert step is not None
    assert 2 <= step < 60
    assert not folder.final.exists()

    ended = subprocess.run(
        [sys.executable, "-m", "osft_trainer", *told],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert ended.returncode == ExitCode.DONE, ended.stderr
    assert f"resumed after step {step} from {state}" in ended.stderr
    assert "Liger kernels are off: they need CUDA" in ended.stderr
    rows = tiny.rows(tiny.training(model, data, folder.root))
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    progress = read_document(folder.progress, Progress)
    assert progress is not None
    assert (progress.phase, progress.step, progress.total_steps) == ("Done", 60, 60)
    assert progress.final == str(folder.final)
    AutoModelForCausalLM.from_pretrained(folder.final)


def test_two_ranks_prepare_once_and_serve_what_became_of_the_data(tmp_path: Path) -> None:
    model = tiny.model_folder(tmp_path / "model")
    data = tiny.data_file(tmp_path / "data.jsonl")
    usable = data.read_text().splitlines()
    question, answer = ({"role": role, "content": "a" * 90} for role in ("user", "assistant"))
    bad, long = json.dumps({"messages": []}), json.dumps({"messages": [question, answer]})
    data.write_text("\n".join([bad, *usable, long, bad]))
    folder = RunFolder(tmp_path / "run")
    port = free_port()
    told = tiny.argv(
        model, data, folder.root, num_epochs=100, on_bad_sample="skip", on_overlong="drop",
        nproc_per_node=2, metrics_port=port,
    )  # fmt: skip
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "osft_trainer.launch", *told], env=environ, stderr=stderr
        )
        try:
            wait_for_lines(folder.metrics, 1, launcher)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answered:
                lines = answered.read().decode().splitlines()
            open_to = listeners(launcher.pid)
        finally:
            launcher.terminate()
            launcher.wait(60)
    # Gloo and the metrics; nothing of torch's rendezvous, and nothing for other machines.
    assert ("127.0.0.1", port) in open_to
    assert {address for address, _ in open_to} == {"127.0.0.1"}
    assert log.read_text().count(f"prepared {data}: ") == 1
    wanted = {"Samples": len(usable), "SkippedBad": 2, "DroppedOverlong": 1, "Truncated": 0}
    for name, count in wanted.items():
        assert f'osft_training_metric{{name="data{name}"}} {count}.0' in lines
    counts = json.loads(folder.plan.read_text())["data"]
    assert (counts["samples"], counts["skipped_bad"], counts["dropped_overlong"]) == (
        len(usable), 2, 1,
    )  # fmt: skip


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the launcher ended before it was stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
