"""Saving beside the training: a step waits for a copy in host memory, not for the disk.

Lives here: when a state is due, the one save that may be in flight, and its two halves: every rank
writes its rows, then the first rank publishes them. Called by `loop`, by all ranks together,
between steps. Must never: talk to other ranks from a thread (the main thread's collectives would
meet it), publish before every rank's rows are on disk, or lose a failure.

The threads only write; what follows is decided at the next step's boundary, from flags that all
ranks have exchanged there. So every rank is in the same half at every step:

    begin      copy | write rows ...............|
    advance                                      | publish (first rank) ...|
    advance                                                                 | done
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from osft_trainer.agreement import from_first_rank, raise_together
from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.config import TrainingParameters
from osft_trainer.durable import is_full, told
from osft_trainer.outcome import Superseded
from osft_trainer.shards import HostCopy, Rows, write_rows

logger = logging.getLogger(__name__)


@dataclass
class _Flight:
    """A save that has begun."""

    position: Position
    work: Path
    decomposition: str
    written: Future[str]
    """This rank's rows."""
    published: Future[str] | None = None
    """None as long as rows are written; the first rank's work, done from the start elsewhere."""


class Saver:
    """Writes the states of one run, one at a time, when they are due."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        training: TrainingParameters,
        saved_step: int,
        *,
        before_publish: Callable[[], None] = lambda: None,
        on_saved: Callable[[Position, Path], None] = lambda position, path: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is in flight, and the time to the next save begins.

        Args:
            checkpoints: where the states go.
            training: how often.
            saved_step: step of the newest state; 0 when there is none.
            before_publish: runs on the first rank's thread; makes durable what a state stands on.
            on_saved: called on every rank's main thread when a state is complete.
            clock: in seconds.
        """
        self._checkpoints = checkpoints
        self._training = training
        self._world = checkpoints.world
        self._before_publish = before_publish
        self._on_saved = on_saved
        self._clock = clock
        self._saved_step = saved_step
        self._saved_at = clock()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._host_copy = HostCopy()
        self._flight: _Flight | None = None

    def is_due_at(self, step: int) -> bool:
        """Whether this step's state is wanted, by the number of steps."""
        every = self._training.checkpoint_every_steps
        return every is not None and step % every == 0

    def is_due_now(self, step: int) -> bool:
        """Whether it is time. Clocks differ: only the first rank says so, for all.

        Not while a save is in flight: a disk that is slower than the clock shall not hold up steps.
        """
        minutes = self._training.checkpoint_every_minutes
        if minutes is None or self._world.rank != 0 or self._flight is not None:
            return False
        return step != self._saved_step and self._clock() - self._saved_at >= 60 * minutes

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._flight is not None and not all(job.done() for job in _jobs(self._flight))

    @property
    def has_failed(self) -> bool:
        """Whether this rank's thread has failed."""
        if self._flight is None:
            return False
        return any(job.done() and job.exception() is not None for job in _jobs(self._flight))

    def begin(self, state: State, position: Position) -> None:
        """Copy the state and let it be written; an earlier save is waited for. Collective.

        Raises:
            OSError, Superseded: on every rank; see `finish`.
        """
        self.finish()
        with self._telling_the_owner():
            work = self._checkpoints.make_work_folder(position)
        copied = self._host_copy.take(state.trainables, state.optimizer)
        written = self._thread.submit(_write, work, self._world.rank, copied)
        self._flight = _Flight(position, work, state.decomposition, written)
        self._saved_at = self._clock()

    def advance(self, writing: bool, failed: bool) -> None:
        """Go on with the save in flight, without waiting. Every rank with the same arguments.

        Args:
            writing: `is_writing` of any rank.
            failed: `has_failed` of any rank.

        Raises:
            OSError, Superseded: on every rank, if one has failed.
        """
        flight = self._flight
        if flight is None or (writing and not failed):
            return
        if failed or flight.published is not None:
            self.finish()
        else:
            self._publish(flight)

    def finish(self) -> None:
        """Wait until the save in flight is complete, if there is one. Collective.

        Raises:
            OSError: on every rank, when one could not write.
            Superseded: on every rank, when a newer attempt owns the folder.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        failure = flight.written.exception()
        assert failure is None or isinstance(failure, OSError), "_write raises nothing else"
        elsewhere = f"checkpoint {flight.work}: another rank could not write its rows"
        try:
            with self._telling_the_owner():
                raise_together(failure, self._world, elsewhere)
                if flight.published is None:
                    self._publish(flight)
                assert flight.published is not None
                path = from_first_rank(self._world, flight.published.result)
        except (OSError, Superseded):
            if self._world.rank == 0:
                # No rank writes there any more, and on a full disk a restart needs the room.
                shutil.rmtree(flight.work, ignore_errors=True)
            raise
        self._saved_step = flight.position.step
        self._on_saved(flight.position, Path(path))

    def finish_with(self, state: State, position: Position) -> None:
        """Save this state unless it is saved, and wait until it is complete. Collective.

        It is the last one, so it is tried whatever became of the one before.

        Raises:
            OSError, Superseded: on every rank; see `finish`.
        """
        try:
            self.finish()
        except OSError as error:
            if self._world.rank == 0:
                logger.warning("the newest state is tried after a failure: %s", error)
        if position.step > self._saved_step:
            self.begin(state, position)
            self.finish()

    @contextlib.contextmanager
    def _telling_the_owner(self) -> Iterator[None]:
        """After an error that every rank has, see whether the folder is another's by now.

        The next owner removes what it finds half written, so our error may be its doing.
        """

        def check() -> str:
            self._checkpoints.check_owner()
            return ""

        try:
            yield
        except OSError:
            from_first_rank(self._world, check)
            raise

    def _publish(self, flight: _Flight) -> None:
        if self._world.rank == 0:
            job = functools.partial(_publish, self._checkpoints, self._before_publish, flight)
            flight.published = self._thread.submit(job)
        else:
            flight.published = Future()
            flight.published.set_result("")


def _jobs(flight: _Flight) -> list[Future[str]]:
    return [flight.written] if flight.published is None else [flight.written, flight.published]


def _write(work: Path, rank: int, copied: Rows) -> str:
    try:
        write_rows(work, rank, copied)
    # Whatever it is, it must reach the other ranks, which know OSError.
    except Exception as error:
        raise OSError(f"checkpoint {work}: {_told(error)}") from error
    return ""


def _publish(checkpoints: Checkpoints, before: Callable[[], None], flight: _Flight) -> str:
    try:
        before()
        return checkpoints.publish(flight.work, flight.position, flight.decomposition)
    except Superseded:
        raise
    except Exception as error:
        raise OSError(f"checkpoint {flight.work}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """With what only a state can say."""
    more = ", or lower keep_checkpoints; the states before it are whole" if is_full(error) else ""
    return told(error) + more
