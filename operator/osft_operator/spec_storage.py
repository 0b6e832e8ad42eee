"""`spec.storage`: where checkpoints, data, models and caches lie.

Part of spec. Volumes are made of it in volumes. Paths are what the trainer's process sees; a claim
is a PersistentVolumeClaim in the OSFTJob's namespace.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from osft_operator.names import RESERVED_PATHS, RESERVED_VOLUMES
from osft_operator.resources import quantity
from osft_operator.spec_part import AbsolutePath, JobPart, ObjectName, Quantity, SubPath
from osft_operator.spec_part import has_parent_step as _climbs

AccessMode = Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]


class Checkpoints(JobPart):
    """The volume for checkpoints, metrics and the trained model. Give claimName or size."""

    claim_name: ObjectName | None = None
    """An existing claim. With more than one node it must be ReadWriteMany. Excludes size."""
    size: Quantity | None = None
    """Make a claim of this size, named after the OSFTJob with `-checkpoints`, for instance 100Gi.
    One that an earlier OSFTJob of this name left is taken again. Excludes claimName."""
    storage_class_name: ObjectName | None = None
    """Storage class of the claim that is made. Absent: the cluster's default."""
    access_modes: list[AccessMode] | None = Field(default=None, min_length=1, max_length=3)
    """Access modes of the claim that is made. Absent: ReadWriteOnce for one node, else
    ReadWriteMany."""
    sub_path: SubPath | None = None
    """Folder inside the volume to mount, instead of its root."""
    mount_path: AbsolutePath = "/checkpoints"
    """Where the volume is mounted; training.ckptOutputDir lies below it."""
    retain: bool = True
    """Keep the claim that is made when the OSFTJob is deleted. false: its data goes too."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.claim_name is None) == (self.size is None):
            raise ValueError("exactly one of claimName and size is needed: name a claim or a size")
        if self.size is not None and quantity(self.size) == 0:
            raise ValueError("size must be more than nothing: write for instance 100Gi")
        if self.claim_name is not None:
            for name, value in (
                ("storageClassName", self.storage_class_name),
                ("accessModes", self.access_modes),
            ):
                if value is not None:
                    raise ValueError(f"{name} has no effect with claimName: remove it or use size")
            if not self.retain:
                raise ValueError(
                    "retain: false has no effect with claimName, which always stays: remove it"
                )
        _check_paths(self.mount_path, self.sub_path)
        return self


class Mount(JobPart):
    """A further volume, for models or data. Give one of claimName, configMapName, secretName."""

    name: Annotated[
        str, Field(min_length=1, max_length=50, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    ]
    """Name of the volume in the pods."""
    claim_name: ObjectName | None = None
    """An existing PersistentVolumeClaim."""
    config_map_name: ObjectName | None = None
    """A ConfigMap, each key a file."""
    secret_name: ObjectName | None = None
    """A Secret, each key a file."""
    sub_path: SubPath | None = None
    """Folder or file inside the volume to mount, instead of its root."""
    mount_path: AbsolutePath
    """Where it is mounted."""
    read_only: bool = True
    """Whether the trainer may only read it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sources = (self.claim_name, self.config_map_name, self.secret_name)
        if sum(source is not None for source in sources) != 1:
            raise ValueError(
                f"mount {self.name} needs exactly one of claimName, configMapName, secretName: "
                "keep one of them"
            )
        if self.name in RESERVED_VOLUMES:
            raise ValueError(f"the volume name {self.name} is the operator's own: choose another")
        _check_paths(self.mount_path, self.sub_path)
        return self


class Cache(JobPart):
    """Where downloads and compiled kernels lie. Absent: a temporary folder of each pod."""

    claim_name: ObjectName | None = None
    """An existing claim, so that downloads are kept. Excludes sizeLimit."""
    size_limit: Quantity | None = None
    """Limit of the temporary folder, for instance 50Gi. Excludes claimName."""
    mount_path: AbsolutePath = "/cache"
    """Where it is mounted; HF_HOME, XDG_CACHE_HOME and others point into it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.claim_name is not None and self.size_limit is not None:
            raise ValueError("claimName and sizeLimit exclude each other: keep one of them")
        _check_paths(self.mount_path, None)
        return self


class Storage(JobPart):
    """Volumes of the training pods."""

    checkpoints: Checkpoints
    """Where checkpoints and the trained model are written. Shared by all nodes."""
    mounts: list[Mount] = Field(default_factory=list, max_length=32)
    """Further volumes, for models and data."""
    cache: Cache = Field(default_factory=Cache)
    """Hub downloads and compiled kernels."""

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        names = [mount.name for mount in self.mounts]
        paths = [self.checkpoints.mount_path, self.cache.mount_path, *RESERVED_PATHS]
        paths += [mount.mount_path for mount in self.mounts]
        for what, values in (
            ("name", names),
            ("mountPath", paths),
        ):
            for value in sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(f"{what} {value} is used twice: give each volume its own")
        return self


def _check_paths(mount_path: str, sub_path: str | None) -> None:
    if _climbs(mount_path):
        raise ValueError(f"mountPath {mount_path} must not contain `..`: write the path plainly")
    if sub_path is not None and (_climbs(sub_path) or sub_path.startswith("/")):
        raise ValueError(
            f"subPath {sub_path} must be a path inside the volume: remove a leading / and any `..`"
        )
