"""The cluster's storage as folders of this machine.

A claim is a folder; a Secret or ConfigMap is one, too, with a file per key. Called by `local` and
`inspection`, so that `osft run` and `osft plan` find the same files. It never removes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

REFERENCES = {"Secret": "secrets", "ConfigMap": "configmaps"}
"""Where Secrets and ConfigMaps lie below the volumes: a folder each, a file per key."""


def reference(volumes: Path, kind: str, name: str) -> Mapping[str, str] | None:
    """The data of a Secret or ConfigMap; None when there is none."""
    folder = volumes / REFERENCES[kind] / name
    if not folder.is_dir():
        return None
    # an editor's or echo's last line break is no part of a token
    return {
        file.name: file.read_text(encoding="utf-8").rstrip("\n")
        for file in folder.iterdir()
        if file.is_file()
    }


def folders(pod: Mapping[str, Any], volumes: Path, work_dir: Path) -> dict[str, Path]:
    """A folder for each of the pod's volumes, made if need be; all but claims is of this run."""
    found = {}
    for volume in pod["spec"].get("volumes") or []:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        config = volume.get("configMap", {}).get("name")
        secret = volume.get("secret", {}).get("secretName")
        if claim is not None:
            folder = volumes / claim
        elif config is not None:
            folder = volumes / REFERENCES["ConfigMap"] / config
        elif secret is not None:
            folder = volumes / REFERENCES["Secret"] / secret
        else:
            folder = work_dir / pod["metadata"]["name"] / "volumes" / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        found[volume["name"]] = folder
    return found
