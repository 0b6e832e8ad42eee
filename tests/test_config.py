"""The contract's parameters: names, values, rules, and the command line that carries them."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from drawn import examples
from osft_trainer.arguments import TrainerArguments, describe, explain, from_argv
from osft_trainer.config import (
    LaunchParameters,
    RunParameters,
    TrainingParameters,
)
from osft_trainer.parameters import WHITE_SPACE

REQUIRED: dict[str, Any] = {
    "model_path": "/mnt/model",
    "data_path": "/mnt/data.jsonl",
    "ckpt_output_dir": "/mnt/out",
    "unfreeze_rank_ratio": 0.25,
    "effective_batch_size": 8,
    "max_tokens_per_gpu": 2048,
    "max_seq_len": 1024,
    "learning_rate": 5e-6,
}


def training(**changes: Any) -> TrainingParameters:
    return TrainingParameters.model_validate({**REQUIRED, **changes})


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20
)
TEXT = TEXT.map(str.strip).filter(bool)
KWARGS = st.dictionaries(
    TEXT, st.one_of(st.integers(), st.floats(allow_nan=False), TEXT), max_size=3
)
MODES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.builds(dict, training_mode=st.just("epoch"), num_epochs=st.integers(1, 10**6)),
    st.builds(dict, training_mode=st.just("step"), max_steps=st.integers(1, 10**9)),
    st.builds(dict, training_mode=st.just("token"), max_tokens=st.integers(1, 10**15)),
    st.just({"training_mode": "infinite", "lr_scheduler": "constant"}),
)
TRAININGS = st.builds(
    lambda mode, rest: training(**rest, **mode),
    MODES,
    st.fixed_dictionaries(
        {
            "model_path": TEXT,
            "unfreeze_rank_ratio": st.floats(0, 1),
            "learning_rate": st.floats(1e-12, 1),
            "max_seq_len": st.integers(1, 2048),
        },
        optional={
            "target_patterns": st.lists(TEXT, min_size=1, max_size=3),
            "lr_scheduler_kwargs": KWARGS,
            "eps": st.floats(1e-300, 1),
            "use_liger": st.booleans(),
            "save_dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
            "wandb_project": TEXT,
            "mlflow_tracking_uri": TEXT,
            "tensorboard": st.booleans(),
            "checkpoint_every_steps": st.integers(1, 10**9),
            "checkpoint_every_minutes": st.floats(1e-3, 10**6),
            "seed": st.integers(0, 2**32 - 1),
        },
    ),
)
RUNS = st.builds(RunParameters, run_id=st.none() | TEXT, attempt=st.integers(1, 9))
LAUNCHES = st.builds(
    LaunchParameters,
    nproc_per_node=st.sampled_from([None, 1, 8, "auto", "gpu"]),
    nnodes=st.none() | st.integers(1, 1000),
    rdzv_endpoint=st.none() | TEXT,
    metrics_port=st.none() | st.integers(1, 65535),
)


@settings(deadline=None, max_examples=examples(80), suppress_health_check=[HealthCheck.too_slow])
@given(st.builds(TrainerArguments, TRAININGS, RUNS, LAUNCHES))
def test_the_command_line_carries_every_value(arguments: TrainerArguments) -> None:
    assert from_argv(arguments.to_argv()) == arguments


@pytest.mark.parametrize("text", ["--", "-", "---", "--seed", "=", "-- --"])
def test_a_text_that_looks_like_a_flag_is_a_value(text: str) -> None:
    told = training(mlflow_tracking_uri=text, target_patterns=[text, "q_proj", text])
    arguments = TrainerArguments(told, RunParameters(run_id=text))
    assert from_argv(arguments.to_argv()) == arguments


@pytest.mark.parametrize("identity", [7, "7", "uid-7", 0])
def test_a_rendezvous_id_means_the_same_on_both_sides(identity: int | str) -> None:
    arguments = TrainerArguments(training(), launch=LaunchParameters(rdzv_id=identity))
    assert str(from_argv(arguments.to_argv()).launch.rdzv_id) == str(identity)


NUMBERS = [
    name
    for name, field in TrainingParameters.model_fields.items()
    if {int, float} & {field.annotation, *get_args(field.annotation)}
]
SWITCHES = [
    name for name, field in TrainingParameters.model_fields.items() if field.annotation is bool
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(name: str, value: bool) -> None:
    """unfreeze_rank_ratio=True would be full fine-tuning."""
    with pytest.raises(ValidationError) as caught:
        training(**{name: value})
    assert f"{name}: must be a number, and {str(value).lower()} is none" in explain(caught.value)[0]


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [1, 0, "true", "no"])
def test_a_number_or_text_is_no_truth_value(name: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        training(**{name: value})
    assert f"{name}: must be true or false, without quotes" in explain(caught.value)[0]


def test_on_a_command_line_all_is_text() -> None:
    told = training(use_liger=False, unfreeze_rank_ratio=1, num_epochs=3)
    assert from_argv(TrainerArguments(told).to_argv()).training == told
    with pytest.raises(ValueError, match="unfreeze_rank_ratio"):
        from_argv([*TrainerArguments(told).to_argv(), "--unfreeze-rank-ratio=true"])


@pytest.mark.parametrize("value", [True, False])
def test_processes_and_nodes_are_no_truth_values(value: bool) -> None:
    for name in ("nproc_per_node", "nnodes", "node_rank", "master_port"):
        with pytest.raises(ValidationError, match="is none: give a number"):
            LaunchParameters(**{name: value})


@pytest.mark.parametrize("value", ["5e-6", 5e-6, "0.000005"])
def test_a_number_may_be_written_as_yaml_reads_it(value: object) -> None:
    """PyYAML reads 5e-6 as a string; kubectl as a number."""
    assert training(learning_rate=value).learning_rate == 5e-6


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("learning_rte", "learning_rate"),
        ("unfreezeRankRatio2", "unfreezeRankRatio"),
        ("use_liger_kernels", "use_liger"),
        ("batch_size", "effective_batch_size"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        training(**{name: 1})
    (line,) = explain(refusal.value)
    assert f"unknown parameter {name!r}; did you mean {nearest!r}?" in line


def test_an_unknown_flag_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TrainerArguments(training()).to_argv(), "--max-seq-length=3"]
    with pytest.raises(SystemExit) as end:
        from_argv(argv)
    assert end.value.code == 2
    assert "did you mean '--max-seq-len'?" in capsys.readouterr().err


RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("max_seq_len 4096 must be at most max_tokens_per_gpu 2048",
     {"max_seq_len": 2048}, {"max_seq_len": 4096}),
    ("is_pretraining needs block_size",
     {"is_pretraining": True, "block_size": 8}, {"is_pretraining": True}),
    ("block_size 8 must be at most max_seq_len 7",
     {"is_pretraining": True, "block_size": 8, "max_seq_len": 8},
     {"is_pretraining": True, "block_size": 8, "max_seq_len": 7}),
    ("block_size has no effect without is_pretraining", {}, {"block_size": 8}),
    ("document_column_name has no effect without is_pretraining",
     {"is_pretraining": True, "block_size": 8, "document_column_name": "body"},
     {"document_column_name": "body"}),
    ("is_pretraining and unmask_messages exclude one another",
     {"unmask_messages": True},
     {"unmask_messages": True, "is_pretraining": True, "block_size": 8}),
    ("use_processed_dataset and unmask_messages exclude one another",
     {"use_processed_dataset": True}, {"unmask_messages": True, "use_processed_dataset": True}),
    ("selective_activation_checkpointing has no effect without activation_checkpointing",
     {"selective_activation_checkpointing": True},
     {"selective_activation_checkpointing": True, "activation_checkpointing": False}),
    ("on_overlong drop has no effect with is_pretraining",
     {"on_overlong": "drop"},
     {"on_overlong": "drop", "is_pretraining": True, "block_size": 8}),
    ("training_mode step needs max_steps",
     {"training_mode": "step", "max_steps": 5}, {"training_mode": "step"}),
    ("training_mode token needs max_tokens",
     {"training_mode": "token", "max_tokens": 5}, {"training_mode": "token"}),
    ("num_epochs 2 has no effect in training_mode step",
     {"training_mode": "epoch", "num_epochs": 2},
     {"training_mode": "step", "max_steps": 5, "num_epochs": 2}),
    ("max_steps 5 has no effect in training_mode epoch", {}, {"max_steps": 5}),
    ("max_tokens 5 has no effect in training_mode infinite",
     {"training_mode": "infinite", "lr_scheduler": "constant"},
     {"training_mode": "infinite", "lr_scheduler": "constant", "max_tokens": 5}),
    ("lr_scheduler cosine needs an end",
     {"training_mode": "infinite", "lr_scheduler": "constant_with_warmup"},
     {"training_mode": "infinite"}),
    ("wandb_entity has no effect without wandb_project",
     {"wandb_entity": "team", "wandb_project": "p"}, {"wandb_entity": "team"}),
    ("wandb_run_name has no effect without wandb_project",
     {"wandb_run_name": "r", "wandb_project": "p"}, {"wandb_run_name": "r"}),
    ("mlflow_experiment_name has no effect without mlflow_tracking_uri",
     {"mlflow_experiment_name": "e", "mlflow_tracking_uri": "u"}, {"mlflow_experiment_name": "e"}),
    ("mlflow_run_name has no effect without mlflow_tracking_uri",
     {"mlflow_run_name": "r", "mlflow_tracking_uri": "u"}, {"mlflow_run_name": "r"}),
    ("validation_split 0.1 and validation_data_path exclude each other",
     {"validation_data_path": "v"}, {"validation_data_path": "v", "validation_split": 0.1}),
    ("validation_frequency has no effect without validation data",
     {"validation_frequency": 5, "validation_split": 0.1}, {"validation_frequency": 5}),
    ("validate_at_epoch has no effect without validation data",
     {"validate_at_epoch": True, "validation_data_path": "v"}, {"validate_at_epoch": True}),
    ("save_best_val_loss has no effect without validation data",
     {"save_best_val_loss": True, "validation_split": 0.1}, {"save_best_val_loss": True}),
    ("val_loss_improvement_threshold has no effect without save_best_val_loss",
     {"val_loss_improvement_threshold": 0.1, "save_best_val_loss": True, "validation_split": 0.1},
     {"val_loss_improvement_threshold": 0.1, "validation_split": 0.1}),
    ("the validation data is never used",
     {"validation_split": 0.1, "validate_at_final": False, "validate_at_epoch": True},
     {"validation_split": 0.1, "validate_at_final": False}),
    ("the validation data is never used",
     {"validation_split": 0.1, "validation_frequency": 9,
      "training_mode": "infinite", "lr_scheduler": "constant"},
     {"validation_split": 0.1, "training_mode": "infinite", "lr_scheduler": "constant"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "accepted", "refused"), RULES, ids=lambda value: str(value)[:40])
def test_rules_between_parameters(
    rule: str, accepted: dict[str, Any], refused: dict[str, Any]
) -> None:
    training(**accepted)
    with pytest.raises(ValidationError) as refusal:
        training(**refused)
    assert any(rule in line for line in explain(refusal.value))


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        ({"rdzv_endpoint": "h:1"}, {"rdzv_endpoint": "h:1", "master_addr": "h"}),
        ({"nproc_per_node": 1024}, {"nproc_per_node": 0}),
        ({"nproc_per_node": "gpu"}, {"nproc_per_node": "cpus"}),
    ],
)
def test_rules_of_launch_parameters(accepted: dict[str, Any], refused: dict[str, Any]) -> None:
    LaunchParameters.model_validate(accepted)
    with pytest.raises(ValidationError):
        LaunchParameters.model_validate(refused)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("unfreeze_rank_ratio", [0, 1], [-0.01, 1.01, math.nan, math.inf]),
        ("effective_batch_size", [1], [0, 1.5]),
        ("learning_rate", [1], [0, -1e-6, 1.1]),
        ("beta2", [0, 0.999], [1]),
        ("seed", [0, 2**32 - 1], [-1, 2**32]),
        ("validation_split", [0, 0.99], [-0.1, 1]),
        ("checkpoint_every_minutes", [None, 0.1, 15], [0, -1, math.inf]),
        ("target_patterns", [None, ["q_proj"]], [[], [""]]),
        ("model_path", ["m"], ["", "   "]),
        ("save_dtype", [None, "float16"], ["float64"]),
    ],
)
def test_bounds(name: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        training(**{name: value})
    for value in outside:
        with pytest.raises(ValidationError, match=name.split("_")[0]):
            training(**{name: value})


def test_every_problem_is_told_at_once_in_the_names_that_were_used() -> None:
    with pytest.raises(ValueError) as refusal:
        from_argv(["--model-path=m", "--unfreeze-rank-ratio=2", "--attempt=0"])
    lines = str(refusal.value).splitlines()
    assert "data_path: is required: set it" in lines
    assert any(line.startswith("unfreeze_rank_ratio: ") and "got '2'" in line for line in lines)
    assert any(line.startswith("attempt: ") for line in lines)
    tight = {**REQUIRED, "max_seq_len": 4096}
    with pytest.raises(ValidationError) as error:
        TrainingParameters.model_validate({to_camel(k): v for k, v in tight.items()})
    assert any("maxTokensPerGpu" in line for line in explain(error.value, "spec", camel=True))


def test_parameters_do_not_change_once_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        training().seed = 1  # type: ignore[misc]


def test_every_parameter_is_described() -> None:
    rows = describe((TrainingParameters, RunParameters, LaunchParameters))
    assert all(meaning for _, _, meaning in rows)
    assert {name for name, default, _ in rows if default == "required"} == set(REQUIRED)
    assert json.dumps(rows)


def test_white_space_is_what_pydantic_strips() -> None:
    """The API server's expressions know less; so it is spelt out."""
    stripped = TypeAdapter(Annotated[str, StringConstraints(strip_whitespace=True)])
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    found = [each for each in everything if stripped.validate_python(each) == ""]
    single = TypeAdapter(Annotated[str, StringConstraints(pattern=f"[{WHITE_SPACE}]")])
    assert found == [each for each in everything if _takes(single, each)]


def _takes(adapter: TypeAdapter[str], text: str) -> bool:
    try:
        adapter.validate_python(text)
    except ValidationError:
        return False
    return True
