"""The optimizer steps of a run.

Lives here: one step as a true mean over the tokens of all ranks, and everything that happens
between steps: metrics, progress, saving, stopping. Called by `train` on every rank. Must never: let
a number that is not finite reach the optimizer, or take a decision that ranks could take
differently.

Loss of a step = (sum of token losses over all micro-batches and ranks) / (their loss tokens). The
random numbers of a step follow from seed, step and rank, so that a resumed run draws the same.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch
from torch import Tensor

from osft_trainer.agreement import any_rank_of_each
from osft_trainer.checkpoint import Position, State
from osft_trainer.config import TrainingParameters
from osft_trainer.layout import layout_of
from osft_trainer.leaks import Leak, LeakWatch
from osft_trainer.model import OSFTModel
from osft_trainer.optimizer import set_learning_rate
from osft_trainer.outcome import Diverged, NoLossTokens
from osft_trainer.packing import GlobalBatch, batches, batches_per_epoch
from osft_trainer.parallel import World, clip_gradients, set_gradient_sync, sum_over_ranks
from osft_trainer.prefetch import prefetched
from osft_trainer.prepared import PreparedData
from osft_trainer.progress import Reporter
from osft_trainer.replay import Replay
from osft_trainer.saving import Saver
from osft_trainer.schedule import LearningRates
from osft_trainer.stopwatch import Stopwatch
from osft_trainer.tracking import Tracker
from osft_trainer.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What one optimizer step gave."""

    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    """Since the step before, without validation, leak measurement, saving and export."""


