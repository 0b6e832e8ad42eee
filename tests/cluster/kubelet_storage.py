"""Volumes for the kubelet: a folder for each claim, files for Secrets and ConfigMaps.

Called by kubelet only. It is the storage provisioner too: a new claim is bound to a new folder, and
the folder goes with the claim, as with the reclaim policy Delete.
"""

from __future__ import annotations

import base64
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from cluster.api import MERGE_PATCH, Api, ApiError, Informer
from osft_operator.local_pods import Object

CLAIMS = "/api/v1/persistentvolumeclaims"
PLURALS = {"Secret": "secrets", "ConfigMap": "configmaps"}


class NotReady(Exception):
    """What a pod needs is not there yet; the kubelet tries again."""


class Storage:
    """The folders behind volumes; `claims` must run for `provision` to see any."""

    def __init__(self, api: Api, folder: Path, changed: threading.Event) -> None:
        self.claims = Informer(api, CLAIMS, changed)
        self._api, self._folder = api, folder
        self._bound: dict[str, Path] = {}

    def claim_folder(self, namespace: str, name: str) -> Path:
        """The folder behind a PersistentVolumeClaim."""
        return self._folder / "claims" / namespace / name

    def provision(self) -> None:
        """Take the folders of deleted claims away and give every new one its own."""
        claims = {each["metadata"]["uid"]: each for each in self.claims.items()}
        # deleted ones first: a new claim may have an old one's name
        for uid in [each for each in self._bound if each not in claims]:
            shutil.rmtree(self._bound.pop(uid), ignore_errors=True)
        for uid, claim in claims.items():
            if uid not in self._bound:
                self._bind(claim)

    def _bind(self, claim: Object) -> None:
        metadata, spec = claim["metadata"], claim["spec"]
        namespace, name = metadata["namespace"], metadata["name"]
        folder = self.claim_folder(namespace, name)
        folder.mkdir(parents=True, exist_ok=True)
        status = {
            "phase": "Bound",
            "accessModes": spec["accessModes"],
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
        }
        path = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}/status"
        self._api.attempt("PATCH", path, {"status": status}, MERGE_PATCH)
        self._bound[metadata["uid"]] = folder

    def volume(self, namespace: str, volume: Object, scratch: Path) -> Path:
        """The folder of one of a pod's volumes; `scratch` holds those that go with the pod.

        Raises:
            NotReady: what it needs is not there, or it is of an unknown kind.
        """
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            folder = self.claim_folder(namespace, claim)
            if not folder.exists():
                raise NotReady(f'persistentvolumeclaim "{claim}" not found or not bound')
            return folder
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        folder = scratch / str(volume["name"])
        folder.mkdir(parents=True, exist_ok=True)
        if "secret" in volume:
            source = volume["secret"]
            self._fill(folder, namespace, "Secret", source["secretName"], source)
        elif "configMap" in volume:
            source = volume["configMap"]
            self._fill(folder, namespace, "ConfigMap", source["name"], source)
        elif "emptyDir" not in volume:
            raise NotReady(f"volume {volume['name']!r} is of no kind that this kubelet knows")
        return folder

    def data(self, namespace: str, kind: str, name: str) -> Mapping[str, str] | None:
        """What a Secret or ConfigMap holds, decoded; None when there is none."""
        try:
            found = self._api.get(f"/api/v1/namespaces/{namespace}/{PLURALS[kind]}/{name}")
        except ApiError as error:
            if error.code != 404:
                raise
            return None
        data: dict[str, str] = found.get("data") or {}
        if kind == "Secret":
            return {key: base64.b64decode(value).decode() for key, value in data.items()}
        return data

    def _fill(self, folder: Path, namespace: str, kind: str, name: str, source: Object) -> None:
        data = self.data(namespace, kind, name)
        if data is None and not source.get("optional"):
            raise NotReady(f'{kind.lower()} "{name}" not found')
        keys = {each["key"]: each["path"] for each in source.get("items") or []}
        for key, path in (keys or {key: key for key in data or {}}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text((data or {})[key])
