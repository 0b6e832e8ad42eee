"""Writing a plain HF folder from a converted model.

What lives here: dense weights (`dense`), streamed into safetensors shards, the files of the base
folder that belong to them, and `osft.json`. Called by `outputs` and `export_checkpoint`. Must
never: leave a half-written folder under the final name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osft_trainer.agreement import from_first_rank
from osft_trainer.dense import dense_weights
from osft_trainer.durable import complete, put_in_place, told, work_folder
from osft_trainer.model import OSFTModel
from osft_trainer.parallel import World
from osft_trainer.report import finite

OSFT_FILE = "osft.json"

_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".ckpt"}
)
"""Files of the base folder that are weights, in whatever format, and so are not copied."""


def export_hf(
    model: OSFTModel,
    base_path: str | Path,
    out_dir: str | Path,
    world: World,
    save_dtype: torch.dtype | None = None,
    extra: Mapping[str, object] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    digest: str | None = None,
    token: str = "",
    before_exchange: Callable[[], None] = lambda: None,
) -> None:
    """Write W + dW as a folder that plain transformers loads. Collective: call it on every rank.

    The folder appears under its name only when it is complete, its marker included, and on disk;
    an older folder of that name is replaced.

    Args:
        model: the converted model.
        base_path: folder the model was loaded from; its configuration and tokenizer are copied.
        out_dir: folder to write; its parent is created.
        world: this process's place; rank 0 writes.
        save_dtype: of all floating-point weights; None takes the base configuration's.
        extra: more entries for osft.json; a number that is none is left out.
        max_shard_bytes: size at which a new weight file is begun.
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
    writer = _ShardWriter(work, max_shard_bytes) if world.rank == 0 else None
    failure: OSError | None = None
    # Every rank gathers even after a failure of rank 0: it must not leave the others waiting.
    for name, make in dense_weights(model, dtype, base, world):
        if writer is not None and failure is None:
            try:
                with _as_os_error(out):
                    writer.add(name, make())
            except OSError as error:
                failure = error

    def finish() -> str:
        assert writer is not None, "called on rank 0"
        if failure is not None:
            raise failure
        with _as_os_error(out):
            writer.close()
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
    """The dtype that a model folder's configuration names, else that of its first weight."""
    config = json.loads((model_path / "config.json").read_text())
    name = config.get("dtype") or config.get("torch_dtype")
    if name is not None:
        found: torch.dtype = getattr(torch, str(name).removeprefix("torch."))
        return found
    first = min(model_path.glob("*.safetensors"))
    with safe_open(first, framework="pt") as file:
        tensor: Tensor = file.get_tensor(next(iter(file.keys())))
    return tensor.dtype


def base_digest(model_path: str | Path) -> str:
    """sha256 of a model folder: of config.json and of every safetensors file, names included."""
    folder = Path(model_path)
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


class _ShardWriter:
    """Collects tensors and writes a safetensors file whenever enough have come together."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Nothing is written before the first tensors."""
        self.folder = folder
        self.max_bytes = max_bytes
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.parts: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._write()
        # Safetensors refuses tensors that share memory or have gaps.
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write the rest, give the files their final names and write the index."""
        self._write()
        count = len(self.parts)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.parts, start=1):
            final = (
                "model.safetensors"
                if count == 1
                else f"model-{number:05d}-of-{count:05d}.safetensors"
            )
            self._part(number).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            _write_json(self.folder / "model.safetensors.index.json", index)

    def _write(self) -> None:
        if not self.pending:
            return
        if not self.parts:
            _make_empty(self.folder)
        self.parts.append(list(self.pending))
        path = self._part(len(self.parts))
        save_file(self.pending, path, metadata={"format": "pt"})
        self.pending, self.pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def _description(model: OSFTModel, dtype: torch.dtype) -> dict[str, object]:
    plan = model.plan
    return {
        "unfreeze_rank_ratio": plan.unfreeze_rank_ratio,
        "parameterization": plan.parameterization,
        "other_parameters": plan.other_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "ranks": {t.name: {"kept": t.kept_rank, "free": t.free_rank} for t in plan.targets},
    }


def _copy_base_files(base: Path, folder: Path, save_dtype: torch.dtype | None) -> None:
    """Copy configuration, tokenizer and code files byte for byte; only a new dtype is noted."""
    for path in sorted(base.iterdir()):
        is_index = path.name.endswith(".index.json")
        if path.is_dir() or path.name.startswith(".") or path.name == OSFT_FILE or is_index:
            continue
        if path.suffix not in _WEIGHT_SUFFIXES:
            shutil.copyfile(path, folder / path.name)
    if save_dtype is not None:
        config = json.loads((folder / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(save_dtype).removeprefix("torch.")
        _write_json(folder / "config.json", config)


def _make_empty(folder: Path) -> None:
    """A new folder; remains of an interrupted export go."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
