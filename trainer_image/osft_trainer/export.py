"""Writing a plain HF folder from a converted model.

What lives here: a copy of the base folder in which what was trained (`dense`) has the place of what
was there (`base_copy`), with the files that belong to the weights, and `osft.json`. Called by
`outputs` and `export_checkpoint`. Must never: leave a half-written folder under the final name, or
lose anything that the base's weight files hold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from osft_trainer.agreement import from_first_rank
from osft_trainer.base_copy import BaseCopy
from osft_trainer.base_weights import BaseWeights, loaded_files
from osft_trainer.dense import trained_weights
from osft_trainer.durable import complete, put_in_place, told, work_folder
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World
from osft_trainer.report import COMPLETE, finite

OSFT_FILE = "osft.json"

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt"}
)
"""Files of the base folder that are weights, in whatever format: those that transformers would load
are written anew, others (a second format of the same model) would go stale and are left out."""
_COPIED_FOLDERS = frozenset({"additional_chat_templates"})
"""Folders in a model folder that transformers reads."""


def export_hf(
    model: OSFTModel,
    base_path: str | Path,
    out_dir: str | Path,
    world: World,
    save_dtype: torch.dtype | None = None,
    extra: Mapping[str, object] | None = None,
    digest: str | None = None,
    token: str = "",
    before_exchange: Callable[[], None] = lambda: None,
) -> None:
    """Write W + dW as a folder that plain transformers loads. Collective: call it on every rank.

    Names, shapes and types of the tensors, and the files they lie in, are the base's; what is not
    trained is the base's byte for byte. The folder appears under its name only when it is complete,
    its marker included, and on disk; an older folder of that name is replaced.

    Args:
        model: the converted model.
        base_path: folder the model was loaded from; its configuration and tokenizer are copied.
        out_dir: folder to write; its parent is created.
        world: this process's place; rank 0 writes.
        save_dtype: takes the place of the base's main type; None keeps every type as it is.
        extra: more entries for osft.json; a number that is none is left out.
        digest: `base_digest` of the base folder where it is known; None reads the folder for it.
        token: keeps what is half written apart from what another process writes there.
        before_exchange: called on rank 0 when all is on disk and the older folder still stands.

    Raises:
        OSError: on every rank, if rank 0 cannot write.
        ValueError, Superseded: on every rank, where `before_exchange` raised it.
    """
    base, out = Path(base_path), Path(out_dir)
    dtype = save_dtype or base_dtype(base)
    leaks = {"leak": model.leak(), "leak_exported": model.leak(dtype)}
    work = work_folder(out, token)
    copies: list[BaseCopy] = []
    failure: OSError | ValueError | None = None
    # Every rank gathers even after a failure of rank 0: it must not leave the others waiting.
    for make in trained_weights(model, base, world):
        if world.rank == 0 and failure is None:
            try:
                with _as_os_error(out):
                    if not copies:
                        copies.append(BaseCopy(base, work, save_dtype))
                    copies[0].write(make())
            except (OSError, ValueError) as error:
                failure = error

    def finish() -> str:
        if failure is not None:
            raise failure
        with _as_os_error(out):
            if not copies:
                copies.append(BaseCopy(base, work, save_dtype))
            copies[0].finish()
            _copy_base_files(base, work, save_dtype)
            facts = {**leaks, "base_digest": digest or base_digest(base), **(extra or {})}
            _write_json(work / OSFT_FILE, _description(model, dtype) | finite(facts))
            complete(work)
            before_exchange()
            put_in_place(work, out)
        return ""

    try:
        from_first_rank(world, finish)
    finally:
        for copy in copies:
            with suppress(OSError):  # what cannot be written has been said
                copy.release()
        if world.rank == 0:
            # After a failure: another try needs the room.
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _as_os_error(out: Path) -> Iterator[None]:
    """Failures of writing, or of reading the base for it, by the name of the folder to be written.

    Safetensors raises an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{out}: {told(error)}") from error


def base_dtype(model_path: Path) -> torch.dtype:
    """The type that most of the floating-point numbers of a model folder's files have."""
    return BaseWeights(model_path).main_dtype()


def base_digest(model_path: str | Path) -> str:
    """sha256 of a model folder: of config.json and of every safetensors file, names included."""
    folder = Path(model_path)
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _description(model: OSFTModel, dtype: torch.dtype) -> dict[str, object]:
    plan = model.plan
    return {
        "unfreeze_rank_ratio": plan.unfreeze_rank_ratio,
        "parameterization": plan.parameterization,
        "other_parameters": plan.other_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "ranks": {t.name: {"kept": t.kept_rank, "free": t.free_rank} for t in plan.targets},
    }


def left_out(base: Path) -> tuple[str, ...]:
    """Names in a base folder that its exports do not have: other formats, other programs' files."""
    kept = {path.name for path in (*loaded_files(base), *_beside_weights(base))}
    return tuple(
        path.name
        for path in sorted(base.iterdir())
        if path.name not in kept
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name not in (OSFT_FILE, COMPLETE)
    )


def _beside_weights(base: Path) -> list[Path]:
    """Configuration, tokenizer and code: what is copied as it is."""
    return [
        path
        for path in sorted(base.iterdir())
        if (path.name in _COPIED_FOLDERS if path.is_dir() else path.suffix not in _WEIGHT_SUFFIXES)
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name != OSFT_FILE
    ]


def _copy_base_files(base: Path, folder: Path, save_dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer and code files byte for byte; only a new dtype is noted."""
    for path in _beside_weights(base):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, folder / path.name)
    if save_dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(save_dtype).removeprefix("torch.")
        _write_json(folder / "config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
