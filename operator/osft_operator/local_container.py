"""One container of a pod as a process of this machine, with the kubelet's rules for restarts.

Called by local_runner. It starts, watches, restarts and ends one process tree and says what came
of it in the words of a Kubernetes container status. No threads: whoever owns it calls `poll`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from osft_operator import local_command, process_tree
from osft_operator.local_command import Surroundings

MESSAGE_BYTES = 4096
"""The longest termination message that the kubelet reads from the file."""

LOG_TAIL_BYTES = 2048
LOG_TAIL_LINES = 80
"""What FallbackToLogsOnError takes from the end of the log: the smaller of the two."""


@dataclass(frozen=True, kw_only=True)
class BackOff:
    """How long a container waits before it runs again: first, twice that, and so on to the cap."""

    first_seconds: float = 10.0
    cap_seconds: float = 300.0
    reset_after_seconds: float = 600.0
    """A container that ran this long starts again from the first wait."""

    def wait_seconds(self, failures: int) -> float:
        """The wait after so many exits in a row, counted from 1."""
        return float(min(self.first_seconds * 2 ** min(failures - 1, 32), self.cap_seconds))


class ContainerProcess:
    """Starts a container's process, restarts it by policy, reports its state."""

    def __init__(
        self,
        pod: Mapping[str, Any],
        container: Mapping[str, Any],
        at: Surroundings,
        *,
        restart_policy: str,
        back_off: BackOff,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.name: str = container["name"]
        self.restart_count = 0
        self.finished = False
        self._pod, self._container, self._at = pod, container, at
        self._restart_policy, self._back_off, self._clock = restart_policy, back_off, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._failures = 0
        self._restart_at: float | None = None
        self._started = 0.0
        self._oom_kills = 0
        self._state: dict[str, Any] = {"waiting": {"reason": "PodInitializing"}}
        self._last_state: dict[str, Any] = {}
        self._mark = f"{at.mark}/{self.name}"

    @property
    def running(self) -> bool:
        """Whether a process is there now."""
        return self._process is not None

    @property
    def started(self) -> bool:
        """Whether it has ever been started."""
        return self._started > 0

    @property
    def exit_code(self) -> int | None:
        """The exit code of the newest process; None while it runs or before it ran."""
        ended = self._state.get("terminated") or self._last_state.get("terminated")
        return None if self.running or not ended else int(ended["exitCode"])

    @property
    def process_id(self) -> int | None:
        """The process that stands for PID 1 of the container."""
        return self._process.pid if self._process else None

    def log_path(self, previous: bool = False) -> Path | None:
        """The log of the newest attempt, or of the one before it; None when there is none."""
        attempt = self.restart_count - previous
        return self._log(attempt) if attempt >= 0 and self._log(attempt).exists() else None

    def start(self) -> None:
        """Start the process, for the first time or again."""
        self._restart_at = None
        self._started = self._clock()
        self._oom_kills = _oom_kills()
        folder = self._at.work_dir / self.name
        for each in (folder, self._at.work_dir / "home", self._at.work_dir / "cwd"):
            each.mkdir(parents=True, exist_ok=True)
        local_command.termination_log(self._container, self._at).write_bytes(b"")
        with self._log(self.restart_count).open("wb") as log:
            try:
                self._process = self._popen(log.fileno())
            except (OSError, ValueError) as error:
                log.write(f"{error}\n".encode())
                self._ended(128, "StartError", str(error))
                return
        self._state = {"running": {"startedAt": timestamp(self._started)}}

    def poll(self) -> bool:
        """Look once; True when the state has changed."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return False
            self._process = None
            # what PID 1 leaves behind dies with the container's process name space
            process_tree.kill(self._mark)
            self._exited(code if code >= 0 else 128 - code)
            return True
        if self._restart_at is not None and self._clock() >= self._restart_at:
            self.restart_count += 1
            self.start()
            return True
        return False

    def terminate(self) -> None:
        """Ask PID 1 to end, and start nothing again."""
        self._stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
        elif not self.finished:
            self._restart_at, self.finished = None, True
            ended = self._last_state.get("terminated")
            self._state = {"terminated": ended} if ended else self._state

    def kill(self) -> None:
        """End the whole tree now; the next poll reports it."""
        self._stopping = True
        process_tree.kill(self._mark)

    def status(self) -> dict[str, Any]:
        """The container's status in Kubernetes' words."""
        return {
            "name": self.name,
            "image": self._container.get("image", ""),
            "imageID": "",
            "ready": self.running or (self.finished and self.exit_code == 0),
            "restartCount": self.restart_count,
            "state": self._state,
            "lastState": self._last_state,
        }

    def _popen(self, log: int) -> subprocess.Popen[bytes]:
        for _, place in local_command.mounts(self._container, self._at):
            # a subPath that is not there becomes a folder, as the kubelet does it
            if not place.exists():
                place.mkdir(parents=True)
        command = local_command.command(self._pod, self._container, self._at)
        directory = self._container.get("workingDir")
        if directory:
            directory = local_command.rewrite_path(directory, self._pod, self._container, self._at)
        return subprocess.Popen(
            command,
            env=local_command.environment(self._pod, self._container, self._at),
            cwd=directory or self._at.work_dir / "cwd",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _log(self, attempt: int) -> Path:
        return self._at.work_dir / self.name / f"{attempt}.log"

    def _exited(self, code: int) -> None:
        reason = "Completed" if code == 0 else "Error"
        if code == 128 + signal.SIGKILL and _oom_kills() > self._oom_kills:
            # the kernel counts them for the machine, so a neighbour's kill may be meant
            reason = "OOMKilled"
        self._ended(code, reason, self._message(code))

    def _ended(self, code: int, reason: str, message: str) -> None:
        now = self._clock()
        ended: dict[str, Any] = {
            "exitCode": code,
            "reason": reason,
            "startedAt": timestamp(self._started),
            "finishedAt": timestamp(now),
        }
        if message:
            ended["message"] = message
        again = self._restart_policy == "Always" or (
            self._restart_policy == "OnFailure" and code != 0
        )
        if not again or self._stopping:
            self._state, self.finished = {"terminated": ended}, True
            return
        if now - self._started >= self._back_off.reset_after_seconds:
            self._failures = 0
        self._failures += 1
        wait = self._back_off.wait_seconds(self._failures)
        self._restart_at = now + wait
        self._last_state = {"terminated": ended}
        self._state = {
            "waiting": {
                "reason": "CrashLoopBackOff",
                "message": f"back-off {wait:g}s restarting failed container={self.name}",
            }
        }

    def _message(self, code: int) -> str:
        path = local_command.termination_log(self._container, self._at)
        message = _tail(path, MESSAGE_BYTES) if path.exists() else ""
        policy = self._container.get("terminationMessagePolicy", "File")
        if not message and code != 0 and policy == "FallbackToLogsOnError":
            lines = _tail(self._log(self.restart_count), LOG_TAIL_BYTES).splitlines(keepends=True)
            message = "".join(lines[-LOG_TAIL_LINES:])
        return message


def timestamp(seconds: float) -> str:
    """A time as Kubernetes writes it: UTC, whole seconds."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _tail(path: Path, limit: int) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - limit))
        return file.read(limit).decode("utf-8", errors="replace")


def _oom_kills() -> int:
    """How often this machine's kernel has killed a process for memory; 0 where it is not told."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
