"""Random OSFTJobs on a real API server: what is accepted can be run, what is refused names a field.

50 of them; with OSFT_SOAK set, 2,000. And whatever they are, a healthy one beside them starts.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.api import Api, ApiError, wait_for
from cluster.control_plane import ControlPlane
from drawn import SOAK
from job_samples import Object, job
from job_strategies import FIELDS, Path, jobs, statuses
from operator_thread import OperatorThread
from osft_operator.bounds import excess
from osft_operator.local_pods import pods
from osft_operator.policy import denials
from osft_operator.render import checkpoint_claim, pytorch_job, resolve
from osft_operator.resolved import RenderSettings
from osft_operator.resources import WHOLE_WORDS
from osft_operator.spec import OSFTJob, problems
from osft_trainer.arguments import from_argv

pytestmark = pytest.mark.cluster

EXAMPLES = 2000 if SOAK else 50
ACCEPTED_SHARE = 0.3
BESIDE = 400 if SOAK else 25
"""Random jobs beside a healthy one, and as many with a random status."""
USUAL_SECONDS = 5.0
"""So much later than alone a healthy job may start beside them, on a busy machine."""
DRY = "?dryRun=All&fieldValidation=Strict"
SETTINGS = RenderSettings(trainer_image="trainer:1")
COMMAND = ["python", "-m", "osft_trainer.launch"]


@pytest.mark.timeout(1800)
def test_random_jobs(
    control_plane: ControlPlane,
    namespace: str,
    record_property: Callable[[str, object], None],
) -> None:
    accepted = []
    for body, touched in _drawn(jobs(), EXAMPLES):
        accepted.append(_try(control_plane, namespace, body, touched))
    share = sum(accepted) / len(accepted)
    record_property("jobs", len(accepted))
    record_property("accepted_share", share)
    print(f"{len(accepted)} jobs, {share:.0%} accepted")
    assert share >= ACCEPTED_SHARE


def _drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """So many examples, the same each time."""
    found: list[Any] = []

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(example: Any) -> None:
        found.append(example)

    draw()
    return found


@pytest.mark.timeout(1800)
def test_a_healthy_job_starts_as_soon_as_ever_beside_random_ones(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the API server takes: no end, no wait, and a word for each author."""
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    path = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
    api = control_plane.api
    with OperatorThread(namespace, metrics_per_job=True) as operator:
        alone = _seconds_until_it_starts(control_plane, namespace, "alone")
        plain = _post(api, path, [body for body, _ in _drawn(jobs(), BESIDE)], "random")
        strange = _post(api, path, [job() for _ in range(BESIDE)], "strange")
        for name, status in zip(strange, _drawn(statuses(), BESIDE), strict=False):
            with contextlib.suppress(ApiError):
                api.patch(f"{path}/{name}/status", {"status": status})
        beside = _seconds_until_it_starts(control_plane, namespace, "beside")
        print(f"{alone:.1f} s alone, {beside:.1f} s beside {len(plain)} + {len(strange)}")
        assert beside < alone + USUAL_SECONDS
        for name in plain:
            told = wait_for(f"a word about {name}", lambda name=name: _accepted(api, path, name))
            assert told["reason"] != "InternalError", told
        assert operator.ends == []
        assert operator.problems() == []


def _post(api: Api, path: str, bodies: list[Object], prefix: str) -> list[str]:
    """Names of those that the API server takes."""
    taken = []
    for number, body in enumerate(bodies):
        metadata = {**body["metadata"], "name": f"{prefix}-{number}"}
        with contextlib.suppress(ApiError):
            api.post(path, {**body, "metadata": metadata})
            taken.append(metadata["name"])
    assert len(taken) >= ACCEPTED_SHARE * len(bodies)
    return taken


