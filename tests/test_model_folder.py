"""A model folder that cannot be used is one error that names model_path, the file and the cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tiny
from osft_trainer.base_model import local_folder
from osft_trainer.memory import empty_model
from osft_trainer.model import load_model, load_tokenizer
from osft_trainer.model_folder import faults_of
from osft_trainer.unused_weights import not_loaded

Damage = Callable[[Path], object]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder, to be copied."""
    return tiny.model_folder(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture(scope="module")
def parts(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its weights in several files."""
    folder = tmp_path_factory.mktemp("parts") / "model"
    shutil.copytree(good, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(good).save_pretrained(folder, max_shard_size=20_000)
    return folder


def _write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def _cut(name: str) -> Damage:
    def cut(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return cut


def _remove(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def _configure(**changes: Any) -> Damage:
    """Change entries of config.json; None takes one out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def _adapter_alone(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def _of_class(name: str, **values: Any) -> Damage:
    """A sound folder of another class."""

    def save(folder: Path) -> None:
        make = getattr(transformers, name)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        config = make.config_class(**{**sizes, "num_attention_heads": 2, **values})
        make(config).save_pretrained(folder)

    return save


def _bare(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)


INDEX = "model.safetensors.index.json"
TOKENIZER = r"the tokenizer of .* cannot be read .*fetch tokenizer\.json"
CONFIGURATION = r"the configuration of .* cannot be read .*mend config\.json"
FAULTS: dict[str, tuple[Damage, str]] = {
    "an adapter alone": (_adapter_alone, r"holds an adapter .*merge_and_unload"),
    "an adapter beside a model": (_write("adapter_config.json", "{}"), r"holds an adapter"),
    "no whole file": (_cut("model.safetensors"), r"is damaged, fetch it again"),
    "a pointer to weights": (_write("model.safetensors", POINTER), r"git lfs pull"),
    "a pointer to a configuration": (_write("config.json", POINTER), r"no JSON.*git lfs pull"),
    "a cut tokenizer": (_cut("tokenizer.json"), TOKENIZER),
    "an empty tokenizer": (_write("tokenizer.json", "{}"), TOKENIZER),
    "a list for a tokenizer": (_write("tokenizer.json", "[]"), TOKENIZER),
    "a cut tokenizer_config": (_cut("tokenizer_config.json"), TOKENIZER),
    "no tokenizer": (_remove("tokenizer.json", "tokenizer_config.json"), TOKENIZER),
    "a template with an open block": (
        _write("chat_template.jinja", "{% for m in messages %}\n{{ m.content }\n"),
        r"chat template of .* syntax error in line 2 .*mend or fetch again chat_template\.jinja",
    ),
    "dtype auto": (_configure(dtype="auto"), r"dtype 'auto', which is no type .*\"bfloat16\""),
    "torch_dtype auto": (_configure(dtype=None, torch_dtype="auto"), r"torch_dtype 'auto'"),
    "a dtype by another name": (_configure(dtype="bf16"), r"dtype 'bf16', which is no type"),
    "a number for a dtype": (_configure(dtype=16), r"dtype 16, which is no type"),
    "a part's dtype": (_configure(text_config={"dtype": "auto"}), r"dtype 'auto'"),
    "a part quantized": (
        _configure(text_config={"quantization_config": {"bits": 4}}),
        r"are quantized .*bfloat16",
    ),
    "a list for a configuration": (_write("config.json", "[]"), r"names no model_type"),
    "no model_type": (_configure(model_type=None), r"names no model_type.*fetch it again"),
    "a model_type of tomorrow": (_configure(model_type="llama9"), r"newer transformers"),
    "code of its own": (
        _configure(model_type="own", auto_map={"AutoConfig": "own.Own"}),
        r"set trust_remote_code",
    ),
    "a text for a size": (_configure(hidden_size="big"), CONFIGURATION),
    "no heads": (_configure(num_attention_heads=0), CONFIGURATION),
    "an activation of no name": (_configure(hidden_act="nope"), r"KeyError: 'nope'"),
    "blocks that are not there": (_configure(num_hidden_layers=3), r"weights .*layers\.2\."),
    "an encoder with a decoder": (
        _of_class("T5ForConditionalGeneration", vocab_size=300, d_model=16, d_kv=4, d_ff=16),
        r"T5ForConditionalGeneration, which is no causal",
    ),
    "an encoder": (_of_class("BertForMaskedLM", vocab_size=300), r"BertForMaskedLM.*no causal"),
    "a model of pictures": (_of_class("ViTModel"), r"decoder-only\) language model; there is none"),
    "one that judges": (
        _of_class("LlamaForSequenceClassification", vocab_size=300),
        r"LlamaForSequenceClassification, which is no causal .*ForCausalLM",
    ),
    "one without a head": (_bare, r"have no head \(lm_head\.weight\)|are missing .*lm_head"),
}
FAULTS_OF_PARTS: dict[str, tuple[Damage, str]] = {
    "a missing file": (_remove("model-00002-of-00006.safetensors"), r"lacks 1 of the 6.*fetch"),
    "a cut index": (_cut(INDEX), r"index\.json does not tell which .*fetch it again"),
    "a list for an index": (_write(INDEX, "[]"), r"index\.json does not tell which"),
    "no index": (_remove(INDEX), r"neither model\.safetensors nor .*fetch the index"),
}


def _open_as_a_run(folder: Path) -> None:
    """In the order in which a run reads it."""
    base = local_folder(folder)
    load_tokenizer(base)
    load_model(base, torch.float32)


def _open_as_a_plan(folder: Path) -> None:
    base = local_folder(folder)
    not_loaded(empty_model(base, torch.float32), base)
    load_tokenizer(base)


@pytest.mark.parametrize("opened", [_open_as_a_run, _open_as_a_plan])
@pytest.mark.parametrize("fault", FAULTS | FAULTS_OF_PARTS)
def test_a_folder_that_cannot_be_used_is_told_in_one_line(
    fault: str, opened: Damage, good: Path, parts: Path, tmp_path: Path
) -> None:
    damage, message = (FAULTS | FAULTS_OF_PARTS)[fault]
    folder = tmp_path / "model"
    shutil.copytree(parts if fault in FAULTS_OF_PARTS else good, folder)
    damage(folder)
    with pytest.raises(ValueError, match=rf"^model_path: .*{message}") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)


def test_sound_folders_pass(good: Path, parts: Path) -> None:
    for folder in (good, parts):
        _open_as_a_run(folder)
        _open_as_a_plan(folder)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), RuntimeError("cannot allocate")]
)
def test_what_may_pass_is_not_the_folders_fault(error: Exception) -> None:
    """It is tried again; a user would mend nothing."""
    with pytest.raises(type(error)), faults_of(Path("model"), "the model"):
        raise error
