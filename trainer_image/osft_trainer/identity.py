"""Whose run folder it is: fingerprint, claim, and what becomes of another run's results.

Lives here: the digest that tells whether two runs are the same training, and the OWNER file;
`previous_runs` moves what is another's out of the way. Called by `worker` (claim), by the first
rank before each rename (`check_owner`) and by the launcher (`is_finished`, `standing_verdict`). One
process claims, never two ranks at once. Must never import torch, delete results, or touch files
that no run wrote.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from osft_trainer import previous_runs
from osft_trainer.config import RunParameters, TrainingParameters
from osft_trainer.data_files import find_data_files
from osft_trainer.model_digest import code_digest, tokenizer_digest
from osft_trainer.outcome import Superseded
from osft_trainer.report import (
    MAX_DOCUMENT_BYTES,
    Owner,
    RunFolder,
    Verdict,
    read_document,
    write_atomically,
)

NOT_IN_FINGERPRINT = frozenset(
    {
        # Paths: what lies there is digested instead.
        "model_path",
        "data_path",
        "ckpt_output_dir",
        "retention_data_path",
        # How the work is cut and computed; the mathematics is the same.
        "max_tokens_per_gpu",
        "use_liger",
        "activation_checkpointing",
        "selective_activation_checkpointing",
        "torch_compile",
        "trust_remote_code",
        # What is measured and kept beside the result.
        "validation_data_path",
        "validation_frequency",
        "validate_at_epoch",
        "validate_at_final",
        "save_best_val_loss",
        "val_loss_improvement_threshold",
        "checkpoint_every_steps",
        "checkpoint_every_minutes",
        "keep_checkpoints",
        "checkpoint_at_epoch",
        "save_final_checkpoint",
        # Who watches.
        "wandb_project",
        "wandb_entity",
        "wandb_run_name",
        "mlflow_tracking_uri",
        "mlflow_experiment_name",
        "mlflow_run_name",
        "tensorboard",
    }
)
"""Training parameters that cannot change the trained model. A new one counts until listed here."""

State = Literal["fresh", "resume", "finished"]


@dataclass(frozen=True)
class Fingerprint:
    """What makes two runs the same training."""

    parts: Mapping[str, Any]
    """Digests by the names of `CONTENTS`; further names: parameters that are not default."""

    @property
    def digest(self) -> str:
        """32 hex digits over all parts."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Claim:
    """The right of one process group to write into a run folder."""

    run_id: str
    attempt: int
    fingerprint: str
    state: State
    """fresh: nothing to resume from. resume: a complete state is there. finished: final/ is."""
    token: str
    """Drawn anew by each claim; the folder belongs to the last one."""
    base_digest: str
    """Digest of the base model's content."""


class OwnerRecord(Owner):
    """OWNER as the trainer writes it: what everybody may read, and what only claims need."""

    token: str = ""
    parts: dict[str, Any] = Field(default_factory=dict)


def data_digest(data_path: str | Path, parameter: str = "data_path") -> str:
    """sha256 of the training files' content, in the order of their names; names do not count.

    Args:
        data_path: file, folder or pattern.
        parameter: that names it, for errors.

    Raises:
        ValueError: there is no such file.
    """
    digest = hashlib.sha256()
    try:
        files = find_data_files(data_path).files
    except ValueError as error:
        raise ValueError(str(error).replace("data_path", parameter, 1)) from error
    for file in files:
        with file.path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def contents_of(training: TrainingParameters, model: str) -> dict[str, str]:
    """Digests of the files that decide what is trained; those that change nothing are left out.

    Args:
        training: its paths are of this machine, and the model is a folder.
        model: `export.base_digest` of the model folder.

    Raises:
        ValueError: there are no such files.
    """
    folder = Path(training.model_path)
    contents = {
        "data": data_digest(training.data_path),
        "model": model,
        "tokenizer": tokenizer_digest(folder),
    }
    if training.trust_remote_code:
        contents["code"] = code_digest(folder)
    # Text that is only measured on changes nothing.
    if training.retention_data_path is not None and training.text_decides:
        path = training.retention_data_path
        contents["retention"] = data_digest(path, "retention_data_path")
    return contents


