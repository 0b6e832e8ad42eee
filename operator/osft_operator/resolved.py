"""What the operator settles once for an OSFTJob: status.resolved, written before all else.

Every later attempt is rendered from the job and this record, so that an upgrade of the operator or
a changed setting never changes a run that has begun. Called by decide and the command line.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from osft_operator import names, resources
from osft_operator.policy_allowed import Allowed
from osft_operator.spec import OSFTJob

Shape = Literal["master-worker", "worker-only"]


class RenderSettings(Allowed):
    """The operator's settings that reach a pod, and what a pod may ask for.

    `Settings` has fields of these names.
    """

    trainer_image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pytorch_job_shape: Shape = "master-worker"
    run_as_user: int | None = 1000
    run_as_group: int | None = 1000
    fs_group: int | None = 1000

    @classmethod
    def of(cls, settings: BaseModel) -> Self:
        """Take the fields of these names from the operator's settings."""
        return cls.model_validate({name: getattr(settings, name) for name in cls.model_fields})


class Resolved(BaseModel):
    """Values in force for all attempts of a run."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    image: str = Field(max_length=512)
    """Trainer image."""
    image_pull_policy: str = Field(max_length=16)
    """When to pull it."""
    nnodes: int = Field(ge=1)
    """Number of pods."""
    nproc_per_node: int = Field(ge=1)
    """Processes per pod."""
    world_size: int = Field(ge=1)
    """Processes of the whole run."""
    checkpoint_claim: str = Field(max_length=253)
    """Claim that holds the run's folder."""
    checkpoint_dir: str = Field(max_length=1024)
    """Folder of the run, as the trainer sees it."""
    pytorch_job_shape: str = Field(alias="pyTorchJobShape", max_length=32)
    """How the PyTorchJob is laid out: master-worker or worker-only."""
    omp_num_threads: int | None = None
    """CPU threads of each process; absent: left to the process."""
    run_as_user: int | None = None
    """User of the pods; absent: the platform's choice."""
    run_as_group: int | None = None
    """Group of the pods; absent: the platform's choice."""
    fs_group: int | None = None
    """Group that owns the volumes; absent: the platform's choice."""

    def to_status(self) -> dict[str, Any]:
        """The record as it stands in the status."""
        return self.model_dump(by_alias=True, exclude_none=True)


def resolve(job: OSFTJob, settings: RenderSettings) -> Resolved:
    """Settle everything that the OSFTJob leaves open."""
    spec = job.spec
    limits = {**spec.resources.limits}
    processes = spec.nproc_per_node or resources.gpus(limits) or 1
    return Resolved(
        image=spec.image or settings.trainer_image,
        image_pull_policy=spec.image_pull_policy or settings.image_pull_policy,
        nnodes=spec.nnodes,
        nproc_per_node=processes,
        world_size=spec.nnodes * processes,
        checkpoint_claim=(
            spec.storage.checkpoints.claim_name or names.claim_name(job.metadata.name)
        ),
        checkpoint_dir=spec.training.ckpt_output_dir,
        pytorch_job_shape=settings.pytorch_job_shape,
        omp_num_threads=resources.threads(limits, spec.resources.requests, processes),
        run_as_user=settings.run_as_user,
        run_as_group=settings.run_as_group,
        fs_group=settings.fs_group,
    )
