"""What is wrong with a model folder, in one line that names the cure.

Lives here: what can be seen in a folder before anything is loaded, and the boundary around the code
that loads it: transformers tells of a damaged folder by any exception. Called by `base_model`,
`model` and `memory`. Must never: load weights, or call a fault of a disk the folder's own: that
passes, and the user has nothing to mend.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from osft_trainer.base_weights import INDEX, BaseWeights

_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
_OTHER_TASK = re.compile(
    r"For(Sequence|Token|Image|Audio|Video)Classification$|ForQuestionAnswering$|RewardModel$"
    r"|For(MaskedLM|MultipleChoice|PreTraining|NextSentencePrediction|SentenceEmbedding)$"
)
"""Ends of the names of classes that do not write text, though most have a sibling that does."""
_LFS = b"version https://git-lfs"
_QUANTIZED = ("quantization_config", "compression_config")

logger = logging.getLogger(__name__)


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no causal language model with all its weights.

    Raises:
        ValueError: names the file and the cure.
        OSError: the disk does not answer.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ValueError(
            f"model_path: {folder} holds an adapter (adapter_config.json), which is trained into "
            "no model yet: merge it into its base (peft: merge_and_unload, then save_pretrained) "
            "and give that folder"
        )
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise ValueError(
                f"model_path: {folder} holds no {pattern}; give the folder of a model in Hugging "
                "Face format with safetensors weights"
            )
    _check_configuration(folder / "config.json")
    _check_shards(folder)


def check_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a chat template that is no template; one that refuses a conversation is none of ours.

    Raises:
        ValueError: names the line.
    """
    found = tokenizer.chat_template
    templates = found.values() if isinstance(found, dict) else [found]
    for template in filter(None, templates):
        try:
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "probe"}], chat_template=template, tokenize=False
            )
        except TemplateSyntaxError as error:
            raise ValueError(
                f"model_path: the chat template of {folder} has a syntax error in line "
                f"{error.lineno} ({error.message}): mend or fetch again chat_template.jinja, or "
                "where there is none the entry chat_template of tokenizer_config.json"
            ) from error
        except Exception:  # foreign code, which may refuse this conversation for any reason
            logger.debug("the chat template of %s refuses a probe", folder, exc_info=True)


def read_configuration(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model folder, as transformers reads it.

    Raises:
        ValueError: says what is in the way.
    """
    with faults_of(folder, "the configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    return config


@contextmanager
def faults_of(folder: Path, what: str) -> Iterator[None]:
    """Around foreign code that reads a model folder: what it raises becomes a ValueError.

    But for what may pass, or is of this machine: a disk that does not answer, no memory.

    Args:
        folder: of the model.
        what: is read, for instance "the tokenizer".
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if _may_pass(error) or str(error).startswith("model_path:"):
            raise
        logger.debug("%s of %s cannot be read", what, folder, exc_info=True)
        said = _first_line(error)
        raise ValueError(
            f"model_path: {what} of {folder} cannot be read ({said}): {_cure(said, what)}"
        ) from error


def _may_pass(error: Exception) -> bool:
    """What a disk or the memory says; transformers raises OSError without a number for the rest."""
    if isinstance(error, RuntimeError) and "alloc" in str(error):
        return True
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno is not None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith(":") and len(lines) > 1:
        text += f" {lines[1]}"
    known = isinstance(error, ValueError | OSError | ImportError) and text
    return text[:300] if known else f"{type(error).__name__}: {text[:300]}"


def _cure(said: str, what: str) -> str:
    if "custom code" in said:
        return "set trust_remote_code if you trust the code that comes with the model"
    if "does not recognize this architecture" in said:
        return "it needs a newer transformers than is installed here"
    if "AutoModelForCausalLM" in said:
        return "give a causal (decoder-only) language model; there is none of this architecture"
    if "pip install" in said or "requires the" in said:
        return "add that package to the trainer's image"
    if what == "the tokenizer":
        return "fetch tokenizer.json and tokenizer_config.json again, or save them with the model"
    if what == "the configuration":
        return "mend config.json, or fetch it again"
    return "fetch config.json and the weights again, from one revision of the model"


def _check_configuration(path: Path) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model_path: {path} is no JSON ({error}); {_again(path)}") from error
    config = found if isinstance(found, dict) else {}
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        _check_entries(part, path)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"model_path: {path} names no model_type, so that nobody knows how to load the model: "
            "fetch it again"
        )
    _check_task(config, path)


def _check_entries(config: dict[str, Any], path: Path) -> None:
    """Of the configuration, or of one of its parts."""
    for entry in _QUANTIZED:
        if config.get(entry):
            raise ValueError(
                f"model_path: {path} says that the weights are quantized ({entry}); their "
                "exact values are needed, so give the model in bfloat16, float16 or float32"
            )
    for entry in ("dtype", "torch_dtype"):
        value = config.get(entry)
        if value is not None and str(value).removeprefix("torch.") not in _DTYPES:
            raise ValueError(
                f"model_path: {path} says {entry} {value!r}, which is no type of weights: write "
                'the one that they have, such as "bfloat16"'
            )


def _check_task(config: dict[str, Any], path: Path) -> None:
    names = config.get("architectures") or []
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}) or not isinstance(names, list):
        return
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if any(name in causal for name in names):
        return
    other = [str(name) for name in names if _OTHER_TASK.search(str(name))]
    if config.get("is_encoder_decoder"):
        other = other or [str(name) for name in names] or [str(config["model_type"])]
    if other:
        raise ValueError(
            f"model_path: {path} names {other[0]}, which is no causal (decoder-only) language "
            "model: give a model that writes text token by token, such as a ...ForCausalLM"
        )


def _check_shards(folder: Path) -> None:
    index = folder / INDEX
    if not (folder / "model.safetensors").is_file():
        if not index.is_file():
            raise ValueError(
                f"model_path: {folder} holds neither model.safetensors nor {INDEX}, by which its "
                "weight files are found: fetch the index, or save the model with save_pretrained"
            )
        _check_index(folder, index)
    try:
        BaseWeights(folder)
    except ValueError as error:
        path = Path(str(error).split(" is no whole safetensors file")[0])
        raise ValueError(f"model_path: {error}: it is damaged, {_again(path)}") from error


def _check_index(folder: Path, index: Path) -> None:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in named})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model_path: {index} does not tell which file holds which weight ({error}): "
            f"{_again(index)}"
        ) from error
    lacking = [name for name in files if not (folder / name).is_file()]
    if lacking:
        some = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise ValueError(
            f"model_path: {folder} lacks {len(lacking)} of the {len(files)} weight files that its "
            f"index names ({some}): fetch them"
        )


def _again(path: Path) -> str:
    """How to get a file whole."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    return "it is only a pointer of Git LFS: run `git lfs pull`" if is_pointer else "fetch it again"
