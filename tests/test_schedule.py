"""How many steps a run has, and the learning rate of each."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import tiny
from osft_trainer.config import TrainingParameters
from osft_trainer.data import prepare
from osft_trainer.packing import batches
from osft_trainer.prepared import PreparedData
from osft_trainer.schedule import learning_rates, total_steps


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("data")
    data = tiny.data_file(folder / "data.jsonl")
    return prepare(data, tiny.tokenizer(), max_seq_len=64, on_overlong="error", cache_root=folder)


def parameters(**changes: object) -> TrainingParameters:
    return tiny.training(Path("model"), Path("data"), Path("out"), **changes)


def test_epochs_and_steps_are_counted(prepared: PreparedData) -> None:
    assert total_steps(parameters(num_epochs=3), prepared) == 3 * math.ceil(22 / 8)
    assert total_steps(parameters(training_mode="epoch"), prepared) == 3
    assert total_steps(parameters(training_mode="step", max_steps=7), prepared) == 7
    infinite = parameters(training_mode="infinite", lr_scheduler="constant")
    assert total_steps(infinite, prepared) is None


@pytest.mark.parametrize("max_tokens", [1, 60, 150, 229, 230, 231, 700, 10_001])
def test_tokens_end_with_the_step_that_reaches_them(
    prepared: PreparedData, max_tokens: int
) -> None:
    counted, steps = 0, 0
    for batch in batches(
        prepared, effective_batch_size=8, max_tokens_per_gpu=96, rank=0, world_size=1, seed=42
    ):
        counted, steps = counted + batch.loss_tokens, steps + 1
        if counted >= max_tokens:
            break
    training = parameters(training_mode="token", max_tokens=max_tokens)
    assert total_steps(training, prepared) == steps


def test_tokens_of_a_whole_epoch_need_no_further_step(prepared: PreparedData) -> None:
    whole = int(prepared.loss_counts.sum())
    assert total_steps(parameters(training_mode="token", max_tokens=whole), prepared) == 3
    assert total_steps(parameters(training_mode="token", max_tokens=whole + 1), prepared) == 4


def test_rates_follow_the_schedule() -> None:
    rates = learning_rates(parameters(warmup_steps=2, lr_scheduler="linear"), 10)
    assert [round(rates(step) / 0.01, 6) for step in range(10)] == [
        0, 0.5, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125
    ]  # fmt: skip
    cosine = learning_rates(parameters(), 10)
    assert cosine(0) == 0.01
    assert cosine(5) == pytest.approx(0.005)
    constant = learning_rates(
        parameters(training_mode="infinite", lr_scheduler="constant_with_warmup", warmup_steps=4),
        None,
    )
    assert constant(2) == 0.005
    assert constant(10**9) == 0.01


def test_arguments_reach_the_schedule() -> None:
    floor = learning_rates(
        parameters(lr_scheduler="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.25}), 10
    )
    assert floor(10) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("name", "arguments", "first", "last"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-3}, 0.01, 1e-3),
        ("polynomial", {"lr_end": 2e-3}, 0.01, 2e-3),
        ("polynomial", {}, 0.01, 1e-7),
    ],
)
def test_a_floor_is_a_rate_and_no_share(
    name: str, arguments: dict[str, float], first: float, last: float
) -> None:
    rates = learning_rates(parameters(lr_scheduler=name, lr_scheduler_kwargs=arguments), 10)
    assert (rates(0), rates(10)) == pytest.approx((first, last))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_scheduler": "cosin"}, ["'cosin'", "cosine_with_restarts", "linear"]),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, ["reduce_lr_on_plateau", "unknown"]),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, ["cycles", "num_cycles"]),
        ({"lr_scheduler_kwargs": {"num_cycles": "two"}}, ["num_cycles", "cosine"]),
        ({"lr_scheduler": "linear", "lr_scheduler_kwargs": {"power": 2}}, ["power", "none"]),
        ({"lr_scheduler": "constant", "warmup_steps": 5}, ["constant_with_warmup"]),
        (
            {"lr_scheduler": "constant", "lr_scheduler_kwargs": {"num_cycles": 1}},
            ["num_cycles", "none"],
        ),
        ({"lr_scheduler": "cosine_with_min_lr"}, ["min_lr"]),
        ({"lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.5}}, ["lr_end"]),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        learning_rates(parameters(**changes), 10)
    assert all(word in str(error.value) for word in words), error.value
