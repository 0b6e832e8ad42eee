"""One rank of a run: world, folder, claim, training, and back.

The order in which a rank sets itself up. Called by `__main__` in a launched process and by `api` in
the user's own. Must never exit the process or choose its exit code (`__main__` does), or train
(`train` does).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from osft_trainer.agreement import barrier, from_first_rank, raise_together
from osft_trainer.arguments import TrainerArguments
from osft_trainer.base_model import local_folder
from osft_trainer.config import TrainingParameters
from osft_trainer.export import base_digest
from osft_trainer.identity import (
    Claim,
    claim,
    contents_of,
    fingerprint,
    standing_verdict,
    write_verdict,
)
from osft_trainer.last_words import of_error
from osft_trainer.liger import undone_afterwards
from osft_trainer.outcome import Diverged, OutOfMemory, Superseded, TrainResult
from osft_trainer.parallel import World, stop_world
from osft_trainer.progress import Reporter
from osft_trainer.report import POD_IP_ENV, ExitCode, RunFolder, Verdict
from osft_trainer.server import Server
from osft_trainer.shared_folder import probe
from osft_trainer.terminal import Display, display
from osft_trainer.train import train

_FULL_DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What CUDA and its libraries say, which do not raise torch's exception."""

logger = logging.getLogger(__name__)


def run(
    arguments: TrainerArguments,
    world: World,
    *,
    stop: threading.Event,
    environ: Mapping[str, str] = os.environ,
) -> TrainResult:
    """Train as one rank of a world that has been started. Collective.

    Args:
        arguments: everything the trainer is told.
        world: this process's place; left in the end, unless the run fails.
        stop: set to save and end after the running step.
        environ: where the pod's address comes from.

    Raises:
        ValueError: bad input; a verdict is left in the run folder.
        Diverged, Preempted, Superseded, OutOfMemory: see `outcome`.
    """
    folder = RunFolder(Path(arguments.training.ckpt_output_dir))
    probe(folder.root, world)
    arguments = _with_local_model(arguments, world)
    mine = _claim_together(arguments, folder, world)
    try:
        with (
            undone_afterwards(),
            _reporting(arguments, folder, mine, world, environ) as reporter,
            _naming_lack_of_memory(arguments, reporter),
        ):
            result = train(
                arguments,
                folder=folder,
                claim=mine,
                reporter=reporter,
                stop=stop,
                world=world,
            )
            # A node whose launcher ended would take others down while rank 0 still writes.
            barrier(world)
    except (ValueError, Diverged) as error:
        _leave_verdict(folder, mine, error)
        raise
    # After a failure the group is left as it is: leaving it in order could wait for lost ranks.
    stop_world(world)
    return result


def _with_local_model(arguments: TrainerArguments, world: World) -> TrainerArguments:
    """Have the base model as a folder on every node; the first rank of each fetches it."""
    path = arguments.training.model_path
    from_first_rank(world, lambda: str(local_folder(path)))
    failure: ValueError | OSError | None = None
    if world.rank != 0 and world.local_rank == 0:
        try:
            local_folder(path)
        except (ValueError, OSError) as error:
            failure = error
    raise_together(failure, world, f"model_path: {path!r} is not to be had on another node")
    training = arguments.training.model_copy(update={"model_path": str(local_folder(path))})
    return replace(arguments, training=training)


def _claim_together(arguments: TrainerArguments, folder: RunFolder, world: World) -> Claim:
    """The first rank claims the folder for all.

    Raises:
        ValueError, Diverged: the folder is another run's, or a verdict stands.
        Superseded: a newer attempt owns it.
    """
    text = from_first_rank(world, lambda: _claim(arguments, folder))
    answer = json.loads(text)
    if "verdict" in answer:
        verdict = Verdict.model_validate(answer["verdict"])
        if verdict.exit_code == ExitCode.DIVERGED:
            raise Diverged(verdict.message)
        raise ValueError(verdict.message)
    return Claim(**answer)


def _claim(arguments: TrainerArguments, folder: RunFolder) -> str:
    verdict = standing_verdict(folder, arguments.run)
    if verdict is not None:
        return json.dumps({"verdict": verdict.model_dump()})
    training = arguments.training
    prints = fingerprint(training, contents_of(training, base_digest(training.model_path)))
    return json.dumps(asdict(claim(folder, arguments.run, prints)))


@contextlib.contextmanager
def _reporting(
    arguments: TrainerArguments,
    folder: RunFolder,
    mine: Claim,
    world: World,
    environ: Mapping[str, str],
) -> Iterator[Reporter]:
    """Progress in a file, and on a port where one is given, as long as the training lasts."""
    shown: Display | None = display(sys.stderr) if world.rank == 0 else None
    show = (lambda progress: None) if shown is None else shown.show
    reporter = Reporter(folder, mine.run_id, mine.attempt, world.rank, show=show)
    server = None
    if arguments.launch.metrics_port is not None and world.local_rank == 0:
        address = environ.get(POD_IP_ENV) or "127.0.0.1"
        try:
            server = Server(reporter.current, address, arguments.launch.metrics_port)
        except OSError as error:
            port = arguments.launch.metrics_port
            # The training is worth more than being watched; progress.json is still written.
            logger.warning(
                "/progress and /metrics are not served on %s:%d: %s", address, port, error
            )
    try:
        yield reporter
    except Superseded:
        reporter.leave_file()
        raise
    finally:
        reporter.close()
        if shown is not None:
            shown.close()
        if server is not None:
            server.close()


@contextlib.contextmanager
def _naming_lack_of_memory(arguments: TrainerArguments, reporter: Reporter) -> Iterator[None]:
    """Say what was done when memory ran out, and what makes it last."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        now = reporter.current()
        on_host = isinstance(error, MemoryError) or _is_of_host(str(error), now.phase)
        on_device = not on_host and (
            isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in _FULL_DEVICE)
        )
        if not on_device and not on_host:
            raise
        said = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise OutOfMemory(
            f"{'the GPU' if on_device else 'the host'} has no memory left for phase {now.phase} "
            f"after step {now.step} ({said}): "
            f"{', or '.join(_cures(arguments.training, on_host, now.phase))}"
        ) from error


def _cures(training: TrainingParameters, on_host: bool, phase: str) -> list[str]:
    """What needs less memory, or gives more. Saving holds no batch."""
    cures = []
    if phase != "Saving":
        cures.append(f"lower max_tokens_per_gpu (now {training.max_tokens_per_gpu})")
        if not training.activation_checkpointing:
            cures.append("set activation_checkpointing")
        if training.selective_activation_checkpointing:
            cures.append("unset selective_activation_checkpointing")
    cures.append("train on more processes, which share the model")
    if on_host:
        cures.append("raise the memory limit of the pod")
    return cures


def _is_of_host(said: str, phase: str) -> bool:
    """Whether it was the CPU's allocator, which has no exception of its own, or pinned memory."""
    # CUDA hands out pinned memory, and has the same words for both; a save takes nothing else.
    pinned = phase == "Saving" and _FULL_DEVICE[0] in said
    return "DefaultCPUAllocator" in said or pinned


def _leave_verdict(folder: RunFolder, mine: Claim, error: ValueError | Diverged) -> None:
    words = of_error(error)
    verdict = Verdict(
        run_id=mine.run_id, exit_code=words.exit_code, reason=words.reason, message=words.message
    )
    try:
        write_verdict(folder, mine, verdict)
    except OSError as failure:
        # Also when another rank writes the same in this instant. The exit code says it, too.
        logger.warning("the verdict is not written: %s", failure)
