"""`osft watch` and `osft logs`: follow an OSFTJob of a cluster from one's own terminal.

Called by cli. Outages of the cluster are sat out and said; only what a person must change ends a
command. Must never change anything in the cluster.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any, BinaryIO

from rich.console import Console
from rich.live import Live

from osft_operator import names
from osft_operator.endings import is_finished
from osft_operator.observed import Object, find_condition
from osft_operator.remote import Remote, Unreachable
from osft_operator.remote_view import NoPod, line, rank_zero_pod, view

PAUSE_SECONDS = 2.0
"""Time between two looks."""
END_SECONDS = 10.0
"""A log that has ended is asked for again if the container is still said to run after so long."""
SUCCEEDED, FAILED = 0, 1


def watch(arguments: argparse.Namespace) -> int:
    """Show a job until it ends. Exit code 0: it succeeded, 1: it failed."""
    remote = Remote.connect(arguments.namespace, arguments.context)
    job = remote.job(arguments.name)
    console = Console()
    job = _show_live(remote, job, console) if console.is_terminal else _show_lines(remote, job)
    succeeded = find_condition(job["status"], "Complete").get("status") == "True"
    return SUCCEEDED if succeeded else FAILED


def _show_live(remote: Remote, job: Object, console: Console) -> Object:
    with Live(view(job), console=console, auto_refresh=False) as live:
        while not is_finished(job.get("status") or {}):
            time.sleep(PAUSE_SECONDS)
            note = ""
            try:
                job = remote.job(job["metadata"]["name"])
            except Unreachable as error:
                note = f"{error}; trying again"
            live.update(view(job, note), refresh=True)
    return job


def _show_lines(remote: Remote, job: Object) -> Object:
    """For a pipe: a line whenever something changed."""
    shown = ""
    while True:
        if (text := line(job)) != shown:
            print(text, flush=True)
            shown = text
        if is_finished(job.get("status") or {}):
            return job
        time.sleep(PAUSE_SECONDS)
        try:
            job = remote.job(job["metadata"]["name"])
        except Unreachable as error:
            print(f"osft: {error}; trying again", file=sys.stderr, flush=True)


def logs(arguments: argparse.Namespace) -> int:
    """Print the log of rank 0's trainer; with --follow across restarts, until the job ends."""
    remote = Remote.connect(arguments.namespace, arguments.context)
    reader = LogReader(remote, arguments.name, sys.stdout.buffer)
    if arguments.follow:
        reader.follow(arguments.tail)
    else:
        reader.read(tail_lines=arguments.tail, previous=arguments.previous or None)
    return SUCCEEDED


@dataclasses.dataclass(frozen=True)
class Container:
    """One start of the trainer's container in rank 0's pod."""

    pod: str
    uid: str
    """Of the pod."""
    restarts: int
    running: bool = dataclasses.field(compare=False)


class LogReader:
    """Copies the log of rank 0's trainer, whichever pod that is."""

    def __init__(self, remote: Remote, name: str, out: BinaryIO) -> None:
        self._remote = remote
        self._name = name
        self._out = out
        self._read: Container | None = None
        self._read_at = 0.0
        self._at_end = False
        self._said = ""

    def read(self, **options: Any) -> None:
        """What there is now.

        Raises:
            NoPod: there is no pod.
            RemoteError: there is no log.
        """
        self._copy(self._find(self._remote.job(self._name)), options)

    def follow(self, tail: int | None) -> None:
        """All that comes, until the job has ended; a break of the connection is sat out."""
        finished = False
        while not finished:
            try:
                job = self._remote.job(self._name)
                finished = is_finished(job.get("status") or {})
                self._go_on(self._find(job), tail)
            except (NoPod, Unreachable) as error:
                self._note(f"{error}; waiting")
            if not finished:
                time.sleep(PAUSE_SECONDS)

    def _go_on(self, container: Container, tail: int | None) -> None:
        """Read a container to its end, unless that is done."""
        options: dict[str, Any] = {"tail_lines": tail} if self._read is None else {}
        if container == self._read:
            silent = time.monotonic() - self._read_at
            if self._at_end and not (container.running and silent > END_SECONDS):
                return
            options = {"since_seconds": max(1, round(silent))}
        self._at_end = False
        self._copy(container, {**options, "follow": True})
        self._read, self._at_end = container, True

    def _find(self, job: Object) -> Container:
        """Rank 0's pod, and which of its containers runs or ran last."""
        attempt = (job.get("status") or {}).get("attempt") or 1
        pods = self._remote.pods(self._name, attempt)
        name = rank_zero_pod(job, pods)
        pod = next(each for each in pods if each["metadata"]["name"] == name)
        statuses = [
            status
            for status in (pod.get("status") or {}).get("containerStatuses") or []
            if status.get("name") == names.CONTAINER
        ]
        restarts = max((int(status.get("restartCount") or 0) for status in statuses), default=0)
        running = any("running" in (status.get("state") or {}) for status in statuses)
        return Container(name, str(pod["metadata"].get("uid")), restarts, running)

    def _copy(self, container: Container, options: dict[str, Any]) -> None:
        for part in self._remote.log(container.pod, **options):
            self._out.write(part)
            self._out.flush()
            # Not before: of a container that refuses at first, all that was asked for is to come.
            self._read, self._read_at = container, time.monotonic()

    def _note(self, text: str) -> None:
        """Say a thing that may pass once, not every two seconds."""
        if text != self._said:
            print(f"osft: {text}", file=sys.stderr, flush=True)
            self._said = text
