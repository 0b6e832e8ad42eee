"""How many optimizer steps a run has, and the learning rate of each.

Lives here: the end of every training mode, and the schedules of transformers by name, turned into
a plain function of the step, so that resuming needs no state. Called by `train`, before a model is
read. Must never: touch the optimizer that trains.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler

from osft_trainer.config import TrainingParameters
from osft_trainer.order import epoch_order
from osft_trainer.packing import batches_per_epoch
from osft_trainer.prepared import PreparedData

LearningRates = Callable[[int], float]
"""Learning rate of the optimizer step after so many done ones."""

_NOT_OURS = frozenset({"reduce_lr_on_plateau", "greedy"})
"""They follow an evaluation loss, which a run does not have."""

_GIVEN = frozenset({"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"})
"""Arguments of a schedule that are not the user's."""


def total_steps(training: TrainingParameters, prepared: PreparedData) -> int | None:
    """Optimizer steps of the whole run; None in mode infinite."""
    if training.training_mode == "infinite":
        return None
    if training.training_mode == "step":
        return training.max_steps
    per_epoch = batches_per_epoch(len(prepared), training.effective_batch_size)
    if training.training_mode == "epoch":
        return per_epoch * (training.num_epochs or 1)
    assert training.max_tokens is not None, "checked by TrainingParameters"
    return _steps_to_tokens(training, prepared, per_epoch, training.max_tokens)


def _steps_to_tokens(
    training: TrainingParameters, prepared: PreparedData, per_epoch: int, max_tokens: int
) -> int:
    """Steps until so many loss tokens are seen, exactly: every epoch holds the same samples."""
    in_epoch = int(prepared.loss_counts.sum())
    epochs = (max_tokens - 1) // in_epoch
    missing = max_tokens - epochs * in_epoch
    order = epoch_order(len(prepared), seed=training.seed, epoch=epochs)
    seen = np.cumsum(prepared.loss_counts[np.asarray(order)])
    samples = int(np.searchsorted(seen, missing)) + 1
    return epochs * per_epoch + -(-samples // training.effective_batch_size)


def learning_rates(training: TrainingParameters, steps: int | None) -> LearningRates:
    """The schedule as a function of the number of steps done.

    Args:
        training: lr_scheduler, lr_scheduler_kwargs, warmup_steps and learning_rate are used.
        steps: optimizer steps of the run; None for a run without end.

    Raises:
        ValueError: an unknown schedule, an argument it does not have, or a rate that is no number.
    """
    name = training.lr_scheduler
    _check_name_and_arguments(training)
    # At the run's rate: a floor such as min_lr or lr_end is a rate, and is divided by this one.
    throwaway = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    try:
        schedule = get_scheduler(
            name,
            throwaway,
            num_warmup_steps=training.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )
        factor = schedule.lr_lambdas[0]
        end = training.warmup_steps + 1 if steps is None else steps
        probes = [factor(step) for step in {0, training.warmup_steps, end // 2, end - 1}]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"lr_scheduler {name} cannot be made of lr_scheduler_kwargs "
            f"{training.lr_scheduler_kwargs}: {error}"
        ) from error
    if not all(math.isfinite(probe) and probe >= 0 for probe in probes):
        raise ValueError(
            f"lr_scheduler_kwargs {training.lr_scheduler_kwargs} give {name} a learning rate that "
            "is negative or no number: change them"
        )
    return lambda step: training.learning_rate * float(factor(step))


def _check_name_and_arguments(training: TrainingParameters) -> None:
    functions = {str(kind.value): made for kind, made in TYPE_TO_SCHEDULER_FUNCTION.items()}
    names = sorted(set(functions) - _NOT_OURS)
    name = training.lr_scheduler
    if name not in names:
        raise ValueError(f"lr_scheduler {name!r} is unknown: use one of {', '.join(names)}")
    if name == "constant" and training.warmup_steps:
        raise ValueError(
            f"warmup_steps {training.warmup_steps} has no effect with lr_scheduler constant: "
            "use constant_with_warmup"
        )
    # transformers passes nothing on to these two, so an argument would be lost in silence.
    takes_none = name in ("constant", "constant_with_warmup")
    known = sorted(set(inspect.signature(functions[name]).parameters) - _GIVEN)
    known = [] if takes_none else known
    unknown = sorted(set(training.lr_scheduler_kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"lr_scheduler_kwargs {', '.join(unknown)} unknown to lr_scheduler {name}: it takes "
            f"{', '.join(known) or 'none'}"
        )
