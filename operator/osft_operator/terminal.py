"""What `osft run` shows: a live progress line, then the status in the words of the CR.

Called by `cli` only. Prints what it is given; decides nothing.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from osft_operator.local import LocalJob

Object = dict[str, Any]


class Screen:
    """A progress bar while the job runs; on a pipe, one line per change of phase or 10 %."""

    def __init__(self, job: LocalJob, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._live = not quiet and self._console.is_terminal
        self._quiet = quiet
        self._shown = ""
        self._events = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[words]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(job.job.metadata.name, total=100, words="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        if not self._quiet:
            # a trainer's words may hold [/INST]: markup to rich, and an error
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, job: LocalJob) -> None:
        """Show the newest status."""
        for reason, message in job.events[self._events :]:
            self.say(f"{reason}: {message}")
        self._events = len(job.events)
        progress = job.status.get("progress") or {}
        percentage = int(progress.get("progressPercentage", 0))
        self._bar.update(self._task, completed=percentage, words=_words(job.status))
        line = f"{job.status.get('phase', '')} {percentage // 10}0%"
        if not self._live and line != self._shown and progress:
            self.say(f"{job.status.get('phase', '')} {_words(job.status)}")
            self._shown = line


def _words(status: Object) -> str:
    progress = status.get("progress") or {}
    parts = [str(progress.get("summary", ""))]
    if "loss" in progress:
        parts.append(f"loss {progress['loss']}")
    if "tokensPerSecond" in progress:
        parts.append(f"{progress['tokensPerSecond']} tokens/s")
    if progress.get("eta") and status.get("phase") != "Succeeded":
        parts.append(f"{progress['eta']} left")
    return "  ".join(part for part in parts if part)


def print_status(job: LocalJob) -> None:
    """The end: what `kubectl get` and `kubectl describe` would say, and where things lie."""
    status = job.status
    progress = status.get("progress") or {}
    print(f"osftjob/{job.job.metadata.name}  {status['phase']}  {_words(status)}".rstrip())
    for condition in status.get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            print(f"  {condition['reason']}: {condition['message']}")
    failure = status.get("failure")
    if failure:
        where = f"pod {failure.get('pod')} container {failure.get('container')}"
        print(f"  {where}: {failure.get('reason')} (exit code {failure.get('exitCode')})")
    if status["phase"] == "Succeeded":
        print(f"  model        {job.run_folder.final}")
    if kept := status.get("retention"):
        print(f"  old skills   loss {kept['summary']}")
    if progress:
        print(f"  metrics      {job.run_folder.metrics}")
    for name, path in job.log_paths():
        print(f"  log          {name}: {path}")
    sys.stdout.flush()
