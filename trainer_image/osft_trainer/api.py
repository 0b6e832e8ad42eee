"""The Python API: `osft(...)`, and the class form that users of training_hub know.

Keyword names, defaults and texts come from `config`. One process trains in the caller's own; more
are started by the launcher. Must never: accept a name that does nothing, or import torch before
training begins.
"""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from osft_trainer import last_words
from osft_trainer.arguments import TrainerArguments, explain
from osft_trainer.config import (
    LaunchParameters,
    RunParameters,
    TrainingParameters,
)
from osft_trainer.last_words import REPORTS_ENV, LastWords, Result
from osft_trainer.outcome import Diverged, OutOfMemory, Preempted
from osft_trainer.parameters import at_home, unknown_name
from osft_trainer.report import ExitCode, Retention
from osft_trainer.topology import resolve

_MODELS: tuple[type[BaseModel], ...] = (TrainingParameters, RunParameters, LaunchParameters)


@dataclass(frozen=True)
class OSFTResult:
    """What `osft()` gives back when the run has reached its end."""

    final_dir: Path | None
    """Hugging Face folder of the trained model; None with save_final_checkpoint off."""
    steps: int
    """Optimizer steps of the whole run, also those of earlier calls that were stopped."""
    loss: float | None
    """Mean loss per counted token in the last step."""
    leak: float | None
    """Part of the update inside the kept subspaces, relative to the update."""
    retention: Retention | None = None
    """Mean token loss on text of the old skills before and after; None without such text."""
    leak_exported: float | None = None
    """The same after rounding to the type of the final folder's weights; None without it."""
    validation_loss: float | None = None
    """Mean loss per token of the validation data, as last measured; None without such data."""
    best_validation_loss: float | None = None
    """The lowest measured, by more than val_loss_improvement_threshold."""
    already_finished: bool = False
    """Whether an earlier call had finished the run, so that nothing was trained now."""


def osft(**parameters: Any) -> OSFTResult:
    """Train a model by orthogonal subspace fine-tuning, or go on where an earlier call stopped."""
    arguments = _arguments(parameters)
    in_group = "TORCHELASTIC_RUN_ID" in os.environ
    topology = None if in_group else resolve(arguments.launch, os.environ)
    # A group's size in the environment is not for this process, unless torchrun started it.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if in_group or (topology is not None and topology.is_single_process and alone):
        return _train_here(arguments)
    return _launch(arguments)


class Backend(ABC):
    """Something that carries out a training."""

    @abstractmethod
    def execute_training(self, algorithm_params: dict[str, Any]) -> OSFTResult:
        """Train with the keyword arguments of `osft`."""


class MiniTrainerOSFTBackend(Backend):
    """This package's own trainer, under the name that users of training_hub know."""

    def execute_training(self, algorithm_params: dict[str, Any]) -> OSFTResult:
        """Train with the keyword arguments of `osft`; see there for what it raises."""
        return osft(**algorithm_params)


class OSFTAlgorithm:
    """Orthogonal subspace fine-tuning by a backend of choice."""

    def __init__(self, backend: Backend | None = None) -> None:
        """Use the given backend, or this package's."""
        self.backend = backend or MiniTrainerOSFTBackend()

    def train(self, **parameters: Any) -> OSFTResult:
        """Train with the keyword arguments of `osft`; see there for what it raises."""
        _check_names(parameters)
        return self.backend.execute_training(parameters)

    def get_required_params(self) -> dict[str, Any]:
        """Names and types of what must be given."""
        return {name: info.annotation for name, info in _fields().items() if info.is_required()}

    def get_optional_params(self) -> dict[str, Any]:
        """Names and types of what may be given."""
        return {name: info.annotation for name, info in _fields().items() if not info.is_required()}


def _fields() -> dict[str, Any]:
    """All parameters by name, required ones first."""
    fields = {name: info for model in _MODELS for name, info in model.model_fields.items()}
    return dict(sorted(fields.items(), key=lambda item: not item[1].is_required()))


def _check_names(parameters: dict[str, Any]) -> None:
    known = list(_fields())
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise TypeError("osft(): " + "; ".join(unknown_name(name, known) for name in unknown))
    missing = [name for name in OSFTAlgorithm().get_required_params() if name not in parameters]
    if missing:
        raise TypeError("osft(): missing parameters: " + ", ".join(missing))


def _arguments(parameters: dict[str, Any]) -> TrainerArguments:
    """Check names and values.

    Raises:
        TypeError: a name is unknown or missing.
        ValueError: one line per problem, each with parameter, value, rule and cure.
    """
    _check_names(parameters)
    parts: dict[str, Any] = {}
    problems: list[str] = []
    for key, model in zip(("training", "run", "launch"), _MODELS, strict=True):
        values = {name: parameters[name] for name in model.model_fields if name in parameters}
        try:
            parts[key] = model.model_validate(at_home(values, model))
        except ValidationError as error:
            problems += explain(error)
    if problems:
        raise ValueError("\n".join(problems))
    return TrainerArguments(**parts)


