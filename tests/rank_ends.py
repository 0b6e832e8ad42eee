"""A rank as its own process, to its end: what it leaves where the kubelet looks, and its exit code.

What goes wrong is brought about inside the process, by a function of this module.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from osft_trainer import __main__ as rank_main
from osft_trainer import loop
from osft_trainer.arguments import TrainerArguments
from osft_trainer.config import RunParameters, TrainingParameters
from osft_trainer.identity import Fingerprint, OwnerRecord, claim
from osft_trainer.report import TERMINATION_LOG_ENV, RunFolder, read_document

STEP = 3
"""The one that something happens in."""


@dataclass(frozen=True)
class End:
    """What is left of a rank."""

    code: int | None
    words: dict[str, Any]
    """The one JSON object of the termination message."""


def end_of(told: TrainingParameters, log: Path, fault: Callable[..., Any] | None = None) -> End:
    """Train in a process of its own; `fault` happens in the place of a step's backward."""
    arguments = TrainerArguments(told, RunParameters(run_id=tiny.RUN_ID))
    given = (arguments.to_argv(), str(log), fault)
    (code,) = tiny.finish(tiny.start_ranks(_run, 1, [given]))
    return End(code, json.loads(log.read_text(), parse_constant=pytest.fail))


def _run(argv: list[str], log: str, fault: Callable[..., Any] | None) -> None:
    os.environ[TERMINATION_LOG_ENV] = log
    if fault is not None:
        real, count = loop.backward, 0

        def counted(*told: Any) -> Any:
            nonlocal count
            count += 1
            return fault(real, *told) if count == STEP else real(*told)

        pytest.MonkeyPatch().setattr(loop, "backward", counted)
    rank_main.main(argv)


def not_a_number(root: Path, real: Callable[..., Any], *told: Any) -> Any:
    return real(*told) * math.nan


def a_limit_of_memory(root: Path, real: Callable[..., Any], *told: Any) -> Any:
    """As `ulimit -v`: little more than what is held already, and a step that wants much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    return real(*told) + torch.ones(2**28).sum()


def a_newer_attempt(root: Path, real: Callable[..., Any], *told: Any) -> Any:
    newer = RunParameters(run_id=tiny.RUN_ID, attempt=2)
    owner = read_document(RunFolder(root).owner, OwnerRecord)
    assert owner is not None
    claim(RunFolder(root), newer, Fingerprint(owner.parts))
    return real(*told)


def a_full_disk(disk: Path, real: Callable[..., Any], *told: Any) -> Any:
    """Full but for some lines of metrics, which are no state."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        file.truncate(file.tell() - 2**15)
    return real(*told)
