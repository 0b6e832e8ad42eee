"""Parameters whose effect no other test shows: what is accepted does something."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

import tiny
from osft_trainer import assembly
from osft_trainer.config import TrainingParameters
from osft_trainer.model import OSFTModel
from osft_trainer.optimizer import build_optimizer
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.data_file(folder / "data.jsonl")
    return tiny.model_folder(folder / "model")


def parameters(base: Path, out: Path, **changes: Any) -> TrainingParameters:
    return tiny.training(base, base.parent / "data.jsonl", out, **changes)


def built(told: TrainingParameters) -> OSFTModel:
    """The model as a run makes it."""
    folder = RunFolder(Path(told.ckpt_output_dir))
    folder.root.mkdir(parents=True, exist_ok=True)
    prepared, _ = assembly.prepare_data(told, folder, ALONE)
    model, *_ = assembly.build_model(
        told, folder, ALONE, base_digest="base", prepared=prepared, steps=1
    )
    return model


FORMS: list[tuple[dict[str, Any], dict[str, Any], str, int]] = [
    ({"is_pretraining": True, "block_size": 32}, {"text": "once upon a time"}, "rows", 18),
    (
        {"is_pretraining": True, "block_size": 17, "document_column_name": "body"},
        {"body": "once upon a time"},
        "samples",
        18,
    ),
    ({"use_processed_dataset": True}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "rows", 18),
    (
        {"unmask_messages": True},
        {"messages": [{"role": r, "content": "ab"} for r in ("user", "assistant")]},
        "loss_tokens",
        18 * 6,
    ),
]


@pytest.mark.parametrize(("told", "row", "counted", "count"), FORMS)
def test_data_of_every_form_are_trained_and_counted(
    base: Path, tmp_path: Path, told: dict[str, Any], row: dict[str, Any], counted: str, count: int
) -> None:
    """One bad line in nineteen, to see it counted where people look."""
    data = tmp_path / "data.jsonl"
    data.write_text("no JSON\n" + f"{json.dumps(row)}\n" * 18)
    run = tmp_path / "run"
    parameters = tiny.training(base, data, run, on_bad_sample="skip", num_epochs=1, **told)
    result = tiny.run(parameters)
    assert result.loss is not None
    counts = json.loads((run / "plan.json").read_text())["data"]
    assert (counts[counted], counts["skipped_bad"]) == (count, 1)
    progress = json.loads((run / "progress.json").read_text())
    shown = {metric["name"]: metric["value"] for metric in progress["metrics"]}
    assert shown["dataSkippedBad"] == "1"
    assert shown["dataSamples"] == str(counts["samples"])


def test_the_optimizer_is_the_one_that_was_told(base: Path, tmp_path: Path) -> None:
    told = parameters(base, tmp_path, beta1=0.7, beta2=0.8, eps=1e-5, weight_decay=0.3)
    value = torch.nn.Parameter(torch.ones(2, 2))
    (group,) = build_optimizer({"value": value}, told).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-5, 0.3)


def test_gradients_are_clipped_to_the_norm_that_was_told(base: Path, tmp_path: Path) -> None:
    """AdamW's first step hardly feels a scale; eps makes it one that does."""
    step = {"training_mode": "step", "max_steps": 2, "eps": 1.0, "weight_decay": 0.0}
    losses = []
    for norm in (1e-6, 1e9):
        told = parameters(base, tmp_path / str(norm), max_grad_norm=norm, **step)
        tiny.run(told)
        losses.append([row["loss"] for row in tiny.rows(told)])
    assert losses[0][0] == losses[1][0]
    first, clipped, free = losses[0][0], losses[0][1], losses[1][1]
    unmoved = parameters(base, tmp_path / "unmoved", learning_rate=1e-30, **step)
    tiny.run(unmoved)
    still = tiny.rows(unmoved)[1]["loss"]
    assert first == tiny.rows(unmoved)[0]["loss"]
    assert abs(clipped - still) < 1e-6 < abs(free - still)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_frozen_weights_and_arithmetic_have_the_dtype_that_was_told(
    base: Path, tmp_path: Path, name: str
) -> None:
    model = built(parameters(base, tmp_path, compute_dtype=name))
    frozen = {p.dtype for n, p in model.named_parameters() if "embed" in n or "effective" in n}
    assert frozen == {getattr(torch, name)}
    assert {p.dtype for p in model.trainables().values()} == {torch.float32}


@pytest.mark.parametrize("on", [True, False])
def test_blocks_are_recomputed_if_told(base: Path, tmp_path: Path, on: bool) -> None:
    core = {"parameterization": "core", "unfreeze_rank_ratio": 0.25}
    model = built(parameters(base, tmp_path, activation_checkpointing=on, **core))
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) is on
    assert all(subspace.keeps_free_part is not on for _, subspace in model.subspaces())


def test_code_of_a_model_runs_only_if_trusted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that leaves a trace when it is imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny.model_folder(tmp_path / "model")
    trace = tmp_path / "trace"
    (folder / "own.py").write_text(
        f"open({str(trace)!r}, 'a').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    config |= {"model_type": "own", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    told = (folder, base.parent / "data.jsonl", tmp_path / "run")
    with pytest.raises(ValueError, match="custom code"):
        built(tiny.training(*told))
    assert not trace.exists()
    model = built(tiny.training(*told, trust_remote_code=True))
    assert type(model.hf).__name__ == "Own"
    assert trace.exists()


def test_weights_and_biases_gets_what_was_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the service, which a test cannot have."""
    given: dict[str, Any] = {}
    logged: list[int] = []
    ended: list[int] = []
    run = SimpleNamespace(
        log=lambda row, step: logged.append(step), finish=lambda exit_code: ended.append(exit_code)
    )

    def init(**told: Any) -> SimpleNamespace:
        given.update(told)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    names = {"wandb_project": "p", "wandb_entity": "e", "wandb_run_name": "n"}
    tiny.run(parameters(base, tmp_path, **names))
    assert (given["project"], given["entity"], given["name"]) == ("p", "e", "n")
    assert (given["id"], given["resume"]) == (tiny.RUN_ID, "allow")
    assert (logged, ended) == ([1, 2, 3, 4, 5, 6], [0])
