"""The shape of an OSFTJob's status: types, descriptions and bounds of every field.

The CRD's status schema is written from it, and status and decide build it. Documents only: what
the values mean for the next step is decide's. Every text is bounded, because part of it comes from
pods, which are not trusted.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from osft_operator.resolved import Resolved

Time = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]
Reason = Annotated[str, Field(max_length=64)]
Message = Annotated[str, Field(max_length=4096)]

PHASES = (
    "Pending",
    "Queued",
    "Starting",
    "Running",
    "Restarting",
    "Suspending",
    "Suspended",
    "Succeeded",
    "Failed",
)
"""All phases there are. No choice in the definition: an operator that is newer may have more."""


class Part(BaseModel):
    """One object of the status: camelCase, unknown names ignored on reading."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class Condition(Part):
    """One statement about the job, with the time it last changed."""

    type: Annotated[str, Field(max_length=64)]
    """Accepted, Running, Suspended, Stalled, Complete, Failed or Ready."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds."""
    reason: Reason
    """One word why; part of the API."""
    message: Message = ""
    """The same for people."""
    observed_generation: int
    """Generation of the OSFTJob it was said about."""
    last_transition_time: Time
    """When status last changed."""


class NamedValue(Part):
    """A further number by name."""

    name: Annotated[str, Field(max_length=64)]
    """Name of the metric."""
    value: Annotated[str, Field(max_length=64)]
    """Its value, as text."""


