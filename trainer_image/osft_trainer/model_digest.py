"""Digests of what a model folder holds beside configuration and weights, and that changes a run.

Lives here: tokenizer with chat template and end tokens, and the model's own Python code. Must
never: load a tokenizer, run code, or count files that change nothing (README, sampling settings).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

_TOKENIZER_FILES = (
    "tokenizer*",
    "*.tiktoken",
    "*.model",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "additional_chat_templates/*",
)
"""What transformers reads a tokenizer and its templates from."""


def tokenizer_digest(folder: Path) -> str:
    """sha256 of all that decides which tokens a text becomes, and where a turn ends."""
    files = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    digest = _of_files(folder, files)
    # The rest of that file is how text is drawn, which training does not do.
    ends = _end_tokens(folder / "generation_config.json")
    digest.update(f"eos_token_id {json.dumps(ends)}\n".encode())
    return digest.hexdigest()


def code_digest(folder: Path) -> str:
    """sha256 of the Python files that come with the model."""
    return _of_files(folder, folder.glob("*.py")).hexdigest()


def _end_tokens(settings: Path) -> object:
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None  # if it is damaged, whoever loads the model says so
    return content.get("eos_token_id") if isinstance(content, dict) else None


def _of_files(folder: Path, paths: Iterable[Path]) -> hashlib._Hash:
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest
