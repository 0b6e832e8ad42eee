"""A plain Hugging Face folder of any complete state of a run.

Lives here: what a state records of its run, and rebuilding the model that it belongs to. Called by
`inspect` (`osft export`); `train` writes the record. Must never: change the run's folder (but for
bases missing in its cache), or guess a parameter that the state does not record.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel

from osft_trainer.assembly import compute_dtype, plan_of
from osft_trainer.base_model import local_folder
from osft_trainer.checkpoint import Position, read_meta
from osft_trainer.config import TrainingParameters
from osft_trainer.decomposition import Decompositions, digest_of, prepare, stored
from osft_trainer.export import base_digest, export_hf
from osft_trainer.model import convert, load_model
from osft_trainer.outputs import facts_of
from osft_trainer.parallel import World
from osft_trainer.report import RunFolder
from osft_trainer.retention import prepare_retention
from osft_trainer.shards import Shard, open_shard, read_rows
from osft_trainer.targets import Plan


class RunRecord(BaseModel):
    """What a state says about its run: enough to build the model again."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    training: TrainingParameters
    """With the compute_dtype that was in force, never auto."""
    run_id: str
    fingerprint: str
    base_digest: str
    importance: tuple[float, ...] | None = None
    """Of each decoder block, with rank_allocation adaptive."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    model_path: str | None = None,
    save_dtype: str | None = None,
) -> Position:
    """Write the model of a state to `out`. One process, on the CPU.

    Of a run's last state it equals `final/` bit for bit, if the run was computed on the CPU; a GPU
    may round the products of the factors otherwise.

    Args:
        checkpoint: a folder `<run>/checkpoints/step-N`.
        out: folder to write; there must be nothing of that name but an empty folder.
        model_path: where the base model lies now, if not where the run found it.
        save_dtype: of the weights; None takes the run's.

    Returns:
        Where the run stood.

    Raises:
        ValueError: no complete and intact state, another base model, or `out` is taken.
        OSError: a file cannot be read, or `out` cannot be written; nothing is left there.
    """
    saved = _intact(checkpoint)
    record = _record(checkpoint, saved)
    _check_free(out)
    training = record.training
    base = local_folder(model_path or training.model_path)
    digest = base_digest(base)
    if digest != record.base_digest:
        raise ValueError(
            f"--model: {base} is not the model that {checkpoint} was trained from (its files have "
            f"digest {digest[:12]}, the run's had {record.base_digest[:12]}): give that model"
        )
    world = World(0, 0, 1, torch.device("cpu"))
    hf = load_model(
        base, compute_dtype(training.compute_dtype, world.device), training.trust_remote_code
    )
    folder = RunFolder(checkpoint.resolve().parent.parent)
    told = training.model_copy(update={"model_path": str(base)})
    plan = plan_of(hf, told, record.importance)
    bases = _bases(hf, plan, folder, told, digest, str(saved["decomposition"]))
    model = convert(hf, plan, decompose=bases.decompose)
    read_rows(_shards(checkpoint, saved), model.trainables(), None)
    model.refresh()
    position = Position(**saved["position"])
    name = save_dtype or training.save_dtype
    export_hf(
        model,
        base,
        out,
        world,
        None if name is None else getattr(torch, name),
        facts_of(position, record.run_id, record.fingerprint),
        digest=digest,
    )
    return position


def _bases(
    hf: PreTrainedModel,
    plan: Plan,
    folder: RunFolder,
    training: TrainingParameters,
    model_digest: str,
    digest: str,
) -> Decompositions:
    """The run's bases from its cache, or made again where that is gone."""
    found = stored(plan, folder.cache, digest)
    if found is not None:
        return found
    cure = (
        "give the state its run's cache folder, or export it with the version of the trainer that "
        "wrote it"
    )
    world = World(0, 0, 1, torch.device("cpu"))
    text = None
    if plan.split_by == "activations":
        try:
            # Without the model: what it writes here and now would be another text.
            text = prepare_retention(training, folder, world, None, model_digest)
        except ValueError as error:
            raise ValueError(
                f"{folder.cache} lacks the bases that the state was trained with ({digest}), and "
                f"the text that they were read off cannot be had ({error}): {cure}"
            ) from error
    # Before hours of work: another text, or another version, gives other bases.
    again = digest_of(hf, plan, model_digest, text)
    if again != digest:
        raise ValueError(
            f"{folder.cache} lacks the bases that the state was trained with ({digest}), and made "
            f"again they would be others ({again}): {cure}"
        )
    return prepare(
        hf, plan, cache=folder.cache, base_digest=model_digest, world=world, retention=text
    )


def _intact(checkpoint: Path) -> dict[str, Any]:
    """state.json of a complete state whose files are what was written."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no folder: give <run>/checkpoints/step-N")
    if RunFolder.step_of(checkpoint) is None or not RunFolder.is_complete(checkpoint):
        found = RunFolder(checkpoint).complete_checkpoints()
        cure = f"give {found[-1]}" if found else "give <run>/checkpoints/step-N with a COMPLETE"
        raise ValueError(f"{checkpoint} is no complete state of a run: {cure}")
    saved = read_meta(checkpoint)
    if saved is None:
        raise ValueError(f"{checkpoint}/state.json is damaged: take an older state")
    if not all(shard.is_intact() for shard in _shards(checkpoint, saved)):
        raise ValueError(f"{checkpoint} is damaged (a file is cut or changed): take an older state")
    return saved


def _shards(checkpoint: Path, saved: dict[str, Any]) -> list[Shard]:
    found = [open_shard(checkpoint, rank) for rank in range(int(saved["worldSize"]))]
    shards = [shard for shard in found if shard is not None]
    if len(shards) < len(found):
        raise ValueError(f"{checkpoint} lacks a rank's rows: take an older state")
    return shards


def _record(checkpoint: Path, saved: dict[str, Any]) -> RunRecord:
    try:
        return RunRecord.model_validate(saved.get("run"))
    except ValidationError as error:
        raise ValueError(
            f"{checkpoint}/state.json does not record its run as this version of the trainer does: "
            f"export it with the version that wrote it ({error.error_count()} entries differ)"
        ) from error


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: give a new folder")
