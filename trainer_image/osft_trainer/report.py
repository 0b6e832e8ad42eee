"""CONTRACT: what a run tells the world, and where it writes it.

Exit codes, the progress document (/progress, progress.json), the termination message, the verdict,
and the one function per path of the run folder. Written by the trainer, read by the operator, by
`osft run` and by people. Everything read from a pod is untrusted: `parse` bounds size and refuses
what is no finite number. Must never import torch, transformers, kopf or kubernetes.
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

MAX_DOCUMENT_BYTES = 65536
"""Longest progress document that is read."""
MAX_TERMINATION_BYTES = 4096
"""Longest termination message that the kubelet keeps."""
TERMINATION_LOG_ENV = "OSFT_TERMINATION_LOG"
"""Environment variable with the path of the termination message."""
POD_IP_ENV = "OSFT_POD_IP"
"""Environment variable with the address to serve /progress on; absent: loopback only."""
METRICS_PORT = 28080
"""Port of /progress and /metrics in rendered pods, named `metrics`."""
VERSION_SKEW = "VersionSkew"
"""Reason of a trainer that does not take what the operator wrote: no verdict on the input."""
COMPLETE = "COMPLETE"
"""File, written last, of a folder that counts."""


class ExitCode(enum.IntEnum):
    """What the launcher's exit code says. Bad input and divergence are never retried."""

    DONE = 0
    BAD_INPUT = 2
    DIVERGED = 3
    TRY_AGAIN = 75
    PREEMPTED = 143

    @property
    def is_final(self) -> bool:
        """Whether a retry cannot help."""
        return self in (ExitCode.BAD_INPUT, ExitCode.DIVERGED)


class Document(BaseModel):
    """A frozen JSON document with camelCase names. Unknown names are ignored on reading."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @classmethod
    def parse(cls, text: bytes | str) -> Self | None:
        """Read an untrusted document; None when it is too long or not what it should be."""
        raw = text.encode() if isinstance(text, str) else text
        if len(raw) > MAX_DOCUMENT_BYTES:
            return None
        try:
            return cls.model_validate_json(raw)
        except ValidationError:
            return None

    def to_json(self) -> str:
        """One line of valid JSON, absent values left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


