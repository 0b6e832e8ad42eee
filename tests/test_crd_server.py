"""The CRD on a real API server: every rule with an accepted and a refused sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.api import ApiError
from cluster.control_plane import ControlPlane
from job_samples import Object, Sample, job
from osft_operator.crd_rules import RULES as CEL
from osft_operator.spec import problems
from osft_trainer.report import Progress
from rule_samples import RULES, SCHEMA
from world import World

pytestmark = pytest.mark.cluster

DRY = "?dryRun=All&fieldValidation=Strict"


@pytest.fixture(scope="module")
def jobs_path(control_plane: ControlPlane) -> Iterator[str]:
    control_plane.create_namespace("crd-rules")
    yield "/apis/osft.dev/v1alpha1/namespaces/crd-rules/osftjobs"
    control_plane.delete_namespace("crd-rules")


@pytest.mark.parametrize("sample", [*RULES, *SCHEMA], ids=lambda sample: sample.name)
def test_each_rule_accepts_and_refuses(
    sample: Sample, control_plane: ControlPlane, jobs_path: str
) -> None:
    control_plane.api.post(jobs_path + DRY, job(sample.good))
    with pytest.raises(ApiError) as refusal:
        control_plane.api.post(jobs_path + DRY, job(sample.bad))
    assert refusal.value.code in (400, 422)
    assert sample.field in refusal.value.message
    assert sample.words in refusal.value.message


def test_each_rule_has_a_refused_sample(control_plane: ControlPlane, jobs_path: str) -> None:
    said = ""
    for sample in RULES:
        with pytest.raises(ApiError) as refusal:
            control_plane.api.post(jobs_path + DRY, job(sample.bad))
        said += json.dumps(refusal.value.body["details"]["causes"])
    missing = [rule.message for rule in CEL if json.dumps(rule.message)[1:-1] not in said]
    assert missing == []


WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2007\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_WHITE = "\x00\x1b\x1c\x1f\x84\u180e\u200b\u2060\ufeff\U0001f600a"


@pytest.mark.parametrize("character", WHITE + NOT_WHITE, ids=lambda text: f"U+{ord(text):04X}")
def test_server_and_model_mean_the_same_by_white_space(
    character: str, control_plane: ControlPlane, jobs_path: str
) -> None:
    c, accepted = character, {}
    texts = [c, f"{c}x", f"x{c}", f"x{c}x"]
    paths = [f"/{c}", f"/{c}x", f"/x{c}", f"{c}/x", f"/x/{c}"]
    for field, values in (("training.modelPath", texts), ("storage.checkpoints.mountPath", paths)):
        for value in values:
            body = job({f"spec.{field}": value})
            refusal = _refusal(control_plane, jobs_path, body)
            assert (refusal == "") == (problems(body) == []), (value, refusal)
            accepted[value] = refusal == ""
    inside = {f"x{c}x", f"/{c}x"}
    assert {value for value, is_so in accepted.items() if not is_so} == (
        {*texts, *paths} - inside if c in WHITE else {f"{c}/x"}
    )


def _refusal(plane: ControlPlane, path: str, body: Object) -> str:
    """The server's words; empty when it accepts."""
    try:
        plane.api.post(path + DRY, body)
    except ApiError as error:
        return error.message
    return ""


