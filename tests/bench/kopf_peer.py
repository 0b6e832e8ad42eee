"""The peer of the load benchmark: a plain kopf operator, written as kopf's own examples are.

High-level handlers and an index, our own rendering: so the two differ in how they follow the
cluster, not in what they make. Run by operator_load with `kopf run`; never by anything else.
"""

from __future__ import annotations

from typing import Any

import kopf

from osft_operator import render
from osft_operator.cluster import AlreadyExists, Cluster
from osft_operator.kinds import CLAIMS, OSFTJOBS, PYTORCHJOBS
from osft_operator.resolved import RenderSettings, resolve
from osft_operator.spec import OSFTJob

SETTINGS = RenderSettings(trainer_image="osft-trainer:0.1.0")
JOB = ("osft.dev", "v1alpha1", "osftjobs")
CHILD = ("kubeflow.org", "v1", "pytorchjobs")


@kopf.on.startup()
async def startup(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    settings.posting.level = 20
    settings.persistence.finalizer = "osft.dev/peer"
    settings.execution.max_workers = 16
    memo.cluster = Cluster.connect()


@kopf.index(*CHILD)
async def children(namespace: str, body: kopf.Body, **_: Any) -> dict[Any, Any]:
    owners = body["metadata"].get("ownerReferences") or []
    return {(namespace, owner["name"]): body["metadata"]["name"] for owner in owners}


@kopf.on.create(*JOB)
@kopf.on.update(*JOB)
async def apply(
    body: kopf.Body,
    namespace: str,
    name: str,
    children: kopf.Index[Any, Any],
    patch: kopf.Patch,
    memo: kopf.Memo,
    **_: Any,
) -> None:
    """Make the claim and the PyTorchJob, unless they are there."""
    if (namespace, name) in children:
        return
    job = OSFTJob.model_validate(dict(body))
    resolved = resolve(job, SETTINGS)
    claim = render.checkpoint_claim(job, resolved)
    manifests = [(PYTORCHJOBS, render.pytorch_job(job, resolved))]
    manifests += [(CLAIMS, claim)] if claim is not None else []
    for kind, manifest in manifests:
        try:
            await memo.cluster.create(kind, namespace, manifest)
        except AlreadyExists:
            continue
    patch.status["phase"] = "Starting"
    kopf.event(body, type="Normal", reason="PyTorchJobCreated", message="made the PyTorchJob")


@kopf.on.event(*CHILD)
async def follow(event: Any, body: kopf.Body, namespace: str, memo: kopf.Memo, **_: Any) -> None:
    """Bring the child's state into the OSFTJob's status."""
    conditions = (body.get("status") or {}).get("conditions") or []
    true = {each["type"] for each in conditions if each["status"] == "True"}
    phase = next((each for each in ("Failed", "Succeeded", "Running") if each in true), None)
    owners = body["metadata"].get("ownerReferences") or []
    if event["type"] == "DELETED" or phase is None or not owners:
        return
    status = {"status": {"phase": phase}}
    await memo.cluster.patch(OSFTJOBS, namespace, owners[0]["name"], status, sub="status")