@dataclass(frozen=True)
class Loop:
    """All that the steps of one run need."""

    training: TrainingParameters
    world: World
    model: OSFTModel
    state: State
    prepared: PreparedData
    rates: LearningRates
    total_steps: int | None
    saver: Saver
    tracker: Tracker | None
    """On the first rank only."""
    reporter: Reporter
    stop: threading.Event
    export_epoch: Callable[[OSFTModel, Position], None]
    """Writes the model at the end of an epoch; collective."""
    validation: Validation | None
    leaks: LeakWatch
    replay: Replay | None
    """Text of the old skills that is learned again."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def run(self, position: Position) -> tuple[Position, bool]:
        """Train from a position to the end of the run, or until a stop is asked for.

        Returns:
            Where it ended, and whether it was stopped before its end; then the state is saved.

        Raises:
            Diverged: a loss or gradient is not finite; the weights are those of the step before.
            NoLossTokens: a batch has nothing to learn from.
            OSError, Superseded: a state could not be saved.
        """
        self.stopwatch.lap()
        try:
            for batch in self._batches(position):
                if self._between_steps(position):
                    self._finish_saving(position)
                    return position, True
                done = self._step(batch, position)
                with self.stopwatch.standing():
                    position = self._validated(batch, _after(position, batch, done))
                    leak = self.leaks.measure(position.step)
                self._record(batch, position, done, leak)
                with self.stopwatch.standing():
                    self._after_step(batch, position)
        except (Diverged, NoLossTokens):
            # Every rank is here, and the state in flight is a good one: of a step before.
            with contextlib.suppress(OSError):
                self.saver.finish()
            raise
        # Always: the export may be killed, meet a full disk, or outlast a stop's patience.
        self._finish_saving(position)
        return position, False

    def _between_steps(self, position: Position) -> bool:
        """What ranks must agree on, in one exchange; whether to stop."""
        mine = [
            self.stop.is_set(),
            self.saver.is_writing,
            self.saver.has_failed,
            self.saver.is_due_now(position.step),
        ]
        stop, writing, failed, is_due = any_rank_of_each(mine, self.world)
        if stop:
            # The last state is tried also where the one in flight has failed.
            return True
        self.saver.advance(writing, failed)
        if is_due:
            with self.stopwatch.standing():
                self._begin_saving(position)
        return False

    def _batches(self, position: Position) -> Iterator[GlobalBatch]:
        found = batches(
            self.prepared,
            effective_batch_size=self.training.effective_batch_size,
            max_tokens_per_gpu=self.training.max_tokens_per_gpu,
            rank=self.world.rank,
            world_size=self.world.size,
            seed=self.training.seed,
            start_epoch=position.epoch,
            start_batch=position.batch,
            replay=self.replay,
            layout=layout_of(self.model.hf.config),
        )
        left = None if self.total_steps is None else max(0, self.total_steps - position.step)
        yield from prefetched(_pinned(found, self.world.device), left)

    def _step(self, batch: GlobalBatch, position: Position) -> Step:
        if batch.loss_tokens == 0:
            raise NoLossTokens(
                f"data_path: step {position.step + 1} (epoch {batch.epoch + 1}, batch "
                f"{batch.index + 1}) has {batch.samples} samples and no token that counts for the "
                "loss: remove samples whose labels are all -100, or raise effective_batch_size"
            )
        rate = self.rates(position.step)
        set_learning_rate(self.state.optimizer, rate)
        seed_step(self.training.seed, position.step, self.world.rank)
        loss_sum = backward(self.model, batch, self.world)
        self.model.project_gradients()
        norm = clip_gradients(
            self.state.trainables.values(), self.training.max_grad_norm, self.world
        )
        # Only here: the norm has waited for the device, and this waits for nothing more.
        loss = sum_over_ranks(float(loss_sum), self.world) / batch.loss_tokens
        _check_finite(loss, norm, position)
        self.state.optimizer.step()
        self.model.finish_step(position.step + 1)
        self.state.optimizer.zero_grad(set_to_none=True)
        return Step(loss, norm, rate, self.stopwatch.lap())

    def _record(
        self, batch: GlobalBatch, position: Position, done: Step, leak: Leak | None
    ) -> None:
        speed = batch.tokens / max(done.seconds, 1e-9)
        epoch = batch.epoch + (batch.index + 1) / self._batches_per_epoch
        if self.tracker is not None:
            row: dict[str, float | int | str] = {
                "step": position.step,
                "epoch": epoch,
                "loss": done.loss,
                "lr": done.learning_rate,
                "gradNorm": done.grad_norm,
                "tokens": batch.tokens,
                "samples": batch.samples,
                "lossTokens": batch.loss_tokens,
                "tokensPerSecond": speed,
                "seconds": done.seconds,
                "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds"),
            }
            if self.replay is not None:
                row["replayedSamples"] = batch.replayed
            if self.total_steps is not None:
                row["totalSteps"] = self.total_steps
            if self._is_validated(batch, position) and position.validation_loss is not None:
                row["validationLoss"] = position.validation_loss
            if leak is not None:
                row.update(leak.to_row())
            self.tracker.write(row)
        if leak is not None:
            self.reporter.measured(leak=leak.trained, leakExported=leak.exported)
        self.reporter.update(
            phase="Training",
            step=position.step,
            epoch=epoch,
            loss=done.loss,
            learning_rate=done.learning_rate,
            grad_norm=done.grad_norm,
            tokens_per_second=speed,
        )

    def _is_validated(self, batch: GlobalBatch, position: Position) -> bool:
        """Whether the loss on the validation data is measured after this step."""
        return self.validation is not None and self.validation.is_due(
            position.step, batch.is_last, position.step == self.total_steps
        )

    def _validated(self, batch: GlobalBatch, position: Position) -> Position:
        """Measure if it is due; the model is written when it is the best."""
        if self.validation is None or not self._is_validated(batch, position):
            return position
        self.reporter.update(phase="Validating")
        return self.validation.measure(position, self.saver.finish)

    def _after_step(self, batch: GlobalBatch, position: Position) -> None:
        """Export and save what is due. The export comes first: a state says that it is there."""
        epoch_ends = batch.is_last and self.training.checkpoint_at_epoch
        if epoch_ends:
            # An export may be long, and two writers would share the disk.
            self.saver.finish()
            self.export_epoch(self.model, position)
        if epoch_ends or self.saver.is_due_at(position.step):
            self._begin_saving(position)

    def _begin_saving(self, position: Position) -> None:
        self.reporter.update(phase="Saving")
        self.saver.begin(self.state, position)
        self.reporter.update(phase="Training")

    def _finish_saving(self, position: Position) -> None:
        self.reporter.update(phase="Saving")
        self.saver.finish_with(self.state, position)

    @property
    def _batches_per_epoch(self) -> int:
        return batches_per_epoch(len(self.prepared), self.training.effective_batch_size)


def _pinned(found: Iterator[GlobalBatch], device: torch.device) -> Iterator[GlobalBatch]:
    """The same batches, where the device copies them from while the step before runs."""
    if device.type != "cuda":
        return found
    return (_pinned_on(batch, device) for batch in found)


def _pinned_on(batch: GlobalBatch, device: torch.device) -> GlobalBatch:
    # The thread that reads ahead has device 0 as its own: every rank would take memory there.
    with torch.cuda.device(device):
        return batch.pinned()


def _after(position: Position, batch: GlobalBatch, done: Step) -> Position:
    return replace(
        position,
        step=position.step + 1,
        epoch=batch.epoch,
        batch=batch.index + 1,
        loss_tokens=position.loss_tokens + batch.loss_tokens,
        loss=done.loss,
    )


def backward(model: OSFTModel, batch: GlobalBatch, world: World) -> Tensor:
    """Leave the gradient of the batch's mean token loss in the trainables.

    Returns the sum of this rank's token losses, a float64 scalar on its device.
    Every rank runs every round, a rank without samples on a stand-in: FSDP waits for all.
    """
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    last = len(batch.micro_batches) - 1
    for number, micro in enumerate(batch.micro_batches):
        set_gradient_sync(model, world, number == last)
        loss_sum = model(**micro.inputs(world.device))
        (loss_sum / batch.loss_tokens).backward()
        total += loss_sum.detach().double()
    return total


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers (dropout) of one step on one rank; resuming needs no saved state."""
    # Odd multipliers keep neighbours apart; 63 bits is what torch takes.
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    torch.manual_seed(mixed % 2**63)


def _check_finite(loss: float, norm: float, position: Position) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
    before = "no step was done" if position.loss is None else f"last loss {position.loss:.4f}"
    raise Diverged(
        f"the {what} at step {position.step + 1} ({before}); the weights are those of the step "
        "before. Try a lower learning_rate, more warmup_steps or a lower max_grad_norm"
    )
