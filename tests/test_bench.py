"""What bench.train_step compares, its table, its models; what the retention screen picks."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import tiny
from bench import shapes, train_step, turns
from bench.methods import CUDA_ONLY, METHODS, PLAIN, Setting
from bench.tables import bases_table, checkpoint_table, training_table
from osft_trainer.parallel import World


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in CUDA_ONLY])
def test_a_method_trains_saves_and_exports(name: str, base: Path, tmp_path: Path) -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    method = METHODS[name](Setting(base, tmp_path, world, torch.float32, 0.25, False, False))
    tokens = torch.arange(64)[None] % 50
    for group in method.optimizer.param_groups:
        group["lr"] = 1e-2
    losses = [method.step(tokens) for _ in range(6)]
    assert losses[-1] < losses[0]
    held = method.static_bytes()
    trained = sum(p.numel() for p in method.trainables.values())
    seconds = sum(
        prod(method.shared[name].shape(p.shape)) if name in method.shared else p.numel()
        for name, p in method.trainables.items()
    )
    assert held["optimizer"] == 4 * (trained + seconds)
    assert held["parameters"] >= 4 * trained
    assert method.save(tmp_path / "state") > 8 * trained + 4 * seconds
    method.export(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    started = AutoModelForCausalLM.from_pretrained(base)
    name_of = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(exported.get_parameter(name_of), started.get_parameter(name_of))


@pytest.mark.parametrize("name", ["OSFT exact", "OSFT factored", "OSFT activations", "PEFT OSF"])
def test_a_step_is_the_same_work_with_random_bases(name: str, base: Path, tmp_path: Path) -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    held = []
    for random_bases in (False, True):
        setting = Setting(
            base, tmp_path, world, torch.bfloat16, 0.25, False, False, random_bases=random_bases
        )
        method = METHODS[name](setting)
        assert math.isfinite(method.step(torch.arange(64)[None] % 50))
        assert ("decompose" in method.seconds) != random_bases
        held.append((method.static_bytes(), [p.shape for p in method.trainables.values()]))
    assert held[0] == held[1]


def numbers(steps: list[float], **changes: Any) -> dict[str, Any]:
    return {
        "step_seconds": steps,
        "start_seconds": {"load": 0.5, "decompose": 2.0},
        "static_bytes": {"parameters": 600_000_000, "buffers": 0, "optimizer": 400_000_000},
        "peak_bytes": 4 * 10**9,
        "saved_bytes": 10**9,
        "save_seconds": 1.0,
        "export_seconds": None,
        **changes,
    }


def test_the_table_gives_ratios_of_the_same_round() -> None:
    result: dict[str, Any] = {
        "machine": "m",
        "device": "cuda",
        "threads": 1,
        "torch": "2",
        "date": "d",
        "shape": "quick",
        "weights": 10**8,
        "tokens": 100,
        "ratio": 0.25,
        "dtype": "bfloat16",
        "step_flops": 1e12,
        "peak_flops": 1e13,
        "methods": {
            PLAIN: numbers([1.0, 2.0, 4.0]),
            "OSFT": numbers([0.5, 1.8, 4.4], peak_bytes=2 * 10**9),
        },
    }
    last = training_table(result).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[:7] == ["OSFT", "1.800", "**0.90**", "0.50 to 1.10", "56", "1.000", "1.00"]
    assert cells[7:10] == ["2.00", "0.50", "6%"]
    assert cells[10:] == ["0.50", "2.00", "", "1.000", "1.00", ""]
    # A result of an older command has no peaks.
    result["methods"]["OSFT"]["peak_bytes"] = None
    assert "MFU" not in training_table(result)
    # Of a command that ended early: what is of no pair is compared by the medians.
    result["methods"]["OSFT"] = numbers([3.0, 1.0])
    assert "| **1.00** | 1.00 to 1.00 |" in training_table(result).splitlines()[-1]


def test_tables_of_split_and_save_give_medians() -> None:
    about = {"machine": "a processor", "threads": 2, "torch": "2", "date": "2026-01-31"}
    split = {"shape": [1024, 3584], "largest_sine": 3e-8}
    split |= {"svd_seconds": [4.0, 5.0, 2.0], "seconds": [1.0, 2.0, 1.0]}
    cache = {"matrices": 7, "empty_seconds": 4.0, "full_seconds": [0.1, 0.02, 0.02]}
    found = bases_table({**about, "form": "exact", "ratio": 0.25, "bases": [split], "cache": cache})
    assert "| 1,024 x 3,584 | 4.00 | 1.00 | **0.40** | 0.25 to 0.50 | 3e-08 |" in found
    assert "4.00 s with an empty cache, after 0.020 s with a full one: 200 times" in found
    saved = {"megabytes": 1258.3, "to": "disk", "save_seconds": [5.0, 4.0, 6.0]}
    saved |= {"stall_seconds": [0.1, 0.2, 0.1], "step_seconds_alone": 0.1}
    found = checkpoint_table({**about, **saved, "step_seconds_beside_a_save": 0.15})
    assert "| 5.000 (4.000 to 6.000) | 0.100 (0.100 to 0.200) | **2.0%** | x 1.50 |" in found


def test_what_is_known_of_a_method_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One turn ends well, one dies while it saves, one takes too long, one says nothing."""
    told = argparse.Namespace(
        rounds=2, minutes=None, turn_minutes=1.0, device="cpu", shape="quick", base=tmp_path,
        steps=2, tokens=8, ratio=0.25, threads=1, random_bases=True,
    )  # fmt: skip
    kept: list[tuple[dict[str, Any], dict[str, str]]] = []

    def run(command: list[str], stdout: Any, **_: Any) -> Any:
        name, turn = command[3].removeprefix("--only="), command[-2].removeprefix("--turn=")
        if name == "silent":
            return subprocess.CompletedProcess(command, 1)
        steps = [3.0, 1.0, 2.0] if turn == "0" else [5.0, 6.0, 7.0]
        stdout.write(f"a bar\n{json.dumps(numbers(steps))}\n")
        if name == "slow":
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, 137 if name == "killed" else 0)

    monkeypatch.setattr(turns.subprocess, "run", run)
    names = ["good", "killed", "slow", "silent"]
    turns.one_by_one(names, told, tmp_path, lambda found, failed: kept.append((found, {**failed})))
    assert len(kept) == 5, "after each turn"
    found, failed = kept[-1]
    seconds = {name: one["step_seconds"] for name, one in found.items()}
    assert seconds == {"good": [2.0, 6.0], "killed": [3.0, 1.0, 2.0], "slow": [3.0, 1.0, 2.0]}
    assert "exit code 137" in failed["killed"]
    assert "60 seconds" in failed["slow"]
    assert "exit code 1," in failed["silent"]
    assert not any((tmp_path / str(number)).exists() for number in range(4))


def test_a_turn_says_its_steps_before_its_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(0, 0, 1, torch.device("cpu"))
    setting = Setting(base, tmp_path, world, torch.float32, 0.25, False, False)
    told = argparse.Namespace(steps=3, turn=0, rounds=1, work=tmp_path)
    free = 2**40
    monkeypatch.setattr(
        turns.shutil, "disk_usage", lambda _: argparse.Namespace(total=free, used=0, free=free)
    )
    turns.take("OSFT core", setting, torch.arange(64)[None] % 50, told)
    steps, whole = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(steps["step_seconds"]) == 3
    assert isinstance(steps["peak_bytes"], int)
    assert steps["saved_bytes"] is None
    assert whole["step_seconds"] == steps["step_seconds"]
    assert whole["saved_bytes"] > 0
    assert not (tmp_path / "cache").exists()
    free = 0
    assert turns.of_files(METHODS["OSFT core"](setting), tmp_path) == {}


def test_an_earlier_result_is_added_to(base: Path) -> None:
    setting = {"device": "cuda", "torch": "2", "random_bases": True}
    before = {**setting, "date": "1", "methods": {PLAIN: 1, "OSFT core": 2}, "failed": {"x": "so"}}
    now = {**setting, "date": "2", "methods": {"OSFT exact": 3, PLAIN: 4}, "failed": {}}
    both = train_step.added(before, now)
    assert list(both["methods"].items()) == [(PLAIN, 4), ("OSFT exact", 3), ("OSFT core", 2)]
    assert (both["date"], both["failed"]) == ("2", {"x": "so"})
    with pytest.raises(ValueError, match="another torch"):
        train_step.added({**before, "torch": "3"}, now)


