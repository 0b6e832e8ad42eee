"""Where the base model lies: the folder itself, or the hub's copy in the local cache.

Called by `worker` on every rank before anything reads the model. Must never: load weights, or fetch
what the safetensors files already hold in another form.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from osft_trainer.model_folder import check_folder

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")
"""Configuration, weights, tokenizer, chat template, code. No other weights' formats."""


def local_folder(model_path: str | Path) -> Path:
    """The folder with config.json and *.safetensors; fetched from the hub if it is a name there.

    Raises:
        ValueError: neither a folder nor a name that the hub gives us; or there is no whole causal
            language model in it, see `model_folder.check_folder`.
        ConnectionError: the hub does not answer now; trying again may help.
    """
    folder = Path(model_path).expanduser()
    if not folder.is_dir():
        folder = _from_hub(str(model_path))
    check_folder(folder)
    return folder


def _from_hub(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model_path: there is no folder {name!r}; is its volume mounted?")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except (HFValidationError, RepositoryNotFoundError, GatedRepoError) as error:
        raise ValueError(
            f"model_path: {name!r} is neither a folder here nor a model that the hub gives us: "
            f"{error}; private and gated models need HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        text = (
            f"model_path: there is no folder {name!r} here, and the hub cannot be reached: {error}"
        )
        # An outage passes; a hub that is switched off does not come back by trying again.
        raise (ValueError if constants.HF_HUB_OFFLINE else ConnectionError)(text) from error


def stop_token_ids(folder: str | Path) -> tuple[int, ...]:
    """Tokens at which a server stops, as the model's folder says, in ascending order.

    Those of generation_config.json; where it names none, those of config.json. What these files do
    not name, or a file that is not there, is nobody's fault: a tokenizer has a token of its own.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        parts = (found, found.get("text_config")) if isinstance(found, dict) else ()
        named = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
        ids = {
            each
            for value in named
            for each in (value if isinstance(value, list) else [value])
            if isinstance(each, int) and not isinstance(each, bool)
        }
        if ids:
            return tuple(sorted(ids))
    return ()