class ProgressStatus(Part):
    """How far the run is, rounded for people. Names as in Kubeflow's TrainJob status."""

    progress_percentage: int = Field(ge=0, le=100)
    """0 to 100; 99 until the trained model is complete."""
    summary: Annotated[str, Field(max_length=64)]
    """For instance `42% 840/2000`."""
    eta: Annotated[str, Field(max_length=32)] | None = None
    """Time left in words, for instance 3h25m."""
    step: int = Field(ge=0)
    """Optimizer steps done."""
    total_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps of the whole run; absent when it has no end."""
    epoch: float | None = None
    """Passes over the data done."""
    total_epochs: float | None = None
    """Passes of the whole run."""
    loss: float | None = None
    """Mean loss per counted token in the last step."""
    learning_rate: float | None = None
    """Learning rate of the last step."""
    tokens_per_second: float | None = None
    """Tokens of all ranks per second."""
    estimated_remaining_seconds: int | None = Field(default=None, ge=0)
    """Time left at the current speed, in seconds."""
    last_updated_time: Annotated[str, Field(max_length=32)] | None = None
    """When the trainer said so."""
    attempt: int | None = Field(default=None, ge=1)
    """Which attempt said so."""
    pod: Annotated[str, Field(max_length=253)] | None = None
    """Pod of rank 0, whose log is the one to read."""
    phase: Annotated[str, Field(max_length=32)] | None = None
    """What the trainer is at: Starting, Preparing, Training, Validating, Saving or Done."""
    advanced_time: Time | None = None
    """When step, phase or checkpoint last changed; spec.stall counts from here."""
    metrics: Annotated[list[NamedValue], Field(max_length=16)] | None = None
    """Further numbers."""


class RetentionStatus(Part):
    """What became of the old skills: mean token loss on text that was never trained on."""

    loss_before: float
    """Of the base model."""
    loss_after: float | None = None
    """Of the trained model; absent until the end."""
    change: float | None = None
    """After minus before; below zero: the model got better at the old text."""
    summary: Annotated[str, Field(max_length=64)]
    """For instance `1.204 -> 1.207`."""


class CheckpointStatus(Part):
    """What the run has written."""

    latest: Annotated[str, Field(max_length=1024)] | None = None
    """Newest complete state to resume from, as the trainer sees it."""
    latest_step: int | None = Field(default=None, ge=0)
    """Its optimizer step."""
    final: Annotated[str, Field(max_length=1024)] | None = None
    """Folder of the trained model, once complete."""


class FailureStatus(Part):
    """The failure that explains the others of its time: where it was, how, and its last words."""

    pod: Annotated[str, Field(max_length=253)] | None = None
    """Name of the pod."""
    container: Annotated[str, Field(max_length=63)] | None = None
    """Name of the container."""
    reason: Reason
    """The trainer's word (BadInput, Diverged, ...) or the kubelet's (OOMKilled, ...)."""
    exit_code: int | None = None
    """Exit code of the container."""
    message: Annotated[str, Field(max_length=2048)] = ""
    """Its last words."""
    finished_at: Time | None = None
    """When it failed."""
    attempt: int | None = Field(default=None, ge=1)
    """In which attempt."""


class ReplacedPods(Part):
    """Pods of an attempt that were made again after one event."""

    made_after: Time
    """They were made after this time."""
    restarts: int = Field(ge=0)
    """Restarts of the attempt until then, which their own come on top of."""


class CountedPods(Part):
    """Which pods of the attempt the number of restarts was counted on."""

    newest: Time
    """When the newest of them was made; a pod made later replaces one that was lost."""
    replaced_after: Time | None = None
    """Pods made after this time replace others."""
    restarts_of_replaced: int | None = Field(default=None, ge=0)
    """Restarts of the attempt until those were made, which their own come on top of."""
    restarts_of_others: int | None = Field(default=None, ge=0)
    """Restarts of the attempt when all its pods last ran, with one for each loss since."""
    earlier_replaced: Annotated[list[ReplacedPods], Field(max_length=100)] | None = None
    """Pods that were made again in earlier rounds, and are still there."""


class WaitingFor(Part):
    """The object that must change before the job goes on."""

    kind: Annotated[str, Field(max_length=64)]
    """Kind of the object: Pod, PyTorchJob, PersistentVolumeClaim, Workload, OSFTJob, ..."""
    name: Annotated[str, Field(max_length=253)]
    """Its name."""
    since: Time
    """Since when it has been waited for."""


class JobStatus(Part):
    """What the operator has seen and done. Written by the operator only."""

    phase: Annotated[str, Field(max_length=32)] | None = None
    """One word for people, worked out from the conditions: Pending, Queued, Starting, Running,
    Restarting, Suspending, Suspended, Succeeded or Failed."""
    reason: Reason | None = None
    """Why the job is in this phase."""
    waiting_for: WaitingFor | None = None
    """What a job that does not run waits for, and since when; reason and conditions say why."""
    conditions: Annotated[list[Condition], Field(max_length=16)] | None = None
    """Accepted, Running, Suspended, Stalled, Complete, Failed, Ready. Wait for Complete or Failed.
    Ready is True at the good end; Stalled while the job does not go forward by itself."""
    observed_generation: int | None = None
    """Generation of the spec that this status is about."""
    start_time: Time | None = None
    """When the first attempt was made; from then on the training is fixed."""
    completion_time: Time | None = None
    """When the job ended, well or not."""
    attempt: int | None = Field(default=None, ge=1)
    """Number of the PyTorchJob that is made or was made last."""
    restarts: int | None = Field(default=None, ge=0)
    """Failures after which the run started again: a container, a lost pod, or all of it."""
    restarts_before_attempt: int | None = Field(default=None, ge=0)
    """That number when this attempt began."""
    counted_pods: CountedPods | None = None
    """Which pods of the attempt that number was counted on."""
    next_attempt_time: Time | None = None
    """The recorded attempt is not made before this time: a wait after failures."""
    py_torch_job_name: Annotated[str, Field(max_length=63)] | None = Field(
        default=None, alias="pyTorchJobName"
    )
    """Name of the attempt's PyTorchJob."""
    py_torch_job_uid: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, alias="pyTorchJobUID"
    )
    """Its uid, once it was seen."""
    resolved: Resolved | None = None
    """What was settled before the first attempt; every later one is made from it."""
    progress: ProgressStatus | None = None
    """How far the run is."""
    checkpoint: CheckpointStatus | None = None
    """What the run has written."""
    retention: RetentionStatus | None = None
    """Loss on text of the old skills, when such text is given."""
    failure: FailureStatus | None = None
    """The last failure, also one that a restart cured."""
