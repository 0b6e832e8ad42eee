"""One rank as a process: `python -m osft_trainer ARGS`, started by the launcher.

Reads the arguments, turns signals into the stop event, runs `worker.run`, and leaves the rank's
last words and exit code. Must never train, or decide anything about other ranks.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from osft_trainer import last_words
from osft_trainer.arguments import TrainerArguments, from_argv
from osft_trainer.last_words import REPORTS_ENV, LastWords
from osft_trainer.lifeline import end_with_parent


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run this rank and exit with the code of `report.ExitCode`."""
    # A crash in native code (torch, a driver) leaves no exception: the log gets the Python stacks.
    faulthandler.enable()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s rank {rank} %(levelname)s %(message)s"
    )
    if REPORTS_ENV in os.environ:
        end_with_parent()
        last_words.forget(rank, os.environ)
    arguments: TrainerArguments | None = None
    try:
        arguments = from_argv(sys.argv[1:] if argv is None else argv, program="osft_trainer")
        words = _run(arguments, rank)
    # Any failure of a rank becomes its last words; none is lost.
    except (Exception, KeyboardInterrupt) as error:
        words = last_words.of_error(error, rank)
        if words.reason in ("Crashed", "OutOfMemory"):
            traceback.print_exc()
        else:
            print(f"rank {rank}: {words.reason}: {words.message}", file=sys.stderr)
    progress = None if arguments is None else last_words.progress_of(arguments)
    last_words.leave(words, os.environ, progress)
    _exit(words.exit_code)


def _run(arguments: TrainerArguments, rank: int) -> LastWords:
    # Hardly anything that torch and transformers make while they load is garbage: to look for it
    # there takes long, now and later.
    gc.disable()
    # Here, so that wrong arguments are refused before torch takes its seconds to load.
    from osft_trainer import worker
    from osft_trainer.parallel import start_world

    gc.freeze()
    gc.enable()
    world = start_world()
    # Only now: until all ranks have met there is nothing to save, and a signal shall end a rank
    # that waits for others at once. Inside that wait no handler would be called.
    stop = _stop_on_signals()
    return last_words.of_result(worker.run(arguments, world, stop=stop), rank)


def _stop_on_signals() -> threading.Event:
    """Set an event at SIGTERM or SIGINT: the loop saves and ends after its step."""
    stop = threading.Event()
    got: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Kubelet, launcher and kernel all send one, and the next may come while this thread is
        # inside `set`: a second `set` would wait for the lock that the first one holds, for ever.
        first = not got
        got.append(number)
        if first:
            stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def _exit(code: int) -> NoReturn:
    """Leave at once: destructors of a broken process group may wait for ranks that are gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
