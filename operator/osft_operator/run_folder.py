"""Where a run writes, as a claim and a path on it: what an OSFTJob asks for, and what a pod does.

Called by cache, which keeps it of each training pod, and by observer, which looks for others that
write where a job is about to. Pure.
"""

from __future__ import annotations

import posixpath
from typing import Any, NamedTuple

from osft_operator import names

FLAG = "--ckpt-output-dir="
MOUNT_PATH = "/checkpoints"
"""Where a claim is mounted if the OSFTJob does not say so."""


class RunFolder(NamedTuple):
    """A folder on a claim."""

    claim: str
    path: str


def of_job(body: Any) -> RunFolder:
    """The folder of an OSFTJob, with its defaults."""
    spec, name = body.get("spec") or {}, str(body["metadata"]["name"])
    checkpoints = (spec.get("storage") or {}).get("checkpoints") or {}
    mount = checkpoints.get("mountPath") or MOUNT_PATH
    folder = (spec.get("training") or {}).get("ckptOutputDir") or posixpath.join(mount, name)
    claim = checkpoints.get("claimName") or names.claim_name(name)
    return _folder(claim, mount, checkpoints.get("subPath"), folder)


def of_pod(pod: Any) -> RunFolder | None:
    """The folder that a training pod writes to; None for another pod."""
    spec = pod.get("spec") or {}
    volumes = {each.get("name"): each for each in spec.get("volumes") or []}
    claim = (volumes.get(names.CHECKPOINT_VOLUME) or {}).get("persistentVolumeClaim") or {}
    for container in spec.get("containers") or []:
        if container.get("name") != names.CONTAINER or "claimName" not in claim:
            continue
        mounts = {each.get("name"): each for each in container.get("volumeMounts") or []}
        mount = mounts.get(names.CHECKPOINT_VOLUME)
        folders = [each for each in container.get("args") or [] if each.startswith(FLAG)]
        if mount is not None and folders:
            folder = folders[-1].removeprefix(FLAG).replace("$$", "$")
            return _folder(claim["claimName"], mount["mountPath"], mount.get("subPath"), folder)
    return None


def _folder(claim: str, mount: str, sub_path: str | None, folder: str) -> RunFolder:
    inside = posixpath.relpath(folder, mount)
    return RunFolder(claim, posixpath.normpath(posixpath.join(sub_path or "", inside)))
