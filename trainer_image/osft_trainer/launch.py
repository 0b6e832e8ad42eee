"""The launcher: `osft-train ARGS`, `python -m osft_trainer.launch ARGS`.

Starts this node's ranks with torch's elastic launcher in its own process and exits with what the
first failed rank said (torchrun makes 1 of every code). The entry point of the trainer's container,
and of `api` for more than one process. Must never train, or start a rank for a run that is over.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from osft_trainer import last_words
from osft_trainer.arguments import DEFAULTS_ENV, TrainerArguments, from_argv
from osft_trainer.identity import is_finished, standing_verdict
from osft_trainer.last_words import REPORTS_ENV, LastWords
from osft_trainer.lifeline import end_with_parent
from osft_trainer.outcome import VersionSkew
from osft_trainer.report import POD_IP_ENV, TERMINATION_LOG_ENV, ExitCode, RunFolder
from osft_trainer.topology import PATIENCE_ENV, Topology, resolve, usable_cpus

RANK_PROGRAM = (sys.executable, "-u", "-m", "osft_trainer")
"""What is started once per rank; the arguments follow."""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with a code of `report.ExitCode`."""
    # The first process of a container would ignore the signal until the ranks run.
    signal.signal(signal.SIGTERM, _leave_early)
    if REPORTS_ENV in os.environ:
        end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s launcher %(levelname)s %(message)s")
    sys.exit(run_command(sys.argv[1:] if argv is None else argv))


