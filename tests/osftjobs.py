"""OSFTJobs on the test cluster: material on claims, apply, watch, read. For end-to-end tests."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pretrain
import skills
import torch
import yaml

from bench.machine import processor_name
from cluster import binaries
from cluster.api import ApiError, wait_for
from cluster.fixtures import Cluster
from osft_trainer.report import RunFolder, metric_lines

Object = dict[str, Any]

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
OLD, NEW = "rev", "rot"
LEARNED_STEPS = 250


class Jobs:
    """The OSFTJobs of one namespace, through kubectl and the API, and the folders behind them."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.api = cluster.plane.api

    def kubectl(self, *arguments: str, check: bool = True, **options: Any) -> str:
        """The kubectl of a user in this namespace."""
        return self.cluster.plane.kubectl("-n", self.namespace, *arguments, check=check, **options)

    def provide(self, model: Path) -> None:
        """Claims `models` and `datasets` with the model and samples of the new skill on them."""
        for name in ("models", "datasets"):
            claim = {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name},
                "spec": {
                    "accessModes": ["ReadWriteMany"],
                    "resources": {"requests": {"storage": "1Gi"}},
                },
            }
            self.kubectl("apply", "-f", "-", input=yaml.safe_dump(claim))
            self.claim(name).mkdir(parents=True, exist_ok=True)
        (self.claim("models") / "skills").symlink_to(model)
        skills.write_jsonl(self.claim("datasets") / f"{NEW}.jsonl", NEW, 2000, seed=2)

    def claim(self, name: str) -> Path:
        """The folder behind a claim."""
        return self.cluster.kubelet.claim_folder(self.namespace, name)

    def apply(self, body: Object, check: bool = True) -> str:
        """`kubectl apply -f -`."""
        return self.kubectl("apply", "-f", "-", input=yaml.safe_dump(body), check=check)

    def get(self, name: str) -> Object:
        """The OSFTJob as the API server has it; empty when it is gone."""
        path = f"/apis/osft.dev/v1alpha1/namespaces/{self.namespace}/osftjobs/{name}"
        try:
            return self.api.get(path)
        except ApiError as error:
            if error.code == 404:
                return {}
            raise

    def status(self, name: str) -> Object:
        """Its status, empty at first."""
        status: Object = self.get(name).get("status", {})
        return status

    def wait_phase(self, name: str, *phases: str, timeout_seconds: float = 240) -> Object:
        """Wait until it is in one of these phases; the status."""

        def reached() -> bool:
            status = self.status(name)
            phase = status.get("phase")
            if phase in ("Failed", "Succeeded") and phase not in phases:
                raise AssertionError(f"{name} is {phase}: {json.dumps(status, indent=1)}")
            return phase in phases

        wait_for(f"{name} {'/'.join(phases)}", reached, timeout_seconds=timeout_seconds)
        return self.status(name)

    def wait_step(self, name: str, step: int, timeout_seconds: float = 120) -> None:
        """Wait until the trainer has done so many steps, looking at its own file."""
        path = self.folder(name).metrics

        def reached() -> bool:
            return path.exists() and len(metric_lines(path)) >= step

        wait_for(f"{name} at step {step}", reached, timeout_seconds=timeout_seconds)

    def folder(self, name: str, claim: str | None = None) -> RunFolder:
        """Where a job writes, as a folder of this machine."""
        return RunFolder(self.claim(claim or f"{name}-checkpoints") / name)

    def losses(self, name: str) -> list[float]:
        """The loss of every step."""
        return [line["loss"] for line in metric_lines(self.folder(name).metrics)]

    def children(self, kind: str) -> list[Object]:
        """Objects of a kind (its path) in this namespace."""
        groups = {"pytorchjobs": "/apis/kubeflow.org/v1", "osftjobs": "/apis/osft.dev/v1alpha1"}
        root = groups.get(kind, "/api/v1")
        items: list[Object] = self.api.get(f"{root}/namespaces/{self.namespace}/{kind}")["items"]
        return items


def osftjob(name: str, *, spec: Object | None = None, **training: Any) -> Object:
    """The quickstart's OSFTJob under another name, with changes in camelCase; None removes."""
    job: Object = copy.deepcopy(yaml.safe_load(QUICKSTART.read_text(encoding="utf-8")))
    job["metadata"]["name"] = name
    merged = {**job["spec"]["training"], "activationCheckpointing": False, **training}
    job["spec"]["training"] = {key: value for key, value in merged.items() if value is not None}
    job["spec"] |= spec or {}
    return job


def learned_model() -> Path:
    """A small model that has learned one skill: made once, in about half a minute, then cached.

    The cache has a model for each text of the programs that make it, torch and processor: another
    processor rounds it to another one.
    """
    made_by = [Path(module.__file__).read_bytes() for module in (pretrain, skills)]
    told = f"{OLD} {LEARNED_STEPS} {torch.__version__} {processor_name()}"
    digest = hashlib.sha256(b"\0".join([*made_by, told.encode()])).hexdigest()[:16]
    kept = binaries.cache_home() / "learned-models" / digest
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        making = kept.with_name(f"{digest}-{os.getpid()}")
        pretrain.pretrain(making, [OLD], steps=LEARNED_STEPS, whole_text=True)
        with contextlib.suppress(OSError):  # there, by another run
            making.rename(kept)
    return kept
