"""The volumes of a training pod, where they are mounted, and which variables point at them.

Called by pod. Pure. What the volumes are called is in names.
"""

from __future__ import annotations

from typing import Any

from osft_operator import names
from osft_operator.resolved import Resolved
from osft_operator.spec import JobSpec
from osft_operator.spec_storage import Mount

Object = dict[str, Any]


def volumes(spec: JobSpec, resolved: Resolved) -> list[Object]:
    """The pod's volumes: checkpoints, the user's mounts, cache, temporary files, shared memory."""
    cache = spec.storage.cache
    result = [
        _claim(names.CHECKPOINT_VOLUME, resolved.checkpoint_claim),
        *(_source(mount) for mount in spec.storage.mounts),
        _claim(names.CACHE_VOLUME, cache.claim_name)
        if cache.claim_name is not None
        else _empty(names.CACHE_VOLUME, size_limit=cache.size_limit),
        _empty(names.TEMPORARY_VOLUME),
    ]
    if spec.shared_memory.enabled:
        size = spec.shared_memory.size_limit
        result.append(_empty(names.SHARED_MEMORY_VOLUME, medium="Memory", size_limit=size))
    return result


def volume_mounts(spec: JobSpec) -> list[Object]:
    """Where the trainer's container sees them."""
    checkpoints = spec.storage.checkpoints
    result = [
        _mount(names.CHECKPOINT_VOLUME, checkpoints.mount_path, checkpoints.sub_path),
        *(
            _mount(mount.name, mount.mount_path, mount.sub_path, mount.read_only)
            for mount in spec.storage.mounts
        ),
        _mount(names.CACHE_VOLUME, spec.storage.cache.mount_path),
        _mount(names.TEMPORARY_VOLUME, names.TEMPORARY_PATH),
    ]
    if spec.shared_memory.enabled:
        result.append(_mount(names.SHARED_MEMORY_VOLUME, names.SHARED_MEMORY_PATH))
    return result


def cache_variables(spec: JobSpec) -> dict[str, str]:
    """Keep every library's files off the image's own file system, which may be read-only."""
    cache = spec.storage.cache.mount_path.rstrip("/")
    return {
        "HOME": cache,
        "USER": "osft",  # user 1000 need not be in the image's list of users
        "TMPDIR": names.TEMPORARY_PATH,
        "HF_HOME": f"{cache}/huggingface",
        "XDG_CACHE_HOME": f"{cache}/xdg",
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
    }


def _claim(name: str, claim: str) -> Object:
    return {"name": name, "persistentVolumeClaim": {"claimName": claim}}


def _empty(name: str, *, medium: str | None = None, size_limit: str | None = None) -> Object:
    options = {"medium": medium, "sizeLimit": size_limit}
    return {
        "name": name,
        "emptyDir": {key: value for key, value in options.items() if value is not None},
    }


def _source(mount: Mount) -> Object:
    if mount.config_map_name is not None:
        return {"name": mount.name, "configMap": {"name": mount.config_map_name}}
    if mount.secret_name is not None:
        return {"name": mount.name, "secret": {"secretName": mount.secret_name}}
    assert mount.claim_name is not None, "the spec allows exactly one source"
    return _claim(mount.name, mount.claim_name)


def _mount(name: str, path: str, sub_path: str | None = None, read_only: bool = False) -> Object:
    mount: Object = {"name": name, "mountPath": path}
    if sub_path is not None:
        mount["subPath"] = sub_path
    if read_only:
        mount["readOnly"] = True
    return mount