def fingerprint(training: TrainingParameters, contents: Mapping[str, str]) -> Fingerprint:
    """The identity of a training: all contents, and every parameter that is not default.

    Defaults are left out so that a parameter added later does not make old runs foreign.
    """
    given = training.model_dump(mode="json", exclude_defaults=True)
    if training.training_mode == "epoch" and training.num_epochs == 1:
        del given["num_epochs"]
    if not training.text_decides:
        # The text is only measured on.
        given.pop("retention_tokens", None)
    counted = {name: given[name] for name in sorted(given) if name not in NOT_IN_FINGERPRINT}
    return Fingerprint({**contents, **counted})


def claim(folder: RunFolder, run: RunParameters, prints: Fingerprint) -> Claim:
    """Take the folder for this run, or say why not.

    The same run id goes on from the newest complete state, unless the files that it learns from
    have changed. Another run's results are treated as `on_existing_run` says. A later claim takes
    the folder from an earlier one.

    Raises:
        ValueError: the folder holds another run, or this one's files have changed; names what
            differs and the ways out.
        Superseded: a newer attempt of this run owns the folder.
    """
    previous_runs.finish_setting_aside(folder)
    run_id = run.run_id or prints.digest
    owner = read_document(folder.owner, OwnerRecord)
    if owner is not None and owner.run_id == run_id:
        if owner.attempt > run.attempt:
            raise Superseded(
                f"{folder.root}: attempt {owner.attempt} of this run owns the folder, "
                f"this is attempt {run.attempt}"
            )
        _check_same_files(folder, owner, prints)
    elif owner is not None or previous_runs.has_results(folder):
        _settle_other_run(folder, owner, run, prints)
    # Whoever got here may try again: an older verdict is about arguments that have changed.
    folder.verdict.unlink(missing_ok=True)
    token = secrets.token_hex(16)
    record = OwnerRecord(
        run_id=run_id,
        attempt=run.attempt,
        fingerprint=prints.digest,
        token=token,
        parts=dict(prints.parts),
    )
    text = record.to_json()
    if len(text.encode()) > MAX_DOCUMENT_BYTES:
        # Nobody would read it; what differs can then not be named, all else still works.
        text = record.model_copy(update={"parts": {}}).to_json()
    write_atomically(folder.owner, text)
    previous_runs.mend_exports(folder)
    model = str(prints.parts["model"])
    return Claim(run_id, run.attempt, prints.digest, _state(folder), token, model)


def check_owner(folder: RunFolder, claim: Claim) -> None:
    """Make sure that the folder is still ours; called before each rename into it.

    Raises:
        Superseded: another claim was made since.
    """
    owner = read_document(folder.owner, OwnerRecord)
    if owner is not None and owner.token == claim.token:
        return
    whose = "nobody" if owner is None else f"run {owner.run_id}, attempt {owner.attempt}"
    raise Superseded(
        f"{folder.root} belongs to {whose} now, not to attempt {claim.attempt} of run "
        f"{claim.run_id}: nothing more is written"
    )


def is_finished(folder: RunFolder, run: RunParameters) -> bool:
    """Whether this very run, named by its id, has left its final model."""
    owner = read_document(folder.owner, OwnerRecord)
    ours = owner is not None and run.run_id is not None and owner.run_id == run.run_id
    return ours and RunFolder.is_complete(folder.final)


def standing_verdict(folder: RunFolder, run: RunParameters) -> Verdict | None:
    """Why no retry of this run can help, if that was found out before.

    Only a run that was given its id obeys: its arguments cannot have changed. A run without one
    was started anew by a person, who may have mended what was wrong.
    """
    verdict = read_document(folder.verdict, Verdict)
    ours = verdict is not None and run.run_id is not None and verdict.run_id == run.run_id
    return verdict if ours else None


def write_verdict(folder: RunFolder, claim: Claim, verdict: Verdict) -> None:
    """Leave word that no retry can help, unless the folder is another's by now."""
    owner = read_document(folder.owner, OwnerRecord)
    if owner is not None and owner.token == claim.token:
        write_atomically(folder.verdict, verdict.to_json())


