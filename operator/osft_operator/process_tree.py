"""Finds and ends whole trees of processes on this machine.

Every process that the pod runner (and the tests' cluster) starts carries one environment variable,
and its children inherit it. So a tree can be found in /proc whatever happened to it: torchrun puts
its ranks into process groups of their own, and a killed parent leaves them to init; neither loses
the mark. Linux only. Called by local_container and by the tests; it never touches a process
without the mark it was given.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

VARIABLE = "OSFT_PROCESS_TREE"
"""Its value is a path, `<session>/<pod uid>/<container>`: a prefix names a larger tree."""


def find(mark: str) -> list[int]:
    """The living processes whose mark is `mark` or lies below it, zombies left out."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or somebody else's
        if any(item == wanted or item.startswith(wanted + b"/") for item in environment):
            found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def kill(mark: str, *, timeout_seconds: float = 10.0) -> None:
    """Send SIGKILL to everything below `mark` until nothing is left.

    One round is not enough: a process may fork between the look and the kill.

    Raises:
        TimeoutError: when processes are left, which a process stuck in the kernel can cause.
    """
    end = time.monotonic() + timeout_seconds
    while pids := find(mark):
        if time.monotonic() > end:
            raise TimeoutError(f"processes {pids} did not end after SIGKILL")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


class Watchdog:
    """Ends a tree when this process dies, also by SIGKILL, when no clean-up can run.

    A child of its own session waits on a pipe; the pipe closes with this process, however it ends.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        environment = {k: v for k, v in os.environ.items() if k != VARIABLE}
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def close(self) -> None:
        """End the tree now and the watch with it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    kill(sys.argv[1])
