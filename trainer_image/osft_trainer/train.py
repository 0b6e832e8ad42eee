"""A training run from arguments to the trained folder.

The order of a run, and nothing else: data, model, optimizer, state, steps, export. What a part does
is in its own module. Called by `worker.run` on every rank, in a world that it has started. Must
never: read the environment, start processes, or map exceptions to exit codes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic.alias_generators import to_camel

from osft_trainer.agreement import from_first_rank
from osft_trainer.arguments import TrainerArguments
from osft_trainer.assembly import build_model, compute_dtype, prepare_data
from osft_trainer.checkpoint import Checkpoints, Position, State
from osft_trainer.config import TrainingParameters
from osft_trainer.evaluation import mean_loss
from osft_trainer.export import base_dtype
from osft_trainer.export_checkpoint import RunRecord
from osft_trainer.identity import Claim, check_owner
from osft_trainer.leaks import LeakWatch
from osft_trainer.loop import Loop
from osft_trainer.model import OSFTModel
from osft_trainer.optimizer import build_optimizer
from osft_trainer.outcome import Preempted, TrainResult
from osft_trainer.outputs import Outputs
from osft_trainer.packing import batches_per_epoch
from osft_trainer.parallel import World
from osft_trainer.prepared import PreparedData
from osft_trainer.progress import Reporter
from osft_trainer.report import Metric, Retention, RunFolder, finite, metric_lines
from osft_trainer.retention import RetentionText, replay_of
from osft_trainer.saving import Saver
from osft_trainer.schedule import learning_rates, total_steps
from osft_trainer.targets import Plan
from osft_trainer.trackers import start_services
from osft_trainer.tracking import Tracker
from osft_trainer.validation import Validation, for_data

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
    prepared, held_out = prepare_data(training, folder, world)
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
        held_out=held_out,
        steps=steps,
    )
    # Before a state is loaded: of the base model, also when the run goes on.
    before = run.retention_loss(model, text)
    state = run.state(model, digest)
    checkpoints = run.checkpoints(model.plan)
    validation = run.validation(model, held_out)
    start = run.resume(model, state, checkpoints, validation)
    with run.tracker(start) as tracker:
        loop = Loop(
            training=training,
            world=world,
            model=model,
            state=state,
            prepared=prepared,
            rates=rates,
            total_steps=steps,
            saver=run.saver(checkpoints, start, tracker),
            tracker=tracker,
            reporter=reporter,
            stop=stop,
            export_epoch=run.outputs.write_epoch,
            validation=validation,
            leaks=run.leaks(model),
            replay=replay_of(training, text),
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

    @property
    def outputs(self) -> Outputs:
        """The model folders."""
        return Outputs(self.training, self.folder, self.claim, self.world)

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
        facts = self.outputs.facts_of_final()
        return TrainResult(final, steps, loss, already_finished=True, **_measured(facts))

    def retention_loss(
        self, model: OSFTModel, text: RetentionText | None, before: Retention | None = None
    ) -> Retention | None:
        """Loss on the text of the old skills; of the base model where none is known before.

        A loss that is no finite number is left out.
        """
        if text is None:
            return None
        loss = mean_loss(
            model,
            text.judged,
            max_tokens_per_gpu=self.training.max_tokens_per_gpu,
            world=self.world,
        )
        if not math.isfinite(loss):
            # The training goes by its own losses; this one only tells.
            if self.world.rank == 0:
                logger.warning("the loss on retention text is %s and is left out", loss)
            return before
        if before is None:
            found = Retention(loss_before=loss)
            self.say("loss on retention text: %.4f before the training", loss)
        else:
            found = Retention(loss_before=before.loss_before, loss_after=loss)
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
        optimizer = build_optimizer(
            trainables, self.training, model.plan.trained_others, model.shared_moments()
        )
        project = partial(model.project_momentum, optimizer)
        return State(trainables, optimizer, decomposition, project)

    def checkpoints(self, plan: Plan) -> Checkpoints:
        """The states in this run's folder."""
        return Checkpoints(
            folder=self.folder,
            world=self.world,
            attempt=self.claim.attempt,
            keep=self.training.keep_checkpoints,
            check_owner=lambda: check_owner(self.folder, self.claim),
            token=self.claim.token,
            run=self._record(plan).model_dump(mode="json"),
        )

    def saver(self, checkpoints: Checkpoints, start: Position, tracker: Tracker | None) -> Saver:
        """Writes states, and says which is the newest."""

        def on_saved(position: Position, path: Path) -> None:
            self.say("saved the state after step %d in %s", position.step, path)
            self.reporter.update(latest_checkpoint=str(path), latest_checkpoint_step=position.step)

        return Saver(
            checkpoints,
            self.training,
            start.step,
            before_publish=(lambda: None) if tracker is None else tracker.sync,
            on_saved=on_saved,
        )

    def leaks(self, model: OSFTModel) -> LeakWatch:
        """What measures the share of the update in the kept subspaces."""
        told = self.training.save_dtype
        base = Path(self.training.model_path)
        return LeakWatch(model, base_dtype(base) if told is None else getattr(torch, told))

    def validation(self, model: OSFTModel, held_out: PreparedData | None) -> Validation | None:
        """The validation on these data; None without any."""
        if held_out is None:
            return None
        return Validation(
            self.training, self.world, model, held_out, self.reporter, self.outputs.write_best
        )

    def resume(
        self,
        model: OSFTModel,
        state: State,
        checkpoints: Checkpoints,
        validation: Validation | None,
    ) -> Position:
        """Load the newest state, if there is one."""
        position = checkpoints.load(state)
        position, is_new = position or Position(), position is None
        position = for_data(position, validation)
        if is_new:
            return position
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
        if validation is not None:
            validation.tell(position)
        return position

    def tracker(self, position: Position) -> contextlib.AbstractContextManager[Tracker | None]:
        """Metrics, on the first rank; every rank learns when they cannot be written."""
        made: list[Tracker] = []

        def on_first_rank() -> str:
            folder = self.folder
            services = start_services(
                self.training, self.claim.run_id, folder.root, folder.logs, position.step
            )
            made.append(Tracker(folder.metrics, position.step, services))
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
        is_whole = not stopped or (endless and end.step > 0)
        retention = before
        if is_whole and before is not None:
            retention = self.retention_loss(model, text, before)
        if is_whole and self.training.save_final_checkpoint:
            self.reporter.update(phase="Saving")
            final = self.outputs.write_final(model, end, retention)
        if stopped:
            raise Preempted(
                f"stopped after step {end.step}; "
                + ("the state is saved and the run can go on" if end.step else "nothing was done")
            )
        if final is None:
            facts = finite({"leak": model.leak(), **self.outputs.facts(end, retention)})
        else:
            facts = self.outputs.facts_of_final()
        self.reporter.update(phase="Done", final=None if final is None else str(final))
        return TrainResult(
            final, end.step, end.loss, already_finished=end == start, **_measured(facts)
        )

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


def _measured(facts: dict[str, Any]) -> dict[str, Any]:
    """What a result holds beside steps and loss, from the words of osft.json."""
    names = ("leak", "leak_exported", "validation_loss", "best_validation_loss")
    kept = facts.get("retention")
    found: dict[str, Any] = {name: facts.get(name) for name in names}
    return {**found, "retention": None if kept is None else Retention.model_validate(kept)}