def _state(folder: RunFolder) -> State:
    if RunFolder.is_complete(folder.final):
        return "finished"
    return "resume" if folder.complete_checkpoints() else "fresh"


def _settle_other_run(
    folder: RunFolder, owner: OwnerRecord | None, run: RunParameters, prints: Fingerprint
) -> None:
    """Decide about results that are not this run's: go on, move them away, or refuse."""
    if run.on_existing_run == "restart":
        previous_runs.set_aside(folder)
        return
    if run.on_existing_run == "resume" and owner is not None:
        if _is_same_training(owner, prints):
            return
        if _failed_for_good_without_results(folder, owner):
            previous_runs.set_aside(folder)
            return
    whose = "results without an OWNER file" if owner is None else f"run {owner.run_id}"
    lines = [f"ckpt_output_dir: {folder.root} holds {whose}"]
    if owner is not None and run.on_existing_run == "resume":
        lines[0] += ", which is another training than this one:"
        lines += [f"  {line}" for line in differences(owner.parts, prints.parts)]
    lines.append(
        "  choose another ckpt_output_dir, make them equal, or set on_existing_run to restart, "
        "which moves what is there to previous-<n>/"
    )
    raise ValueError("\n".join(lines))


def _check_same_files(folder: RunFolder, owner: OwnerRecord, prints: Fingerprint) -> None:
    """A run that goes on must read what it read before: its position counts samples of these files.

    Raises:
        ValueError: they have changed; names which.
    """
    if _state(folder) != "resume":
        return
    changed = [
        CONTENTS[name]
        for name in CONTENTS
        if {name} <= owner.parts.keys() & prints.parts.keys()
        and owner.parts[name] != prints.parts[name]
    ]
    if changed:
        raise ValueError(
            f"ckpt_output_dir: {folder.root} holds a run that has begun with other files: "
            f"{'; '.join(f'{what} has changed since' for what in changed)}. Put the former files "
            "back to go on, or start a new run with on_existing_run restart, which moves what is "
            "there to previous-<n>/"
        )


def _is_same_training(owner: OwnerRecord, prints: Fingerprint) -> bool:
    """Whether the fingerprints are equal, but for files that an earlier version did not digest."""
    if owner.fingerprint == prints.digest:
        return True
    missing = _DIGESTED_LATER - owner.parts.keys()
    here = {name: value for name, value in prints.parts.items() if name not in missing}
    return bool(missing) and Fingerprint(here).digest == owner.fingerprint


CONTENTS = {
    "data": "the content of data_path",
    "model": "the content of model_path",
    "tokenizer": "the tokenizer, chat template or end tokens of model_path",
    "code": "the Python code of model_path",
    "retention": "the content of retention_data_path",
}
"""Parts of a fingerprint that are digests of files, with what they are of."""

_DIGESTED_LATER = frozenset({"tokenizer", "code"})
"""Of these, what a run that began with an earlier version has no digest of."""


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One line per part that is not equal, in words."""
    lines = []
    for name in sorted({*there, *here}):
        old, new = (_shown(parts, name) for parts in (there, here))
        if old == new:
            continue
        if name in CONTENTS:
            lines.append(f"{name}: {CONTENTS[name]} differs")
        else:
            lines.append(f"{name}: {old} there, {new} here")
    return lines or ["its fingerprint (recorded by another version of the trainer)"]


def _shown(parts: Mapping[str, Any], name: str) -> str:
    if name in parts:
        return json.dumps(parts[name])
    info = TrainingParameters.model_fields.get(name)
    if info is None or info.is_required():
        return "absent"
    return json.dumps(info.get_default(call_default_factory=True))


def _failed_for_good_without_results(folder: RunFolder, owner: OwnerRecord) -> bool:
    """Whether the other run is over and left nothing: a corrected one may take its place."""
    verdict = read_document(folder.verdict, Verdict)
    return (
        verdict is not None
        and verdict.run_id == owner.run_id
        and not previous_runs.has_results(folder)
    )
