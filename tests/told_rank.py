"""A rank that ends as it is told: the launcher's tests run it in the place of a training.

TOLD_RANKS is a JSON object from rank to one word; TOLD_FOLDER is where each leaves its environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from osft_trainer import last_words
from osft_trainer.outcome import Diverged, Preempted, TrainResult

RANK = int(os.environ["RANK"])
NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def say(error: Exception) -> NoReturn:
    words = last_words.of_error(error, RANK)
    last_words.leave(words, os.environ)
    sys.exit(words.exit_code)


def on_term(error: Exception) -> NoReturn:
    """Wait for SIGTERM, then end by the error."""
    wait_for_term()
    say(error)


def wait_for_term() -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    mark("waiting")
    while not asked:
        time.sleep(0.02)


def mark(name: str) -> None:
    (Path(os.environ["TOLD_FOLDER"]) / f"{name}-{RANK}").touch()


def main() -> None:
    told = json.loads(os.environ["TOLD_RANKS"]).get(str(RANK), "done")
    seen = {"pid": os.getpid(), "argv": sys.argv[1:], **{n: os.environ.get(n) for n in NAMES}}
    path = Path(os.environ["TOLD_FOLDER"]) / f"seen-{RANK}.json"
    path.write_text(json.dumps(seen))
    if told == "is done when asked":
        wait_for_term()
    if told in ("done", "is done when asked"):
        last_words.leave(last_words.of_result(TrainResult(None, 7, 0.5, None), RANK), os.environ)
    elif told == "bad input":
        say(ValueError("data_path: line 3 is no JSON"))
    elif told == "diverges":
        say(Diverged("the loss is NaN at step 4"))
    elif told == "crashes":
        say(KeyError("layer"))
    elif told == "ends silently":
        sys.exit(1)
    elif told == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif told == "crashes in native code":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif told == "saves when asked":
        on_term(Preempted("saved after step 5"))
    elif told == "loses its peer":
        on_term(RuntimeError("connection closed by peer"))
    elif told == "is deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        mark("waiting")
        time.sleep(600)
    else:
        raise AssertionError(told)


if __name__ == "__main__":
    main()
