"""The OSFTJob as a typed object, and every problem of one in words.

Called by resolve, render, policy, decide, crd (which writes the schema from it) and `osft
validate`. The CRD refuses the same with the same words where the API server can; this model is the
second line and the only one on a machine without a cluster. Must never look at status or settings.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from osft_operator import names
from osft_operator.bounds import excess
from osft_operator.spec_part import (
    ABSOLUTE_PATH_PATTERN,
    LABEL_VALUE_PATTERN,
    PATTERN_WORDS,
    JobPart,
    ObjectName,
    is_below,
)
from osft_operator.spec_pod import (
    NameReference,
    PodTemplate,
    Resources,
    Secrets,
    SharedMemory,
    Variable,
    VariableSource,
)
from osft_operator.spec_run import Rendezvous, Stall
from osft_operator.spec_storage import Storage
from osft_trainer.arguments import explain
from osft_trainer.config import TrainingParameters
from osft_trainer.parameters import Text

LabelValue = Annotated[str, Field(min_length=1, max_length=63, pattern=LABEL_VALUE_PATTERN)]
Node = Annotated[int, Field(ge=1, le=names.MAX_NODES)]


class JobTraining(JobPart, TrainingParameters):
    """The osft() call: what to train, on what, how, and what to write."""

    # of two bases, the last one's would win
    model_config = JobPart.model_config

    ckpt_output_dir: Annotated[
        str, Field(min_length=2, max_length=1024, pattern=ABSOLUTE_PATH_PATTERN)
    ]
    """Folder of the run: checkpoints, metrics and the final model. A folder below
    storage.checkpoints.mountPath. Absent: that path and the OSFTJob's name."""


class JobSpec(JobPart):
    """What to run. From status.startTime on, what defines the training cannot be changed."""

    training: JobTraining
    """The osft() call: what to train, on what, how, and what to write. Fixed once started."""
    nnodes: Node = 1
    """Number of pods. Fixed once started."""
    nproc_per_node: int | None = Field(default=None, ge=1, le=1024)
    """Processes per pod. Absent: the GPUs in resources.limits, else 1. Fixed once started."""
    rendezvous: Rendezvous = Field(default_factory=Rendezvous)
    """How the processes of all nodes find each other. Fixed once started."""

    image: Annotated[Text, Field(max_length=512)] | None = None
    """Trainer image. Absent: the operator's. Fixed once started."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When to pull the image. Absent: the operator's."""
    image_pull_secrets: list[NameReference] = Field(default_factory=list, max_length=8)
    """Secrets for pulling the image."""
    resources: Resources = Field(default_factory=Resources)
    """Resources of each pod's trainer; a change takes effect with the next attempt."""
    env: list[Variable] = Field(default_factory=list, max_length=128)
    """Environment variables of the trainer."""
    env_from: list[VariableSource] = Field(default_factory=list, max_length=16)
    """Secrets and ConfigMaps all of whose keys become variables of the trainer."""
    storage: Storage
    """Volumes: checkpoints, data, models, caches. Fixed once started."""
    secrets: Secrets = Field(default_factory=Secrets)
    """Secrets by name and key, never by value."""
    shared_memory: SharedMemory = Field(default_factory=SharedMemory)
    """Memory that the ranks of a pod share, at /dev/shm."""
    pod_template: PodTemplate = Field(default_factory=PodTemplate)
    """Merged into each pod: node selectors, tolerations, affinity, sidecars, labels, ..."""
    termination_grace_period_seconds: int = Field(default=300, ge=60, le=86400)
    """Time a stopped pod has to save its state, in seconds; 30 of them are torchrun's own."""

    queue_name: LabelValue | None = None
    """Kueue LocalQueue that admits the job."""
    workload_priority_class_name: LabelValue | None = None
    """Kueue WorkloadPriorityClass: order in the queue."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    scheduler_name: ObjectName | None = None
    """Scheduler of the pods. Absent: the cluster's default."""
    suspend: bool = False
    """Stop the pods after saving, and go on when set to false again."""

    max_restarts: int = Field(default=3, ge=0, le=99)
    """Failures after which the run starts again, from its newest checkpoint: failed containers,
    evicted or lost pods, failed attempts. Bad input and divergence are never retried."""
    active_deadline_seconds: int | None = Field(default=None, ge=1, le=31_536_000)
    """Longest time the job may be active, in seconds, from status.startTime, anew when it is
    resumed. Absent: no limit."""
    ttl_seconds_after_finished: int | None = Field(default=None, ge=0, le=31_536_000)
    """Delete the OSFTJob so many seconds after it finished. Absent: it stays."""
    stall: Stall | None = None
    """Notice a run that stands still. Absent: it may stand still for ever."""
    on_existing_run: Literal["resume", "restart", "error"] = "resume"
    """What to do with another run's results in ckptOutputDir. resume: continue if data, arguments
    and model are the same, else fail. restart: move them to previous-N/. error: fail. Fixed once
    started."""

    @model_validator(mode="after")
    def _check_sharing(self) -> Self:
        modes = self.storage.checkpoints.access_modes
        if self.nnodes > 1 and modes is not None and "ReadWriteMany" not in modes:
            raise ValueError(
                f"storage.checkpoints.accessModes is {', '.join(modes)}, but with nnodes > 1 all "
                "nodes write to it: add ReadWriteMany, or remove accessModes"
            )
        return self