def _leave_early(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(ExitCode.PREEMPTED)


def run_command(argv: Sequence[str], program: Sequence[str] = RANK_PROGRAM) -> int:
    """Check everything, start the ranks, wait for them, and leave the last words.

    Args:
        argv: as `arguments` reads them.
        program: what to start for each rank.

    Returns:
        The exit code.
    """
    _forget_old_words()
    try:
        arguments = _parse(argv)
        topology = resolve(arguments.launch, os.environ)
    except ValueError as error:
        words = last_words.of_error(error)
        print(f"osft-train: error: {words.message}", file=sys.stderr)
        last_words.leave(words, os.environ)
        return words.exit_code
    return _launch(arguments, topology, program)


def _launch(arguments: TrainerArguments, topology: Topology, program: Sequence[str]) -> int:
    over = already_over(arguments)
    if over is not None:
        last_words.leave(over, os.environ, last_words.progress_of(arguments))
        logger.info("%s: %s", over.reason, over.message)
        return over.exit_code
    _set_defaults(topology)
    with _reports() as reports:
        words = _run_ranks(arguments, topology, program, reports)
        if words.exit_code != ExitCode.DONE and words.rank < 0:
            # What the launcher knows of a killed rank says more than what others lost by it.
            _forget_old_words()
        last_words.leave(words.model_copy(update={"rank": -1}), {REPORTS_ENV: str(reports)})
        last_words.leave(words, _without_reports(), last_words.progress_of(arguments))
    if words.exit_code != ExitCode.DONE:
        whose = "" if words.rank < 0 else f"rank {words.rank}: "
        logger.error("%s%s: %s", whose, words.reason, words.message)
    return words.exit_code


def already_over(arguments: TrainerArguments) -> LastWords | None:
    """How this very run ended, if it has: found in its folder, before a GPU is touched."""
    try:
        return _found_in_folder(arguments)
    except OSError as error:
        # The ranks look closer, and say what is wrong with the folder and what to do.
        logger.warning("ckpt_output_dir cannot be read: %s", error)
        return None


def _found_in_folder(arguments: TrainerArguments) -> LastWords | None:
    folder = RunFolder(Path(arguments.training.ckpt_output_dir))
    verdict = standing_verdict(folder, arguments.run)
    if verdict is not None:
        code = ExitCode(verdict.exit_code)
        return last_words.of_code(code, verdict.reason, verdict.message)
    endless = arguments.training.training_mode == "infinite"
    if not endless and is_finished(folder, arguments.run):
        text = f"the trained model is in {folder.final}"
        words = last_words.of_code(ExitCode.DONE, "AlreadyFinished", text)
        progress = last_words.progress_of(arguments)
        result = last_words.Result(
            final_dir=str(folder.final),
            steps=0 if progress is None else progress.step,
            loss=None if progress is None else progress.loss,
            already_finished=True,
        )
        return words.model_copy(update={"result": result})
    return None


def _parse(argv: Sequence[str]) -> TrainerArguments:
    """Read the arguments.

    Raises:
        VersionSkew: in a pod that an operator made. It checked them against all that its own
            version knows, so what is refused here is a difference of versions.
        ValueError: everywhere else.
    """
    try:
        return _read(argv)
    except ValueError as error:
        if POD_IP_ENV not in os.environ:
            raise
        raise VersionSkew(f"{error}; these arguments were written by an operator") from error


def _read(argv: Sequence[str]) -> TrainerArguments:
    """Read the arguments; argparse's refusal becomes a ValueError like all others."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return from_argv(argv, defaults=os.environ.get(DEFAULTS_ENV, ""))
    except SystemExit as end:
        if end.code == 0:
            raise
        lines = said.getvalue().strip().splitlines()
        text = lines[-1] if lines else "wrong arguments"
        raise ValueError(text.removeprefix("osft-train: error: ")) from end


def _run_ranks(
    arguments: TrainerArguments, topology: Topology, program: Sequence[str], reports: Path
) -> LastWords:
    # Here, because a run that is over ends without the seconds that torch takes to load.
    from osft_trainer.elastic import Stopped, run_ranks

    def leave_stuck() -> NoReturn:
        words = _after_stop(arguments, reports, patience_is_over=False)
        last_words.leave(words, os.environ, last_words.progress_of(arguments))
        os._exit(words.exit_code)

    end = run_ranks(topology, [*program, *arguments.to_argv()], reports, leave_stuck)
    if isinstance(end, Stopped):
        return _after_stop(arguments, reports, end.patience_is_over)
    return end


def _after_stop(arguments: TrainerArguments, reports: Path, patience_is_over: bool) -> LastWords:
    """Asked to stop: saved, or finished at the last moment, or cut off."""
    over = already_over(arguments)
    if over is not None:
        return over
    left = last_words.of_ranks(reports)
    for words in left:
        if words.exit_code not in (ExitCode.DONE, ExitCode.PREEMPTED):
            return words
    if left and left[-1].exit_code == ExitCode.PREEMPTED:
        return left[-1]
    if left:
        # Ranks wait for each other at the end: one that is done says that the run is.
        return min(left, key=lambda words: words.rank)
    if patience_is_over:
        text = f"the ranks had not saved after {os.environ[PATIENCE_ENV]} s: raise {PATIENCE_ENV}"
        return last_words.of_code(ExitCode.TRY_AGAIN, "TryAgain", text)
    return last_words.of_code(ExitCode.PREEMPTED, "Preempted", "stopped before the first step")


def _set_defaults(topology: Topology) -> None:
    """Variables that ranks inherit, where the user has set none."""
    threads = max(1, usable_cpus() // topology.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault(PATIENCE_ENV, str(topology.patience_seconds))


@contextlib.contextmanager
def _reports() -> Iterator[Path]:
    """The folder for last words: the caller's, or a temporary one."""
    given = os.environ.get(REPORTS_ENV)
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="osft-reports-") as folder:
        os.environ[REPORTS_ENV] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[REPORTS_ENV]


def _without_reports() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if name != REPORTS_ENV}


def _forget_old_words() -> None:
    """Empty the termination log: what an earlier start of the container said is not ours."""
    target = os.environ.get(TERMINATION_LOG_ENV)
    if target is not None and Path(target).is_file():
        Path(target).write_bytes(b"")


if __name__ == "__main__":
    main()