def _seconds_until_it_starts(plane: ControlPlane, namespace: str, name: str) -> float:
    began = time.monotonic()
    plane.api.post(f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs", job(name=name))
    path = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"

    def is_there() -> bool:
        return any(each["metadata"]["name"] == name for each in plane.api.get(path)["items"])

    wait_for(f"the PyTorchJob of {name}", is_there)
    return time.monotonic() - began


def _accepted(api: Api, path: str, name: str) -> Object | None:
    status = api.get(f"{path}/{name}").get("status") or {}
    found = [each for each in status.get("conditions") or [] if each["type"] == "Accepted"]
    return found[0] if found and found[0]["reason"] != "NotYet" else None


def _try(plane: ControlPlane, namespace: str, body: Object, touched: list[Path]) -> bool:
    """Whether it was accepted; either way it must be so for a reason."""
    told = problems(body)
    seen, refusal = _ask(plane, namespace, body)
    if refusal is not None:
        assert refusal.code in (400, 422), refusal.message
        told = told or [str(each) for each in denials(OSFTJob.model_validate(body))]
        assert told, f"only the server refuses: {refusal.message}\n{json.dumps(body)}"
        for line in [refusal.message, *told]:
            _names_a_field(line, touched)
        return False
    assert seen is not None
    if excess(body) is not None or all(map(_is_for_the_operator_to_see, told or [""])):
        for line in told:
            _names_a_field(line, touched)
        return False
    assert told == [], f"only the model refuses\n{json.dumps(body)}"
    seen["metadata"]["uid"] = "00000000-0000-4000-8000-000000000000"
    job = OSFTJob.model_validate(seen)
    if denied := denials(job):
        assert all(denial.field.startswith("spec.") for denial in denied)
        return False
    _can_be_run(plane, namespace, job)
    return True


def _ask(
    plane: ControlPlane, namespace: str, body: Object
) -> tuple[Object, None] | tuple[None, ApiError]:
    path = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs{DRY}"
    try:
        return plane.api.post(path, body), None
    except ApiError as error:
        return None, error


def _is_for_the_operator_to_see(line: str) -> bool:
    """Whether no rule of the definition could say it, or none that is cheap enough."""
    return line.startswith("spec.resources") and (WHOLE_WORDS in line or "a quantity" in line)


def _names_a_field(message: str, touched: list[Path]) -> None:
    names = {part for path, _ in FIELDS for part in path}
    assert any(name in message for name in names), message
    assert touched, f"the minimal job is refused: {message}"


def _can_be_run(plane: ControlPlane, namespace: str, job: OSFTJob) -> None:
    resolved = resolve(job, SETTINGS)
    manifest = pytorch_job(job, resolved, 1)
    claim = checkpoint_claim(job, resolved)
    manifest["metadata"].pop("ownerReferences")
    if claim is not None:
        claim["metadata"].pop("ownerReferences", None)
        kubernetes_validate.validate(claim, "1.30", strict=True)
        if "ReadWriteOncePod" not in claim["spec"]["accessModes"]:  # too new for the old server
            plane.api.post(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims{DRY}", claim)
        assert claim["metadata"]["name"] == "sample-checkpoints"
    path = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs{DRY}"
    plane.api.post(path, manifest)
    assert manifest["metadata"]["name"] == "sample"
    for pod in pods(manifest)[:2]:
        pod["metadata"].pop("ownerReferences")
        kubernetes_validate.validate(pod, "1.30", strict=True)
        _stays_inside(pod["spec"], job)


def _stays_inside(spec: Object, job: OSFTJob) -> None:
    """No shell, no path outside a volume, no object that the job does not name."""
    (trainer,) = (each for each in spec["containers"] if each["name"] == "pytorch")
    assert trainer["command"] == COMMAND
    read = from_argv([_as_kubernetes_reads(text) for text in trainer["args"]])
    assert read.training.model_dump() == job.spec.training.model_dump()
    assert read.run.attempt == 1
    assert read.run.run_id == job.metadata.uid
    for mount in trainer["volumeMounts"]:
        assert mount["mountPath"].startswith("/")
        assert ".." not in mount["mountPath"].split("/")
        inside = mount.get("subPath", "")
        assert not inside.startswith("/")
        assert ".." not in inside.split("/")
    own = {"sample-checkpoints"}
    asked = set(_texts(job.spec.model_dump(by_alias=True)))
    for volume in spec["volumes"]:
        assert "hostPath" not in volume
        names = {
            (volume.get("persistentVolumeClaim") or {}).get("claimName"),
            (volume.get("secret") or {}).get("secretName"),
            (volume.get("configMap") or {}).get("name"),
        }
        assert names - {None} <= own | asked
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True


def _as_kubernetes_reads(argument: str) -> str:
    """What the kubelet makes of an argument: `$$` is `$`, and `$(NAME)` would be a variable."""
    assert "$(" not in argument.replace("$$", ""), argument
    return argument.replace("$$", "$")


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []
