"""A run from arguments to folders: steps, modes, ranks, ends."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from osft_trainer import loop as loop_module
from osft_trainer.agreement import from_first_rank
from osft_trainer.config import RunParameters, TrainingParameters
from osft_trainer.data import open_prepared, prepare
from osft_trainer.identity import Fingerprint, claim
from osft_trainer.loop import backward
from osft_trainer.model import convert, load_model
from osft_trainer.optimizer import build_optimizer
from osft_trainer.outcome import Diverged, Preempted, Superseded
from osft_trainer.packing import batches, collate
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.targets import plan_targets

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(base, base.parent / "data.jsonl", out, **changes)


def test_a_run_writes_all_that_it_promises(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, checkpoint_at_epoch=True)
    result = tiny.run(told)
    folder = RunFolder(tmp_path)
    rows = tiny.rows(told)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert {row["totalSteps"] for row in rows} == {6}
    assert [row["samples"] for row in rows] == [8, 8, 6, 8, 8, 6]
    assert rows[0]["lr"] == 0.01
    assert rows[0]["leak"] < 1e-5
    assert 0 < rows[0]["leakExported"] < 1e-2
    assert rows[0]["leakMatrix"] == "model.layers.0.self_attn.q_proj"
    assert not any("leak" in row for row in rows[1:])
    progress = json.loads(folder.progress.read_text())
    assert {"leak", "leakExported"} <= {metric["name"] for metric in progress["metrics"]}
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert (result.steps, result.loss, result.final_dir) == (6, rows[-1]["loss"], folder.final)
    assert result.leak is not None
    assert result.leak < 1e-5
    assert result.leak_exported is not None
    assert result.leak < result.leak_exported < 1e-2
    assert [path.name for path in folder.complete_checkpoints()] == [
        "step-00000003",
        "step-00000006",
    ]
    assert folder.is_complete(folder.export_of_epoch(1))
    assert folder.is_complete(folder.export_of_epoch(2))
    plan = json.loads(folder.plan.read_text())
    assert (plan["steps"], len(plan["targets"]), plan["data"]["samples"]) == (6, 14, 22)
    assert plan["trainable"] > 0
    assert "model.embed_tokens.weight" in plan["uncovered"]


def test_the_final_folder_loads_in_transformers_and_gives_the_last_loss(
    base: Path, tmp_path: Path
) -> None:
    """The loss of one more step, computed by plain transformers on the exported folder."""
    short = parameters(base, tmp_path / "short", training_mode="step", max_steps=4,
                       lr_scheduler="constant")  # fmt: skip
    longer = parameters(base, tmp_path / "long", training_mode="step", max_steps=5,
                        lr_scheduler="constant")  # fmt: skip
    final = tiny.run(short).final_dir
    tiny.run(longer)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).chat_template == tiny.TEMPLATE
    total, count = 0.0, 0
    for sample in samples_of_step(longer, 4):
        out = model(input_ids=sample[0][None], labels=sample[1][None])
        counted = int((sample[1] != -100).sum())
        total, count = total + out.loss.item() * counted, count + counted
    assert total / count == pytest.approx(tiny.rows(longer)[4]["loss"], abs=1e-5)


def samples_of_step(told: TrainingParameters, step: int) -> list[tuple[Any, Any]]:
    """Samples of one global batch, unpacked again."""
    (folder,) = (Path(told.ckpt_output_dir) / "cache" / "data").iterdir()
    found = batches(
        open_prepared(folder), effective_batch_size=8, max_tokens_per_gpu=96, rank=0,
        world_size=1, seed=told.seed,
    )  # fmt: skip
    for _ in range(step):
        next(found)
    return [
        pair
        for micro in next(found).micro_batches
        for pair in zip(
            micro.input_ids[0].split(micro.lengths),
            micro.labels[0].split(micro.lengths),
            strict=True,
        )
    ]


def test_the_loss_of_a_step_is_the_mean_over_its_tokens_however_it_is_cut(
    base: Path, tmp_path: Path
) -> None:
    one = parameters(base, tmp_path / "one", max_tokens_per_gpu=100_000)
    many = parameters(base, tmp_path / "many", max_tokens_per_gpu=64)
    tiny.run(one)
    tiny.run(many)
    for whole, cut in zip(tiny.rows(one), tiny.rows(many), strict=True):
        assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-5)
        assert cut["gradNorm"] == pytest.approx(whole["gradNorm"], rel=1e-3)


@pytest.mark.parametrize(("ranks", "parameterization"), [(2, "exact"), (3, "factored")])
def test_ranks_give_the_losses_of_one(
    base: Path, tmp_path: Path, ranks: int, parameterization: str
) -> None:
    changes = {
        "other_parameters": "norms",
        "parameterization": parameterization,
        "max_tokens_per_gpu": 128,
    }
    alone = parameters(base, tmp_path / "alone", **changes)
    tiny.run(alone)
    together = parameters(base, tmp_path / "together", **changes)
    tiny.complete(together, ranks=ranks)
    for one, several in zip(tiny.rows(alone), tiny.rows(together), strict=True):
        assert several["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert several["gradNorm"] == pytest.approx(one["gradNorm"], rel=1e-3)
        assert several["lossTokens"] == one["lossTokens"]
    final = RunFolder(tmp_path / "together").final
    weights = AutoModelForCausalLM.from_pretrained(final).state_dict()
    for name, expected in (
        AutoModelForCausalLM.from_pretrained(RunFolder(tmp_path / "alone").final)
        .state_dict()
        .items()
    ):
        torch.testing.assert_close(weights[name], expected, atol=1e-3, rtol=0)


def test_bad_input_ends_every_rank_with_its_code(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, lr_scheduler="cosin")
    assert tiny.finish(tiny.start(told, ranks=2)) == [2, 2]
    (tmp_path / "bad.jsonl").write_text("no json\n")
    told = tiny.training(base, tmp_path / "bad.jsonl", tmp_path / "out")
    assert tiny.finish(tiny.start(told, ranks=2)) == [2, 2]


def test_a_full_disk_of_one_rank_ends_all_and_leaves_no_state(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, checkpoint_every_steps=1)
    assert tiny.finish(tiny.start(told, ranks=2, full_disk_of=1)) == [75, 75]
    assert RunFolder(tmp_path).complete_checkpoints() == []


def test_a_newer_attempt_takes_the_folder_away(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = parameters(base, tmp_path, checkpoint_every_steps=2, keep_checkpoints=9)
    folder = RunFolder(tmp_path)
    real = loop_module.backward
    steps = 0

    def overtaken(*args: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 3:
            newer = RunParameters(run_id=tiny.RUN_ID, attempt=2)
            claim(folder, newer, Fingerprint({"data": "", "model": ""}))
        return real(*args)

    monkeypatch.setattr(loop_module, "backward", overtaken)
    with pytest.raises(Superseded, match="attempt 2"):
        tiny.run(told)
    # The state of step 2 was being written just then: it may have come to its name or not.
    assert folder.complete_checkpoints() in ([], [folder.checkpoint(2)])
    assert not folder.final.exists()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"training_mode": "step", "max_steps": 4}, 4),
        ({"training_mode": "token", "max_tokens": 100}, 2),
        ({"training_mode": "epoch", "effective_batch_size": 22, "num_epochs": 1}, 1),
    ],
)
def test_each_mode_ends_where_it_says(
    base: Path, tmp_path: Path, changes: dict[str, Any], steps: int
) -> None:
    told = parameters(base, tmp_path, **changes)
    assert tiny.run(told).steps == steps
    rows = tiny.rows(told)
    assert len(rows) == steps
    if "max_tokens" in changes:
        counts = [row["lossTokens"] for row in rows]
        assert sum(counts) >= 100 > sum(counts[:-1])


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> threading.Event:
    """A stop that is asked for while step number `steps` runs."""
    stop = threading.Event()
    real = loop_module.backward
    count = 0

    def counting(*args: Any) -> float:
        nonlocal count
        count += 1
        if count == steps:
            stop.set()
        return real(*args)

    patch.setattr(loop_module, "backward", counting)
    return stop


def test_an_endless_run_stops_with_a_state_and_a_model_and_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = parameters(base, tmp_path, training_mode="infinite", lr_scheduler="constant")
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="after step 4"):
        tiny.run(told, stop_after(4, patch))
    assert folder.is_complete(folder.final)
    assert folder.complete_checkpoints() == [folder.checkpoint(4)]
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="after step 7"):
        tiny.run(told, stop_after(3, patch))
    assert [row["step"] for row in tiny.rows(told)] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads((folder.final / "osft.json").read_text())["steps"] == 7


def test_a_stop_saves_and_says_so_and_the_run_ends_as_if_undisturbed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parameters(base, tmp_path / "whole")
    tiny.run(whole)
    told = parameters(base, tmp_path / "stopped")
    folder = RunFolder(tmp_path / "stopped")
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="saved"):
        tiny.run(told, stop_after(2, patch))
    assert folder.complete_checkpoints() == [folder.checkpoint(2)]
    assert not folder.final.exists()
    assert tiny.run(told).steps == 6
    assert tiny.rows(told) == tiny.rows(whole)


def test_a_stop_before_the_first_step_leaves_nothing(base: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Preempted, match="nothing was done"):
        tiny.run(parameters(base, tmp_path), stop)
    assert RunFolder(tmp_path).complete_checkpoints() == []


def test_a_finished_run_returns_at_once(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path)
    first = tiny.run(told)
    written = RunFolder(tmp_path).metrics.read_bytes()
    again = tiny.run(told)
    assert again.already_finished
    assert not first.already_finished
    assert replace(again, already_finished=False) == first
    assert RunFolder(tmp_path).metrics.read_bytes() == written


def test_without_final_the_state_stays_and_nothing_is_trained_again(
    base: Path, tmp_path: Path
) -> None:
    told = parameters(base, tmp_path, save_final_checkpoint=False)
    first = tiny.run(told)
    assert first.final_dir is None
    assert RunFolder(tmp_path).complete_checkpoints() == [RunFolder(tmp_path).checkpoint(6)]
    again = tiny.run(told)
    assert again.already_finished
    assert again.loss == first.loss
    assert len(tiny.rows(told)) == 6


def test_divergence_stops_before_the_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = parameters(base, tmp_path, checkpoint_every_steps=1, keep_checkpoints=9)
    real = loop_module.backward
    losses = iter([0.0, 0.0, math.nan])
    monkeypatch.setattr(loop_module, "backward", lambda *args: real(*args) + next(losses))
    with pytest.raises(Diverged, match=r"step 3 \(last loss \d.*learning_rate"):
        tiny.run(told)
    assert len(RunFolder(tmp_path).complete_checkpoints()) == 2
    assert [row["step"] for row in tiny.rows(told)] == [1, 2]


def test_gradients_that_are_no_number_are_divergence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop_module.backward

    def spoiled(model: Any, *args: Any) -> torch.Tensor:
        loss = real(model, *args)
        next(iter(model.trainables().values())).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(loop_module, "backward", spoiled)
    with pytest.raises(Diverged, match="gradient norm"):
        tiny.run(parameters(base, tmp_path))
    assert tiny.rows(parameters(base, tmp_path)) == []


@pytest.mark.parametrize("others", ["frozen", "norms", "all"])
def test_other_parameters_change_only_as_told(base: Path, tmp_path: Path, others: str) -> None:
    told = parameters(base, tmp_path, other_parameters=others, training_mode="step", max_steps=2)
    final = tiny.run(told).final_dir
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(final).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = {name for name in before if "_proj" in name}
    norms = {name for name in before if "norm" in name}
    everything = set(before)
    assert changed == {"frozen": targets, "norms": targets | norms, "all": everything}[others]


def test_nothing_to_train_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leaves nothing to train"):
        tiny.run(parameters(base, tmp_path, unfreeze_rank_ratio=0.0))


def test_an_idle_rank_adds_nothing(base: Path) -> None:
    hf = load_model(base, torch.float32)
    model = convert(hf, plan_targets(hf, 0.5))
    data = base.parent
    prepared = prepare(
        data / "data.jsonl", tiny.tokenizer(), max_seq_len=64, on_overlong="error", cache_root=data
    )
    batch = next(
        batches(
            prepared, effective_batch_size=4, max_tokens_per_gpu=500, rank=0, world_size=1, seed=1
        )
    )
    loss = backward(model, batch, ALONE)
    gradients = {name: p.grad.clone() for name, p in model.trainables().items()}
    model.zero_grad()
    idle = replace(batch, micro_batches=(*batch.micro_batches, collate([])))
    assert backward(model, idle, ALONE) == loss
    for name, p in model.trainables().items():
        assert torch.equal(p.grad, gradients[name])


def test_only_matrices_decay(base: Path) -> None:
    hf = load_model(base, torch.bfloat16)
    model = convert(hf, plan_targets(hf, 0.5, other_parameters="norms"))
    told = parameters(base, Path("out"))
    optimizer = build_optimizer(model.trainables(), told, model.plan.trained_others)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups
             for p in group["params"]}  # fmt: skip
    names = {name: decay[id(p)] for name, p in model.trainables().items()}
    assert len(names) == 14 + 5
    assert all(value == (0.0 if "norm" in name else 0.1) for name, value in names.items())


def test_alone_nothing_is_sent() -> None:
    assert from_first_rank(ALONE, lambda: "text") == "text"