def _train_here(arguments: TrainerArguments) -> OSFTResult:
    """Be the one rank, or one of the ranks that torchrun has started."""
    # Here, so that a wrong argument is refused before torch takes its seconds to load.
    from osft_trainer import worker
    from osft_trainer.parallel import start_world

    with _stop_on_signals() as (stop, interrupted):
        try:
            result = worker.run(arguments, start_world(), stop=stop)
        except Preempted as error:
            if interrupted():
                raise KeyboardInterrupt(str(error)) from error
            raise
    return _result(Result.of(result))


def _launch(arguments: TrainerArguments) -> OSFTResult:
    """Start the launcher and give back what it says."""
    command = [sys.executable, "-u", "-m", "osft_trainer.launch", *arguments.to_argv()]
    with tempfile.TemporaryDirectory(prefix="osft-reports-") as folder:
        environ = {**os.environ, REPORTS_ENV: folder}
        with subprocess.Popen(command, env=environ) as launcher:
            interrupt = _wait(launcher)
        words = last_words.of_launcher(Path(folder))
    if interrupt is not None:
        raise interrupt
    if words is None:
        raise RuntimeError(f"the launcher ended with exit code {launcher.returncode} and no word")
    if words.exit_code != ExitCode.DONE:
        raise _error(words)
    assert words.result is not None, "done without a result"
    return _result(words.result)


def _wait(launcher: subprocess.Popen[bytes]) -> KeyboardInterrupt | None:
    """Wait for its end; Ctrl-C lets it save first, a second one lets it go."""
    try:
        launcher.wait()
    except KeyboardInterrupt as interrupt:
        # In a terminal it has got the signal already, in a notebook it has not.
        launcher.send_signal(signal.SIGINT)
        launcher.wait()
        return interrupt
    return None


def _error(words: LastWords) -> Exception:
    """What the same end would have raised in this process."""
    if words.exit_code == ExitCode.BAD_INPUT:
        return ValueError(words.message)
    if words.exit_code == ExitCode.DIVERGED:
        return Diverged(words.message)
    if words.exit_code == ExitCode.PREEMPTED:
        return Preempted(words.message)
    if words.reason == "OutOfMemory":
        return OutOfMemory(f"{words.message} (calling again resumes)")
    return RuntimeError(f"{words.message} (calling again resumes)")


def _result(result: Result) -> OSFTResult:
    return OSFTResult(**vars(result.to_result()))


@contextmanager
def _stop_on_signals() -> Iterator[tuple[threading.Event, Callable[[], bool]]]:
    """Save at SIGTERM or Ctrl-C; a second Ctrl-C interrupts at once. Main thread only."""
    stop = threading.Event()
    got: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        # The next may come while this thread is inside `set`, which holds a lock.
        first = not got
        got.append(number)
        if first:
            stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for kind in (signal.SIGTERM, signal.SIGINT):
            before[kind] = signal.signal(kind, on_signal)
    try:
        yield stop, lambda: signal.SIGINT in got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signature() -> inspect.Signature:
    parameters = []
    for name, info in _fields().items():
        default = info.get_default(call_default_factory=True)
        if info.is_required() or default is PydanticUndefined:
            default = inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=info.annotation
            )
        )
    return inspect.Signature(parameters, return_annotation=OSFTResult)


def _documentation() -> str:
    lines = [
        inspect.getdoc(osft) or "",
        "",
        "With more than one process (nproc_per_node, nnodes) the launcher is started; for more",
        "nodes call it once on each, with node_rank and master_addr, or with rdzv_endpoint.",
        "",
        "Args:",
    ]
    for name, info in _fields().items():
        lines.append(f"    {name}: {' '.join((info.description or '').split())}")
    lines += [
        "",
        "Raises:",
        "    TypeError: a parameter is unknown (names the nearest one) or missing.",
        "    ValueError: a value is wrong, or the model, data or run folder cannot be used.",
        "    Diverged: the loss is no finite number any more.",
        "    Preempted: SIGTERM came; the state is saved, and the same call goes on.",
        "    OutOfMemory: memory ran out; says what to lower.",
        "    RuntimeError: it crashed; the same call goes on from the newest state.",
    ]
    return "\n".join(lines)


# Both are for people and editors: the fields of `config` are the one list of parameters.
osft.__signature__ = _signature()  # type: ignore[attr-defined]
osft.__doc__ = _documentation()
