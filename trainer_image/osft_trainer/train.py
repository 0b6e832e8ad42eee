"""A training run from arguments to the trained folder.

The order of a run, and nothing else: data, model, optimizer, state, steps, export. What a part does
is in its own module. Called by `worker.run` on every rank, in a world that it has started. Must
never: read the environment, start processes, or map exceptions to exit codes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic.alias_generators import to_camel

from osft_trainer.agreement import from_first_rank
from osft_trainer.arguments import TrainerArguments
from osft_trainer.assembly import build_model, compute_dtype, prepare_data
from osft_trainer.checkpoint import Checkpoints, Position, State, mark_complete
from osft_trainer.config import TrainingParameters
from osft_trainer.evaluation import mean_loss
from osft_trainer.export import OSFT_FILE, export_hf, run_facts
from osft_trainer.export_checkpoint import RunRecord
from osft_trainer.identity import Claim, check_owner
from osft_trainer.loop import Loop
from osft_trainer.model import OSFTModel
from osft_trainer.optimizer import build_optimizer
from osft_trainer.outcome import Preempted, TrainResult
from osft_trainer.packing import batches_per_epoch
from osft_trainer.parallel import World
from osft_trainer.prepared import PreparedData
from osft_trainer.progress import Reporter
from osft_trainer.report import Metric, Retention, RunFolder, metric_lines
from osft_trainer.retention import RetentionText
from osft_trainer.schedule import learning_rates, total_steps
from osft_trainer.targets import Plan
from osft_trainer.tracking import Tracker, start_wandb

logger = logging.getLogger(__name__)


def train(
    arguments: TrainerArguments,
    *,
    folder: RunFolder,
    claim: Claim,
    reporter: Reporter,
    stop: threading.Event,
    world: World,
) -> TrainResult:
    """Train, resume, or return what an earlier call has finished. Collective.

    Args:
        arguments: what to train and how.
        folder: where the run writes; claimed by the caller.
        claim: whose run it is; `claim.state` says whether it is finished.
        reporter: takes the progress of this rank.
        stop: set from outside to save and end after the step that is running.
        world: this process's place.

    Raises:
        ValueError: bad input, on every rank.
        Diverged, Preempted, Superseded: see `outcome`.
    """
    training = arguments.training
    run = _Run(training, folder, claim, reporter, stop, world)
    if claim.state == "finished" and training.training_mode != "infinite":
        return run.finished()
    reporter.update(phase="Preparing")
    prepared = prepare_data(training, folder, world)
    steps = total_steps(training, prepared)
    # Before the model is read: a wrong schedule shall not cost minutes.
    rates = learning_rates(training, steps)
    reporter.update(
        total_steps=steps,
        total_epochs=run.total_epochs(steps, prepared),
        metrics=run.data_metrics(prepared),
    )
    model, digest, text = build_model(
        training,
        folder,
        world,
        base_digest=claim.base_digest,
        prepared=prepared,
        steps=steps,
    )
    # Before a state is loaded: of the base model, also when the run goes on.
    before = run.retention_loss(model, text)
    state = run.state(model, digest)
    checkpoints = run.checkpoints(model.plan)
    start = run.resume(model, state, checkpoints)
    with run.tracker(start) as tracker:
        loop = Loop(
            training=training,
            world=world,
            model=model,
            state=state,
            prepared=prepared,
            rates=rates,
            total_steps=steps,
            checkpoints=checkpoints,
            tracker=tracker,
            reporter=reporter,
            stop=stop,
            export_epoch=run.export_epoch,
        )
        end, stopped = loop.run(start)
        return run.finish(model, start, end, stopped, text, before)


@dataclass(frozen=True)
class _Run:
    """The parts of one call of `train`, in the order of their use."""

    training: TrainingParameters
    folder: RunFolder
    claim: Claim
    reporter: Reporter
    stop: threading.Event
    world: World

    def say(self, text: str, *values: object) -> None:
        """Log a line, once for all ranks."""
        if self.world.rank == 0:
            logger.info(text, *values)

    def finished(self) -> TrainResult:
        """What the earlier call left."""
        final = self.folder.final
        rows = metric_lines(self.folder.metrics) if self.folder.metrics.is_file() else []
        steps, loss = (int(rows[-1]["step"]), rows[-1]["loss"]) if rows else (0, None)
        self.say("the run is finished already: %s", final)
        self.reporter.update(phase="Done", step=steps, loss=loss, final=str(final))
        leak, retention = self._told_by_export()
        return TrainResult(final, steps, loss, leak, retention, already_finished=True)

    def retention_loss(
        self, model: OSFTModel, text: RetentionText | None, before: Retention | None = None
    ) -> Retention | None:
        """Loss on the text of the old skills; of the base model where none is known before."""
        if text is None:
            return None
        loss = mean_loss(
            model,
            text.judged,
            max_tokens_per_gpu=self.training.max_tokens_per_gpu,
            world=self.world,
        )
        if before is None:
            found = Retention(loss_before=loss)
            self.say("loss on retention text: %.4f before the training", loss)
        else:
            found = before.model_copy(update={"loss_after": loss})
            self.say("loss on retention text: %.4f before, %.4f after", before.loss_before, loss)
        self.reporter.update(retention=found)
        return found

    def total_epochs(self, steps: int | None, prepared: PreparedData) -> float | None:
        """Passes over the data of the whole run."""
        if steps is None:
            return None
        return steps / batches_per_epoch(len(prepared), self.training.effective_batch_size)

    def data_metrics(self, prepared: PreparedData) -> list[Metric]:
        """What became of the data, beside the metrics that are there already."""
        counts = asdict(prepared.counts)
        named = ("samples", "skipped_bad", "dropped_overlong", "truncated", "dropped_empty")
        ours = [Metric(name=to_camel(f"data_{name}"), value=str(counts[name])) for name in named]
        return [*self.reporter.current().metrics, *ours]

    def state(self, model: OSFTModel, decomposition: str) -> State:
        """Trainables and optimizer; after sharding, which replaces parameters."""
        trainables = model.trainables()
        optimizer = build_optimizer(trainables, self.training, model.plan.trained_others)
        return State(trainables, optimizer, decomposition)

    def checkpoints(self, plan: Plan) -> Checkpoints:
        """The states in this run's folder."""
        return Checkpoints(
            folder=self.folder,
            world=self.world,
            attempt=self.claim.attempt,
            keep=self.training.keep_checkpoints,
            check_owner=self._check_owner,
            run=self._record(plan).model_dump(mode="json"),
        )

    def resume(self, model: OSFTModel, state: State, checkpoints: Checkpoints) -> Position:
        """Load the newest state, if there is one."""
        position = checkpoints.load(state)
        if position is None:
            return Position()
        # Saved values are projected already: doing it again would change their last bits.
        model.refresh()
        path = self.folder.checkpoint(position.step)
        self.say("resumed after step %d from %s", position.step, path)
        self.reporter.update(
            step=position.step,
            loss=position.loss,
            latest_checkpoint=str(path),
            latest_checkpoint_step=position.step,
        )
        return position

    def tracker(self, position: Position) -> contextlib.AbstractContextManager[Tracker | None]:
        """Metrics, on the first rank; every rank learns when they cannot be written."""
        made: list[Tracker] = []

        def on_first_rank() -> str:
            wandb_run = start_wandb(self.training, self.claim.run_id, self.folder.root)
            made.append(Tracker(self.folder.metrics, position.step, wandb_run))
            return ""

        from_first_rank(self.world, on_first_rank)
        return made[0] if made else contextlib.nullcontext()

    def finish(
        self,
        model: OSFTModel,
        start: Position,
        end: Position,
        stopped: bool,
        text: RetentionText | None,
        before: Retention | None,
    ) -> TrainResult:
        """Write the model of a run that reached its end; a run without end is whole at any stop."""
        endless = self.training.training_mode == "infinite"
        final = None
        retention = before
        if not stopped or (endless and end.step > 0):
            retention = self.retention_loss(model, text, before)
        if (not stopped or (endless and end.step > 0)) and self.training.save_final_checkpoint:
            final = self.folder.final
            self.reporter.update(phase="Saving")
            self._export(model, final, end, retention)
        if stopped:
            raise Preempted(
                f"stopped after step {end.step}; "
                + ("the state is saved and the run can go on" if end.step else "nothing was done")
            )
        leak = model.leak() if final is None else self._told_by_export()[0]
        self.reporter.update(phase="Done", final=None if final is None else str(final))
        return TrainResult(
            final, end.step, end.loss, leak, retention, already_finished=end == start
        )

    def export_epoch(self, model: OSFTModel, position: Position) -> None:
        """Write the model at the end of an epoch to exports/."""
        self._export(model, self.folder.export_of_epoch(position.epoch + 1), position)

    def _export(
        self, model: OSFTModel, out: Path, position: Position, retention: Retention | None = None
    ) -> None:
        training = self.training
        from_first_rank(self.world, self._owner_is_checked)
        dtype = None if training.save_dtype is None else getattr(torch, training.save_dtype)
        facts = run_facts(self.claim.run_id, self.claim.fingerprint, position)
        if retention is not None:
            facts["retention"] = retention.model_dump(by_alias=True, exclude_none=True)
        export_hf(
            model,
            training.model_path,
            out,
            self.world,
            dtype,
            facts,
            digest=self.claim.base_digest,
        )
        from_first_rank(self.world, lambda: mark_complete(out))
        self.say("wrote the model after step %d to %s", position.step, out)

    def _record(self, plan: Plan) -> RunRecord:
        """What makes a state exportable without its run."""
        dtype = compute_dtype(self.training.compute_dtype, self.world.device)
        # "auto" would mean another type where the export runs.
        name = str(dtype).removeprefix("torch.")
        return RunRecord(
            training=self.training.model_copy(update={"compute_dtype": name}),
            run_id=self.claim.run_id,
            fingerprint=self.claim.fingerprint,
            base_digest=self.claim.base_digest,
            importance=plan.importance,
        )

    def _check_owner(self) -> None:
        check_owner(self.folder, self.claim)

    def _owner_is_checked(self) -> str:
        self._check_owner()
        return ""

    def _told_by_export(self) -> tuple[float | None, Retention | None]:
        """Leak and retention as the export has them, given to every rank."""
        path = self.folder.final / OSFT_FILE
        told = json.loads(from_first_rank(self.world, lambda: path.read_text(encoding="utf-8")))
        kept = told.get("retention")
        return told.get("leak"), None if kept is None else Retention.model_validate(kept)