class Metadata(BaseModel):
    """What is used of the object's metadata."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str = Field(max_length=names.MAX_NAME_LENGTH, pattern=names.NAME_PATTERN)
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class OSFTJob(BaseModel):
    """An OSFTJob that is valid. Reads the object as the API server or a file gives it."""

    # an error in words that holds the whole input could be too deep to be written
    model_config = ConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, hide_input_in_errors=True
    )

    api_version: Literal["osft.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["OSFTJob"]
    metadata: Metadata
    spec: JobSpec

    @model_validator(mode="before")
    @classmethod
    def _fill_folder(cls, data: Any) -> Any:
        """Default of ckptOutputDir: the job's name below the mount of the checkpoints."""
        match data:
            case {"metadata": {"name": str(name)}, "spec": {"training": dict(training)} as spec}:
                if training.get("ckptOutputDir") is not None:
                    return data
                mount = _mount_path(spec)
                folder = f"{mount.rstrip('/')}/{name}"
                training = {**training, "ckptOutputDir": folder}
                return {**data, "spec": {**spec, "training": training}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _check_bounds(cls, data: Any) -> Any:
        """Before all else (the last of these runs first): nothing deep is looked at any deeper."""
        if (found := excess(data)) is not None:
            raise ValueError(found)
        return data

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        folder = self.spec.training.ckpt_output_dir
        mount = self.spec.storage.checkpoints.mount_path
        if not is_below(folder, mount):
            raise ValueError(
                f"spec.training.ckptOutputDir: {folder} must be a folder below "
                f"spec.storage.checkpoints.mountPath {mount}, without `..`: remove it to use "
                f"the default"
            )
        return self

    @property
    def queue_name(self) -> str | None:
        """Kueue's queue, by field or by the label that Kueue's users know."""
        return self.spec.queue_name or self.metadata.labels.get(names.QUEUE_LABEL)


def _mount_path(spec: Mapping[str, Any]) -> str:
    match spec:
        case {"storage": {"checkpoints": {"mountPath": str(path)}}}:
            return path
    return "/checkpoints"


def problems(body: Any) -> list[str]:
    """Every problem of an OSFTJob, each with field path, value, rule and cure; empty if valid."""
    try:
        OSFTJob.model_validate(body)
    except ValidationError as error:
        lines = explain(error, camel=True)
        items = error.errors(include_url=False)
        return [_line(line, item) for line, item in zip(lines, items, strict=True)]
    return []


def _line(line: str, item: Any) -> str:
    """Some of pydantic's words in words that name the cure."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _names_at(item["loc"][:-1])
        nearest = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        cure = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
        return f"{where}: unknown field; {cure}"
    if item["loc"] == ("metadata", "name") and item["type"] != "missing":
        return f"{where}: {NAME_RULE} (got {item['input']!r})"
    if item["type"] == "string_pattern_mismatch":
        rule = PATTERN_WORDS.get(item["ctx"]["pattern"], "has a form that is not allowed")
        return f"{where}: {rule} (got {item['input']!r})"
    return line


NAME_RULE = (
    f"must be lower case letters, digits and `-`, begin with a letter, end with a letter or digit, "
    f"and have at most {names.MAX_NAME_LENGTH} characters: choose a shorter or plainer name"
)


def _names_at(path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the object at a path of the document."""
    model: type[BaseModel] | None = OSFTJob
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        fields = {to_camel(name): info for name, info in model.model_fields.items()}
        model = model_in(fields[part].annotation)
    return [] if model is None else [to_camel(name) for name in model.model_fields]


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone or in a list; None when it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(model_in, get_args(annotation))), None)
