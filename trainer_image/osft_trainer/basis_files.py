"""One file of a target's bases: safetensors, with what it says of itself.

Called by `decomposition`, by several ranks at once. Must never: leave a file under its name that is
not whole, or know what is in it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osft_trainer.durable import sync
from osft_trainer.parallel import World

_ABOUT = "about"
"""The one entry of a file's metadata, JSON: several would be written in no fixed order."""


def holds(path: Path, parts: frozenset[str]) -> bool:
    """Whether a file is there, can be read, and has these parts and no others."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys()) == parts
    except SafetensorError:
        return False


def link(whole: Path, path: Path, world: World) -> bool:
    """Give a file a second name; False where the file system has no such thing."""
    temporary = path.with_name(f".{path.name}.{world.rank}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(whole, temporary)
    except OSError:
        return False
    os.replace(temporary, path)
    return True


def save(
    path: Path, parts: dict[str, Tensor], world: World, facts: dict[str, str] | None = None
) -> None:
    """Write a file durably, under its name when it is whole; `facts` are what it says of itself."""
    temporary = path.with_name(f".{path.name}.{world.rank}")
    about = {_ABOUT: json.dumps(facts)} if facts else None
    save_file({name: part.cpu() for name, part in parts.items()}, temporary, metadata=about)
    sync(temporary)
    os.replace(temporary, path)


def facts_of(path: Path) -> dict[str, str]:
    """What a file says of itself."""
    with safe_open(path, "pt") as file:
        facts: dict[str, str] = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
    return facts