DATA: Object = {"name": "data", "claimName": "data", "mountPath": "/data"}
MODELS: Object = {"name": "models", "claimName": "models", "mountPath": "/models"}
FIXED: list[tuple[str, Any]] = [
    ("spec.training.learningRate", 1e-5),
    ("spec.training.lrSchedulerKwargs", {"num_cycles": 2}),
    ("spec.training.targetPatterns", ["mlp"]),
    ("spec.nnodes", 2),
    ("spec.nprocPerNode", 4),
    ("spec.rendezvous.timeoutSeconds", 60),
    ("spec.image", "other:1"),
    ("spec.storage.checkpoints.size", "20Gi"),
    ("spec.storage.cache.sizeLimit", "1Gi"),
    ("spec.storage.mounts", []),
    ("spec.storage.mounts", [DATA, MODELS | {"readOnly": False}]),
    ("spec.storage.mounts", [DATA, MODELS | {"subPath": "b"}]),
    ("spec.storage.mounts", [DATA, MODELS | {"claimName": "others"}]),
    ("spec.storage.mounts", [DATA, DATA | {"name": "more", "mountPath": "/more"}]),
    ("spec.onExistingRun", "restart"),
]
FREE: list[tuple[str, Any]] = [
    ("spec.suspend", True),
    ("spec.storage.mounts", [MODELS, DATA]),
    ("spec.storage.mounts", [MODELS, DATA | {"readOnly": True}]),
    ("spec.maxRestarts", 7),
    ("spec.resources", {"limits": {"memory": "2Gi"}}),
    ("spec.ttlSecondsAfterFinished", 60),
    ("spec.stall", {"timeoutSeconds": 600, "action": "Restart"}),
    ("spec.podTemplate", {"spec": {"nodeSelector": {"a": "b"}}}),
]


def test_what_defines_the_training_is_fixed_from_the_start(
    control_plane: ControlPlane, jobs_path: str
) -> None:
    api = control_plane.api
    mounts = [DATA, MODELS | {"readOnly": True}]
    api.post(jobs_path, job({"spec.storage.mounts": mounts}, name="fixed"))
    path = f"{jobs_path}/fixed"
    api.patch(path, _patch("spec.training.learningRate", 2e-5))
    api.patch(f"{path}/status", {"status": {"startTime": "2026-01-01T00:00:00Z"}})
    for field, value in FIXED:
        with pytest.raises(ApiError) as refusal:
            api.patch(path, _patch(field, value))
        assert "fixed once the run has started" in refusal.value.message, field
    for field, value in FREE:
        api.patch(path, _patch(field, value))
    api.patch(f"{path}/status", {"status": {"phase": "Running", "reason": "PodsRunning"}})


def test_kubectl_reads_small_numbers_and_shows_columns(
    control_plane: ControlPlane, jobs_path: str
) -> None:
    text = yaml.safe_dump(job(name="columns")).replace("5.0e-06", "5e-6")
    assert "learningRate: 5e-6" in text
    control_plane.kubectl("apply", "-n", "crd-rules", "-f", "-", input=text)
    made = control_plane.api.get(f"{jobs_path}/columns")
    assert made["spec"]["training"]["learningRate"] == 5e-6
    assert made["spec"]["rendezvous"]["port"] == 23456, "defaults are visible"
    status = {
        "phase": "Running",
        "progress": {
            "summary": "42% 840/2000",
            "loss": 1.235,
            "eta": "3h25m",
            "step": 840,
            "progressPercentage": 42,
        },
        "restarts": 1,
    }
    control_plane.api.patch(f"{jobs_path}/columns/status", {"status": status})
    shown = control_plane.kubectl("get", "osft", "columns", "-n", "crd-rules")
    assert "NAME      PHASE     PROGRESS       LOSS    ETA     NODES   RESTARTS" in shown
    assert "Running   42% 840/2000   1.235   3h25m   1       1" in shown
    selected = control_plane.kubectl(
        "get",
        "osftjobs",
        "-n",
        "crd-rules",
        "--field-selector",
        "status.phase=Running",
        "-o",
        "name",
    )
    assert "osftjob.osft.dev/columns" in selected


def test_a_status_as_the_operator_writes_it_is_accepted(
    control_plane: ControlPlane, jobs_path: str
) -> None:
    world = World()
    world.settle()
    world.run_pods()
    world.end(75, "boom")
    world.progress = Progress(run_id="uid-1", step=3, total_steps=9, loss=0.5)
    world.settle()
    control_plane.api.post(jobs_path, job(name="status"))
    strict = f"{jobs_path}/status/status?fieldValidation=Strict"
    made = control_plane.api.patch(strict, {"status": world.status})
    assert made["status"] == world.status


def _patch(path: str, value: Any) -> Object:
    result = value
    for part in reversed(path.split(".")):
        result = {part: result}
    return dict(result)
