"""This node's ranks as child processes: starting them, signals, and who failed first.

Wraps torch's elastic launcher for `launch`, in whose main thread it runs. Must never decide whether
a run may start, or write into the run folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from osft_trainer import last_words
from osft_trainer.last_words import LastWords
from osft_trainer.report import ExitCode
from osft_trainer.topology import ALONE, STORE_FILE_ENV, Topology

STUCK_SECONDS = 2.0
"""A launcher that has not noticed a signal after this waits for other nodes inside torch."""

_NATIVE_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Ends at which a rank writes its Python stacks to stderr."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stopped:
    """The launcher was asked to stop, and the ranks have ended."""

    patience_is_over: bool
    """Whether ranks were killed before they had saved."""


def run_ranks(
    topology: Topology,
    command: Sequence[str],
    reports: Path,
    leave_stuck: Callable[[], NoReturn],
) -> LastWords | Stopped:
    """Start the ranks and wait for them. In the main thread only, for the sake of signals.

    Args:
        topology: how many, and where they meet.
        command: what each rank runs.
        reports: folder where the ranks leave their last words.
        leave_stuck: ends this process; called when a signal to stop comes while torch waits for
            other nodes, where nothing can be interrupted.

    Returns:
        The words of the first failed rank, of the first rank when all is well; or Stopped.
    """
    config = _launch_config(topology, reports)
    with _closed(topology, reports), _raise_on_signals(leave_stuck) as asked:
        try:
            asked.arm()
            elastic_launch(config, command[0])(*command[1:])
        except SignalException:
            return Stopped(asked.seconds() >= topology.patience_seconds)
        except ChildFailedError as error:
            return _after_failure(reports, error)
        # No rank ran or they cannot be judged: whatever torch raised is a reason to try again.
        except Exception as error:
            logger.exception("the ranks could not be run")
            text = f"the ranks could not be run: {type(error).__name__}: {error}"
            return last_words.of_code(ExitCode.TRY_AGAIN, "TryAgain", text)
        finally:
            asked.armed = False
    done = [words for words in last_words.of_ranks(reports) if words.result is not None]
    if not done:
        return last_words.of_code(ExitCode.TRY_AGAIN, "Crashed", "the ranks ended without a word")
    return min(done, key=lambda words: words.rank)


def _launch_config(topology: Topology, reports: Path) -> LaunchConfig:
    configs: dict[str, Any] = dict(topology.rdzv_conf)
    if topology.backend == "static":
        configs["rank"] = topology.node_rank
    endpoint = topology.endpoint
    if endpoint == ALONE:
        configs["store_type"], endpoint = "file", str(reports / "rendezvous")
    return LaunchConfig(
        min_nodes=topology.min_nodes,
        max_nodes=topology.max_nodes,
        nproc_per_node=topology.nproc_per_node,
        run_id=topology.rdzv_id,
        role="osft",
        rdzv_endpoint=endpoint,
        rdzv_backend=topology.backend,
        rdzv_configs=configs,
        max_restarts=topology.max_restarts,
        # Else ranks look for each other by the host's name, which a machine may not resolve.
        local_addr="127.0.0.1" if topology.endpoint == ALONE else None,
        logs_specs=DefaultLogsSpecs(log_dir=str(reports / "torch")),
        # torch replaces the handlers of what is named here; the launcher keeps its own.
        signals_to_handle="SIGUSR2",
    )


@contextlib.contextmanager
def _closed(topology: Topology, reports: Path) -> Iterator[None]:
    """Have a node that is alone listen to nobody outside it.

    Torch's store takes everybody's values, and its elastic rendezvous unpickles one. So the
    launcher and the ranks meet in files of a folder of their own; what gloo and NCCL listen on
    between ranks is the loopback interface.
    """
    if topology.endpoint != ALONE:
        yield
        return
    ours = {STORE_FILE_ENV: str(reports / "store"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if sys.platform == "linux":
        ours |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _after_failure(reports: Path, error: ChildFailedError) -> LastWords:
    """The first failed rank's words; what a rank that was killed cannot say, is said for it."""
    left = last_words.of_ranks(reports)
    first = last_words.first_failure(left)
    spoken = {words.rank for words in left}
    # A rank that the launcher itself ended, after another had failed, comes later than that.
    latest = None if first is None else first.time_ns / 1e9 + STUCK_SECONDS
    silent = [
        (failure.timestamp, rank, failure)
        for rank, failure in error.failures.items()
        if rank not in spoken
        and (latest is None or failure.timestamp <= latest)
        and (latest is None or failure.exitcode != -signal.SIGTERM)
    ]
    if first is not None and (not silent or ExitCode(first.exit_code).is_final):
        return first
    _, rank, failure = min(silent, key=lambda item: item[:2])
    if failure.exitcode == -signal.SIGKILL:
        how = "was killed (SIGKILL); if nobody did it, the memory limit did: see OOMKilled"
    elif failure.exitcode < 0:
        how = f"was ended by {signal.Signals(-failure.exitcode).name}"
        if -failure.exitcode in _NATIVE_CRASHES:
            how += "; its log has the Python stacks"
    else:
        how = f"ended with exit code {failure.exitcode} and no word"
    return last_words.of_code(ExitCode.TRY_AGAIN, "Crashed", f"rank {rank} {how}")


class _Asked:
    """Whether and since when the launcher is asked to stop."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.armed = False

    def arm(self) -> None:
        """From now on raise at a signal; at once, if one has come before."""
        self.armed = True
        if self.at is not None:
            self._raise()

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; further ones change nothing."""
        if self.at is None:
            self.at = time.monotonic()
            if self.armed:
                self._raise()

    def seconds(self) -> float:
        """Since the first signal."""
        return 0.0 if self.at is None else time.monotonic() - self.at

    def _raise(self) -> None:
        # Whatever came, the ranks are told by SIGTERM to save.
        raise SignalException("asked to stop", signal.SIGTERM)


@contextlib.contextmanager
def _raise_on_signals(leave_stuck: Callable[[], NoReturn]) -> Iterator[_Asked]:
    """Raise in the main thread, once armed, at the first signal to end.

    While the main thread is inside torch (waiting for other nodes), Python calls no handler; the
    signal's number still comes through a pipe, and a thread at its end leaves in its stead.
    """
    asked = _Asked()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, asked.on_signal) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while (said := os.read(reader, 1)) and said[0] not in numbers:
            pass  # SIGCHLD and others come here, too.
        if said:
            time.sleep(STUCK_SECONDS)
            if asked.at is None:
                leave_stuck()

    watcher = threading.Thread(target=watch, name="osft-signals", daemon=True)
    watcher.start()
    try:
        yield asked
    finally:
        signal.set_wakeup_fd(wakeup_before)
        os.close(writer)
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked.at is None:
            watcher.join()
            os.close(reader)