def test_a_model_is_taken_again_only_when_it_is_whole(tmp_path: Path) -> None:
    assert not shapes.is_whole(tmp_path, "quick")
    shapes.save("quick", tmp_path, torch.bfloat16)
    assert shapes.is_whole(tmp_path, "quick")
    with pytest.raises(ValueError, match=r"is no llama-27m: vocab_size"):
        shapes.is_whole(tmp_path, "llama-27m")
    (tmp_path / "tokenizer.json").unlink()
    assert not shapes.is_whole(tmp_path, "quick"), "its weights may be cut"


def test_an_embedding_that_is_only_looked_up_multiplies_nothing() -> None:
    every, multiplied = shapes.counted("llama-3.1-8b")
    assert every - multiplied == 128256 * 4096
    assert len(set(shapes.counted("qwen2.5-1.5b"))) == 1, "tied: the head multiplies with it"
    for shape in ("quick", "llama-27m"):
        model_class, config_class, values = shapes.SHAPES[shape]
        with torch.device("meta"):
            model = model_class(config_class(**values, attn_implementation="eager"))
        tokens = 128
        ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as flops:
            model(input_ids=ids, position_ids=ids).logits.sum().backward()
        # The first layer's input needs no gradient.
        counted = shapes.step_flops(shape, shapes.counted(shape)[1], tokens)
        assert flops.get_total_flops() == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "weights"),
    [("llama-100m", 109e6), ("qwen2.5-1.5b", 1.54e9), ("llama-3.1-8b", 8.03e9)],
)
def test_shapes_have_the_size_of_their_name(shape: str, weights: float) -> None:
    model_class, config_class, values = shapes.SHAPES[shape]
    with torch.device("meta"):
        model = model_class(config_class(**values))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, rel=0.01)


def test_the_best_setting_of_a_screen_goes_on_to_every_task_and_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    stages = importlib.import_module("retention_stages")
    tasks = importlib.import_module("retention_tasks")
    training = importlib.import_module("retention_training")
    scope = stages.Scope()

    def outcome(job: Any) -> Any:
        # Learns at one rate only, and keeps more at the greater ratio.
        learned = job.learning_rate == 1e-3
        return training.Outcome(job, 1.0 if learned else 0.5, job.ratio, None, None, 0.0)

    best = stages.best_settings(scope.methods, [outcome(j) for j in stages.screen_jobs(scope)])
    assert set(best) == set(scope.methods)
    assert {job.learning_rate for job in best.values()} == {1e-3}
    ratios = {job.ratio for name, job in best.items() if not name.startswith("plain")}
    assert ratios == {0.5}
    finals = stages.final_jobs(scope, best)
    trained: list[Any] = []

    def train_all(jobs: Any) -> Any:
        trained.extend(jobs)
        return [outcome(job) for job in reversed(jobs)]

    trainings = training.Trainings(train_all)
    screen = stages.screen_jobs(scope)
    assert [each.job for each in trainings.run_all(screen)] == screen
    assert [each.job for each in trainings.run_all(finals)] == finals
    assert len(trained) == len(set(trained)), "what the screen has trained is not trained again"
    assert len(screen) + len(finals) - len(trained) == len(scope.methods) * len(stages.SCREENED)
    assert len(finals) == len(scope.methods) * len(tasks.NEW) * len(scope.seeds)
    assert {job.lacks for job in stages.gap_jobs(scope, best)} == {"inc"}
    assert {job.method for job in stages.room_jobs(scope)} <= set(scope.methods)
