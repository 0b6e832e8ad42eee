"""Parts of the spec that are written as in a Pod: environment, resources, references.

Part of spec. Same names and meaning as in Kubernetes' core API; only what a training pod needs.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from osft_operator import names
from osft_operator.resources import WHOLE_WORDS, is_extended, is_whole
from osft_operator.spec_part import JobPart, KeyName, ObjectName, Quantity, ResourceQuantity
from osft_trainer.parameters import Text

VariableName = Annotated[
    str, Field(min_length=1, max_length=256, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")
]


class NameReference(JobPart):
    """An object of the OSFTJob's namespace, by name."""

    name: ObjectName
    """Name of the object."""


class KeyReference(JobPart):
    """One key of a Secret or ConfigMap of the OSFTJob's namespace."""

    name: ObjectName
    """Name of the object."""
    key: KeyName
    """Key inside it."""
    optional: bool | None = None
    """Whether the pod starts without it."""


class SecretKey(JobPart):
    """One key of a Secret of the OSFTJob's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: KeyName
    """Key inside it."""


class FieldReference(JobPart):
    """A field of the pod itself."""

    field_path: Annotated[Text, Field(max_length=256)]
    """For instance status.hostIP or metadata.labels['key']."""


class ValueSource(JobPart):
    """Where a variable's value comes from. Give exactly one."""

    secret_key_ref: KeyReference | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyReference | None = None
    """A key of a ConfigMap."""
    field_ref: FieldReference | None = None
    """A field of the pod."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError(
                "exactly one of secretKeyRef, configMapKeyRef, fieldRef is needed: keep one of them"
            )
        return self


class Variable(JobPart):
    """An environment variable of the trainer."""

    name: VariableName
    """Name of the variable. Those of torchrun (PET_*, RANK, MASTER_ADDR, ...) are refused."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, as text. Secrets belong into valueFrom."""
    value_from: ValueSource | None = None
    """Take the value from a Secret, a ConfigMap or the pod. Excludes value."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if names.is_reserved_variable(self.name):
            raise ValueError(
                f"variable {self.name}: this variable is set by torchrun and the operators: "
                "remove it"
            )
        if self.value is not None and self.value_from is not None:
            raise ValueError(f"variable {self.name}: value and valueFrom exclude each other")
        return self


class OptionalReference(JobPart):
    """An object of the OSFTJob's namespace that may be missing when `optional`."""

    name: ObjectName
    """Name of the object."""
    optional: bool | None = None
    """Whether the pod starts without it."""


class VariableSource(JobPart):
    """All keys of a Secret or a ConfigMap as variables. Give exactly one."""

    prefix: Annotated[str, Field(max_length=64)] | None = None
    """Put before each key."""
    secret_ref: OptionalReference | None = None
    """A Secret."""
    config_map_ref: OptionalReference | None = None
    """A ConfigMap."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.secret_ref is None) == (self.config_map_ref is None):
            raise ValueError(
                "exactly one of secretRef and configMapRef is needed: keep one of them"
            )
        return self


ResourceName = Annotated[str, Field(min_length=1, max_length=128)]
ResourceList = Annotated[dict[ResourceName, ResourceQuantity], Field(max_length=16)]


class Resources(JobPart):
    """Resources of each pod's trainer."""

    limits: ResourceList = Field(default_factory=dict)
    """Upper limits, for instance nvidia.com/gpu, cpu, memory, rdma/hca."""
    requests: ResourceList = Field(default_factory=dict)
    """What the scheduler sets aside. Absent: the limits."""

    @model_validator(mode="after")
    def _check_whole(self) -> Self:
        for where, amounts in (("limits", self.limits), ("requests", self.requests)):
            for name, amount in amounts.items():
                if is_extended(name) and not is_whole(amount):
                    raise ValueError(f"{where}[{name}] is {amount}: {WHOLE_WORDS}")
        return self


class Secrets(JobPart):
    """Secrets by name and key, never by value."""

    hf_token: SecretKey | None = None
    """Token for downloads from the Hugging Face hub; becomes HF_TOKEN."""
    wandb_api_key: SecretKey | None = None
    """Key of Weights & Biases; becomes WANDB_API_KEY."""


class SharedMemory(JobPart):
    """Memory that the ranks of a pod share, at /dev/shm."""

    enabled: bool = True
    """Mount a memory volume at /dev/shm. Without it a container has 64 MiB."""
    size_limit: Quantity | None = None
    """Its limit; it counts against the memory limit. Absent: up to the node's default."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size_limit is not None and not self.enabled:
            raise ValueError("sizeLimit has no effect with enabled: false: remove one of them")
        return self


class PodTemplate(JobPart):
    """Merged into each pod: lists of named things by name, maps by key, single values replaced."""

    metadata: dict[str, Any] = Field(default_factory=dict, max_length=2)
    """labels and annotations of the pods."""
    spec: dict[str, Any] = Field(default_factory=dict, max_length=64)
    """A PodSpec, or part of one. The trainer's container is named pytorch. What has a field of its
    own in the OSFTJob is refused here, as is what weakens the pods' isolation. A sidecar belongs
    into initContainers with restartPolicy Always: a pod ends when all of its containers have."""
