"""What each rank says when it ends, and which of them is to be believed.

Lives here: exit codes of exceptions, the small file that each rank leaves for the launcher, and the
choice of the first failure among them. Written by `__main__` (one rank), read by `launch` and
`api`. Must never import torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field

from osft_trainer.arguments import TrainerArguments
from osft_trainer.durable import is_full, told
from osft_trainer.outcome import (
    Diverged,
    NoLossTokens,
    OutOfMemory,
    Preempted,
    Superseded,
    TrainResult,
    VersionSkew,
)
from osft_trainer.report import (
    VERSION_SKEW,
    Document,
    ExitCode,
    Progress,
    Retention,
    RunFolder,
    Termination,
    read_document,
    write_atomically,
    write_termination,
)

REPORTS_ENV = "OSFT_REPORTS_DIR"
"""Environment variable with the folder in which ranks and launcher leave their last words."""

_LAUNCHER = "launcher.json"
_MAX_MESSAGE = 2048


class Result(Document):
    """`outcome.TrainResult` as a document."""

    final_dir: str | None = None
    steps: int = 0
    loss: float | None = None
    leak: float | None = None
    retention: Retention | None = None
    leak_exported: float | None = None
    validation_loss: float | None = None
    best_validation_loss: float | None = None
    already_finished: bool = False

    @classmethod
    def of(cls, result: TrainResult) -> Result:
        """Write it down."""
        final = None if result.final_dir is None else str(result.final_dir)
        return cls(**{**asdict(result), "final_dir": final})

    def to_result(self) -> TrainResult:
        """Back again."""
        final = None if self.final_dir is None else Path(self.final_dir)
        return TrainResult(**{**dict(self), "final_dir": final})


class LastWords(Document):
    """How one process ended."""

    exit_code: int
    reason: Annotated[str, Field(max_length=64)]
    message: Annotated[str, Field(max_length=_MAX_MESSAGE)] = ""
    rank: int = -1
    """Global rank; -1 for the launcher."""
    time_ns: int = 0
    """When it ended; what ended first is the cause."""
    result: Result | None = None

    def to_termination(self, progress: Progress | None = None) -> Termination:
        """As the kubelet keeps it."""
        return Termination(
            reason=self.reason,
            exit_code=self.exit_code,
            message=self.message,
            rank=self.rank,
            progress=progress,
        )


def of_result(result: TrainResult, rank: int = -1) -> LastWords:
    """A run that reached its end."""
    reason = "AlreadyFinished" if result.already_finished else "Done"
    message = "" if result.final_dir is None else f"the trained model is in {result.final_dir}"
    return LastWords(
        exit_code=ExitCode.DONE,
        reason=reason,
        message=message,
        rank=rank,
        time_ns=time.time_ns(),
        result=Result.of(result),
    )


def of_error(error: BaseException, rank: int = -1) -> LastWords:
    """A run that did not."""
    code, reason = _classify(error)
    text = told(error) if isinstance(error, OSError) and is_full(error) else str(error)
    if reason == "Crashed":
        text = f"{type(error).__name__}: {text}"
    return of_code(code, reason, text, rank)


def of_code(code: ExitCode, reason: str, message: str, rank: int = -1) -> LastWords:
    """An end that the launcher saw itself."""
    return LastWords(
        exit_code=code,
        reason=reason,
        message=message[:_MAX_MESSAGE],
        rank=rank,
        time_ns=time.time_ns(),
    )


def _classify(error: BaseException) -> tuple[ExitCode, str]:
    if isinstance(error, NoLossTokens):
        return ExitCode.BAD_INPUT, "NoLossTokens"
    if isinstance(error, VersionSkew):
        return ExitCode.TRY_AGAIN, VERSION_SKEW
    if isinstance(error, ValueError):
        return ExitCode.BAD_INPUT, "BadInput"
    if isinstance(error, Diverged):
        return ExitCode.DIVERGED, "Diverged"
    if isinstance(error, Preempted | KeyboardInterrupt):
        return ExitCode.PREEMPTED, "Preempted"
    if isinstance(error, OutOfMemory):
        return ExitCode.TRY_AGAIN, "OutOfMemory"
    if isinstance(error, Superseded):
        return ExitCode.TRY_AGAIN, "TryAgain"
    return ExitCode.TRY_AGAIN, "Crashed"


def leave(words: LastWords, environ: Mapping[str, str], progress: Progress | None = None) -> None:
    """Leave them where launcher and kubelet look; nothing where nobody does."""
    reports = environ.get(REPORTS_ENV)
    if reports is not None:
        name = _LAUNCHER if words.rank < 0 else _name(words.rank)
        write_atomically(Path(reports) / name, words.to_json())
    write_termination(words.to_termination(progress), dict(environ))


def progress_of(arguments: TrainerArguments) -> Progress | None:
    """The progress in the run folder, if it can be read and is this run's."""
    path = RunFolder(Path(arguments.training.ckpt_output_dir)).progress
    try:
        found = read_document(path, Progress)
    except OSError:
        # Often the folder is the failure that the last words are about: they come first.
        return None
    return found if found is not None and arguments.run.run_id in (None, found.run_id) else None


def forget(rank: int, environ: Mapping[str, str]) -> None:
    """Remove what this rank left before the launcher started it again."""
    if REPORTS_ENV in environ:
        (Path(environ[REPORTS_ENV]) / _name(rank)).unlink(missing_ok=True)


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def of_ranks(reports: Path) -> list[LastWords]:
    """What the ranks of this node left, first one first."""
    found = [read_document(path, LastWords) for path in reports.glob("rank-*.json")]
    return sorted((words for words in found if words is not None), key=lambda w: w.time_ns)


def of_launcher(reports: Path) -> LastWords | None:
    """What the launcher left."""
    return read_document(reports / _LAUNCHER, LastWords)


def first_failure(words: Iterable[LastWords]) -> LastWords | None:
    """The one that the others followed."""
    failed = (one for one in words if one.exit_code != ExitCode.DONE)
    return min(failed, key=lambda one: one.time_ns, default=None)