DocumentType = TypeVar("DocumentType", bound=Document)
Text = Annotated[str, Field(max_length=1024)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class Metric(Document):
    """A further number by name; values are strings, as in Kubeflow's TrainJob status."""

    name: Annotated[str, Field(max_length=64)]
    value: Annotated[str, Field(max_length=64)]


class Retention(Document):
    """What became of the old skills: the mean token loss on text that was never trained on."""

    loss_before: float
    """Of the base model."""
    loss_after: float | None = None
    """Of the trained model; absent until the end."""

    @property
    def change(self) -> float | None:
        """After minus before; below zero: the model got better at the old text."""
        return None if self.loss_after is None else self.loss_after - self.loss_before


class Progress(Document):
    """How far the run is. Names follow Kubeflow's TrainJob status where the meaning is equal."""

    run_id: Annotated[str, Field(max_length=128)]
    """Identity of the run this document belongs to."""
    attempt: Count = 1
    """Which try of the run wrote it."""
    global_rank: Count = 0
    """Rank that serves the document; only rank 0's counts are used."""
    phase: Annotated[str, Field(max_length=32)] = "Starting"
    """Starting, Preparing, Training, Validating, Saving, Done."""
    step: Count = 0
    """Optimizer steps done."""
    total_steps: Count | None = None
    """Optimizer steps of the whole run; absent when the run has no end."""
    epoch: float = Field(default=0.0, ge=0)
    """Passes over the data done, with fraction."""
    total_epochs: float | None = Field(default=None, ge=0)
    """Passes of the whole run; absent when the run has no end."""
    loss: float | None = None
    """Mean loss per counted token in the last optimizer step."""
    learning_rate: float | None = Field(default=None, ge=0)
    """Learning rate of the last optimizer step."""
    grad_norm: float | None = Field(default=None, ge=0)
    """Global gradient norm before clipping in the last optimizer step."""
    tokens_per_second: float | None = Field(default=None, ge=0)
    """Tokens of all ranks per second, over the last steps."""
    estimated_remaining_seconds: Count | None = None
    """Time left at the current speed."""
    last_updated_time: Annotated[str, Field(max_length=32)] | None = None
    """When this document was written, RFC 3339, UTC."""
    latest_checkpoint: Text | None = None
    """Newest complete state to resume from."""
    latest_checkpoint_step: Count | None = None
    """Its optimizer step."""
    final: Text | None = None
    """Folder of the trained model, once complete."""
    retention: Retention | None = None
    """Loss on text of the old skills; absent when none is given."""
    metrics: list[Metric] = Field(default_factory=list, max_length=64)
    """Further numbers."""


class Termination(Document):
    """The last words of a trainer process, written to the termination log."""

    reason: Annotated[str, Field(max_length=64)]
    """CamelCase word: Done, AlreadyFinished, BadInput, NoLossTokens, Diverged, OutOfMemory,
    TryAgain, Preempted, VersionSkew, Crashed."""
    exit_code: int
    """Exit code of the process."""
    message: Annotated[str, Field(max_length=2048)] = ""
    """What happened and what to do, for people."""
    rank: int = -1
    """Global rank that failed first; -1 when it is not known."""
    progress: Progress | None = None
    """The last progress of the run."""

    def to_bytes(self) -> bytes:
        """The message, cut so that the kubelet keeps it whole."""
        raw = self.to_json().encode()
        if len(raw) <= MAX_TERMINATION_BYTES:
            return raw
        assert self.message, "a termination message without text fits"
        shorter = self.model_copy(update={"message": self.message[: len(self.message) // 2]})
        return shorter.to_bytes()


class Verdict(Document):
    """Kept in the run folder: this run is over and no retry will change it."""

    run_id: Annotated[str, Field(max_length=128)]
    exit_code: int
    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=2048)] = ""


class Owner(Document):
    """Kept in the run folder: whose it is. A save by an older attempt is refused."""

    run_id: Annotated[str, Field(max_length=128)]
    attempt: int = 1
    fingerprint: Annotated[str, Field(max_length=128)] = ""
    """Digest of data, arguments and model; two runs with one fingerprint are the same training."""


_STEP = re.compile(r"step-(\d{8,})\Z")


@dataclass(frozen=True)
class RunFolder:
    """The paths below ckptOutputDir, each made here and nowhere else."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """States to resume from, one folder each."""
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """State after so many optimizer steps."""
        return self.checkpoints / f"step-{step:08d}"

    @staticmethod
    def is_complete(folder: Path) -> bool:
        """Whether a saved folder was written to its end."""
        return (folder / COMPLETE).is_file()

    @staticmethod
    def step_of(folder: Path) -> int | None:
        """Optimizer step of a checkpoint folder; None when it is none."""
        match = _STEP.search(folder.name)
        return int(match[1]) if match else None

    def complete_checkpoints(self) -> list[Path]:
        """Complete states, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if self.step_of(path) is not None]
        return sorted(filter(self.is_complete, found), key=lambda path: self.step_of(path) or 0)

    def export_of_epoch(self, epoch: int) -> Path:
        """Model after an epoch, as a Hugging Face folder."""
        return self.root / "exports" / f"epoch-{epoch:04d}"

    @property
    def best_export(self) -> Path:
        """Model with the lowest validation loss, as a Hugging Face folder."""
        return self.root / "exports" / "best"

    @property
    def logs(self) -> Path:
        """Events for TensorBoard."""
        return self.root / "logs"

    @property
    def final(self) -> Path:
        """The trained model, as a Hugging Face folder."""
        return self.root / "final"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """What /progress serves."""
        return self.root / "progress.json"

    @property
    def plan(self) -> Path:
        """Targets, ranks, memory and steps of the run."""
        return self.root / "plan.json"

    @property
    def owner(self) -> Path:
        """Run identity and attempt."""
        return self.root / "OWNER"

    @property
    def verdict(self) -> Path:
        """Written when no retry can help."""
        return self.root / "VERDICT"

    @property
    def cache(self) -> Path:
        """Prepared data and decompositions, by digest."""
        return self.root / "cache"

    def previous(self, number: int) -> Path:
        """Where an earlier run is moved to."""
        return self.root / f"previous-{number}"


def finite(facts: Mapping[str, object]) -> dict[str, object]:
    """The same without NaN and infinity, for which JSON has no word."""
    return {k: v for k, v in facts.items() if not isinstance(v, float) or math.isfinite(v)}


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader or a crash sees the old or the new text, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_termination(message: Termination, environ: dict[str, str] | os._Environ[str]) -> None:
    """Write the last words where the kubelet reads them; nothing outside a pod.

    The first process that fails writes; later ones find the file filled and leave it.
    """
    target = environ.get(TERMINATION_LOG_ENV)
    if target is None:
        return
    path = Path(target)
    if message.exit_code != 0 and path.is_file() and path.stat().st_size > 0:
        return
    path.write_bytes(message.to_bytes())


def summary(progress: Progress) -> str:
    """The progress in a few words for people: `42% 840/2000`, or `step 840` without an end."""
    total = progress.total_steps or (progress.step if progress.final is not None else 0)
    if total:
        return f"{percentage(progress)}% {progress.step}/{total}"
    return f"step {progress.step}"


def percentage(progress: Progress) -> int:
    """0 to 100; 99 until the final model is complete."""
    if progress.final is not None:
        return 100
    if not progress.total_steps:
        return 0
    return min(99, 100 * progress.step // progress.total_steps)


def duration(seconds: int) -> str:
    """Seconds as people read them: 42s, 7m10s, 3h25m, 2d4h."""
    minutes, second = divmod(max(0, seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour}h"
    if hours:
        return f"{hours}h{minute}m"
    return f"{minutes}m{second}s" if minutes else f"{second}s"


def read_document(path: Path, kind: type[DocumentType]) -> DocumentType | None:
    """A document from a file; None when there is none or it is damaged."""
    try:
        return kind.parse(path.read_bytes())
    except FileNotFoundError:
        return None


def metric_lines(path: Path) -> list[dict[str, float]]:
    """metrics.jsonl as a list; a last line cut by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
