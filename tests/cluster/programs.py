"""Runs the control plane's programs, each with a log of its own. Called by control_plane."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import urllib3

from cluster.api import Api, ApiError
from cluster.binaries import Binaries
from osft_operator import process_tree

READY_SECONDS = 180


class Programs:
    """The started programs; `stop` ends them all."""

    def __init__(self, binaries: Binaries, folder: Path, mark: str) -> None:
        self._binaries, self._folder, self._mark = binaries, folder, mark
        self._started: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._arguments: dict[str, tuple[str, ...]] = {}

    def run(self, name: str, *arguments: str) -> None:
        """Start a program; its output goes to `<name>.log`."""
        program = self._binaries.path(name)
        assert program is not None, name
        environment = {"HOME": str(self._folder), "PATH": "/usr/bin:/bin"}
        self._arguments[name] = arguments
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [program, *arguments],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment | {process_tree.VARIABLE: self._mark},
            )
        self._started.append((name, process))

    def restart(self, name: str) -> None:
        """Kill a program and start it as it was started."""
        ((_, process),) = [each for each in self._started if each[0] == name]
        process.kill()
        process.wait()
        self._started = [each for each in self._started if each[0] != name]
        self.run(name, *self._arguments[name])

    def signal(self, name: str, number: int) -> None:
        """Send a program a signal."""
        ((_, process),) = [each for each in self._started if each[0] == name]
        process.send_signal(number)

    def wait_until_ready(self, api: Api, certificate: Path) -> None:
        """Wait until the server that was started last is ready.

        Args:
            api: a client of it.
            certificate: the file that the server writes for itself at its start.

        Raises:
            RuntimeError: it ended, or is not ready in time; with the end of its log.
        """
        name, process = self._started[-1]
        end = time.monotonic() + READY_SECONDS
        while process.poll() is None and time.monotonic() < end:
            try:
                if certificate.exists() and api.get("/readyz"):
                    return
            except (ApiError, urllib3.exceptions.HTTPError):
                pass  # not yet
            time.sleep(0.2)
        log = self._log(name).read_text(errors="replace")
        raise RuntimeError(f"{name} does not serve; its last words:\n{log[-4000:]}")

    def stop(self) -> None:
        """End every program, without asking: nothing of it is needed again."""
        process_tree.kill(self._mark)
        for _, process in self._started:
            process.wait()

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"
