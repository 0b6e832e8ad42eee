"""What is rendered: pinned by golden files, accepted by strict schemas, right in its details.

`OSFT_WRITE_GOLDEN=1 pytest tests/test_render.py` writes the golden files anew; read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from job_samples import Object, job
from osft_operator.local_pods import pods as expand
from osft_operator.pod_merge import merge
from osft_operator.policy import denials
from osft_operator.render import RenderSettings, checkpoint_claim, pytorch_job, resolve
from osft_operator.spec import OSFTJob, problems
from osft_trainer.arguments import from_argv

HERE = Path(__file__).parent
EXAMPLES = sorted((HERE.parent / "examples").glob("*.yaml"))
SETTINGS = RenderSettings(trainer_image="osft-trainer:test")
OPENSHIFT = RenderSettings(
    trainer_image="osft-trainer:test",
    pytorch_job_shape="worker-only",
    run_as_user=None,
    run_as_group=None,
    fs_group=None,
)


def render(body: Object, attempt: int = 1, settings: RenderSettings = SETTINGS) -> list[Object]:
    typed = OSFTJob.model_validate(body)
    resolved = resolve(typed, settings)
    found = [checkpoint_claim(typed, resolved), pytorch_job(typed, resolved, attempt)]
    return [each for each in found if each is not None]


def trainer(body: Object, settings: RenderSettings = SETTINGS, **changes: Any) -> Object:
    replicas = render(body, settings=settings)[-1]["spec"]["pytorchReplicaSpecs"]
    kind = "Master" if "Master" in replicas else "Worker"
    spec: Object = replicas[kind]["template"]["spec"]
    return spec


def variables(spec: Object) -> dict[str, Any]:
    env = spec["containers"][0]["env"]
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in env}


CASES = {
    **{
        path.stem: ({**yaml.safe_load(path.read_text())}, 1, SETTINGS)
        for path in EXAMPLES
        if path.stem in ("minimal", "distributed", "c10d", "kueue")
    },
    "distributed-worker-only": (
        yaml.safe_load((HERE.parent / "examples/distributed.yaml").read_text()),
        3,
        OPENSHIFT,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    body, attempt, settings = CASES[name]
    body["metadata"] |= {"uid": "00000000-0000-4000-8000-000000000000", "namespace": "team"}
    text = yaml.safe_dump_all(render(body, attempt, settings), sort_keys=False, width=100)
    path = HERE / "golden" / f"{name}.yaml"
    if os.environ.get("OSFT_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path) -> None:
    for body in yaml.safe_load_all(path.read_text()):
        if body["kind"] != "OSFTJob":
            continue
        assert problems(body) == []
        assert denials(OSFTJob.model_validate(body)) == []


@pytest.mark.parametrize("name", CASES)
def test_pods_and_claims_are_strictly_valid(name: str) -> None:
    body, attempt, settings = CASES[name]
    for manifest in render(body, attempt, settings):
        if manifest["kind"] == "PersistentVolumeClaim":
            kubernetes_validate.validate(manifest, "1.30", strict=True)
            continue
        for pod in expand(manifest):
            pod["metadata"].pop("ownerReferences")
            kubernetes_validate.validate(pod, "1.30", strict=True)


def test_the_trainer_reads_the_arguments_back() -> None:
    body = job(
        {"spec.training.targetPatterns": ["q_proj$", "a|b"], "spec.training.useLiger": False}
    )
    spec = trainer({**body, "metadata": {"name": "sample", "uid": "u-1"}})
    container = spec["containers"][0]
    assert container["command"] == ["python", "-m", "osft_trainer.launch"]
    read = from_argv(container["args"])
    assert read.training.target_patterns == ["q_proj$", "a|b"]
    assert read.training.learning_rate == 5e-6
    assert read.training.use_liger is False
    assert (read.run.run_id, read.run.attempt) == ("u-1", 1)
    assert read.launch.metrics_port == 28080


def test_kubernetes_reads_no_variable_into_an_argument() -> None:
    args = trainer(job({"spec.training.dataPath": "/data/$(HF_TOKEN)$"}))["containers"][0]["args"]
    assert "--data-path=/data/$$(HF_TOKEN)$$" in args


def test_the_pod_is_restricted() -> None:
    spec = trainer(job({"spec.podTemplate.spec": {"containers": [{"name": "side", "image": "x"}]}}))
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_platform_may_choose_the_user() -> None:
    context = trainer(job(), OPENSHIFT)["securityContext"]
    assert context == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_variables() -> None:
    body = job(
        {
            "spec.env": [{"name": "HF_HOME", "value": "/mine"}, {"name": "A", "value": "b"}],
            "spec.secrets": {"hfToken": {"name": "hub", "key": "token"}},
            "spec.terminationGracePeriodSeconds": 120,
            "spec.nprocPerNode": 2,
            "spec.resources": {"limits": {"cpu": 9}},
        }
    )
    found = variables(trainer(body))
    assert found["HF_HOME"] == "/mine"
    assert found["A"] == "b"
    assert found["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert found["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"
    assert found["OMP_NUM_THREADS"] == "4"
    assert found["OSFT_POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert found["OSFT_TERMINATION_LOG"] == "/dev/termination-log"
    assert found["TRITON_CACHE_DIR"] == "/cache/triton"


def test_processes_follow_the_gpus() -> None:
    body = job({"spec.resources": {"limits": {"nvidia.com/gpu": "8"}}})
    assert render(body)[-1]["spec"]["nprocPerNode"] == "8"
    body["spec"]["nprocPerNode"] = 2
    assert render(body)[-1]["spec"]["nprocPerNode"] == "2"


@pytest.mark.parametrize(
    ("nodes", "replicas"), [(1, {"Master": 1}), (3, {"Master": 1, "Worker": 2})]
)
def test_static_replicas(nodes: int, replicas: dict[str, int]) -> None:
    spec = render(job({"spec.nnodes": nodes}))[-1]["spec"]
    found = {kind: replica["replicas"] for kind, replica in spec["pytorchReplicaSpecs"].items()}
    assert found == replicas
    assert "elasticPolicy" not in spec


def test_each_pod_of_worker_only_finds_its_place() -> None:
    manifest = render(job({"spec.nnodes": 2}), settings=OPENSHIFT)[-1]
    pods = expand(manifest)
    assert [pod["metadata"]["name"] for pod in pods] == ["sample-worker-0", "sample-worker-1"]
    assert all("initContainers" not in pod["spec"] for pod in pods)
    found = variables(pods[1]["spec"])
    assert found["PET_MASTER_ADDR"] == "sample-worker-0"
    assert "replica-index" in found["PET_NODE_RANK"]["fieldRef"]["fieldPath"]
    assert found["PET_NNODES"] == "2"


def test_c10d_has_its_own_identity_and_size() -> None:
    body = job({"spec.nnodes": 2, "spec.rendezvous": {"backend": "c10d"}}, uid="u-1")
    found = variables(expand(render(body, attempt=2)[-1])[0]["spec"])
    assert found["PET_RDZV_ENDPOINT"] == "sample-a2-worker-0:23456"
    assert found["PET_NNODES"] == "2:2"
    assert found["PET_RDZV_ID"] == "u-1"


def test_the_longest_names_fit() -> None:
    body = job({"spec.nnodes": 1000}, name="a" * 46)
    assert max(len(pod["metadata"]["name"]) for pod in expand(render(body, 9999)[-1])) <= 63


def test_a_claim_is_kept_unless_asked_otherwise() -> None:
    claim = render(job())[0]
    assert "ownerReferences" not in claim["metadata"]
    assert claim["metadata"]["labels"]["osft.dev/job"] == "sample"
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    claim = render(job({"spec.storage.checkpoints.retain": False, "spec.nnodes": 2}, uid="u"))[0]
    assert claim["metadata"]["ownerReferences"][0]["uid"] == "u"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_retried_render_is_the_same() -> None:
    body = job({"spec.nnodes": 2})
    assert render(body) == render(body)


def test_merging_goes_by_names() -> None:
    base = {
        "containers": [{"name": "a", "env": [{"name": "X", "value": "1"}]}],
        "tolerations": [{"key": "a"}],
        "nodeSelector": {"a": "1"},
    }
    over = {
        "containers": [
            {"name": "a", "env": [{"name": "X", "value": "2"}, {"name": "Y"}]},
            {"name": "b"},
        ],
        "tolerations": [{"key": "b"}],
        "nodeSelector": {"b": "2"},
        "affinity": None,
    }
    assert merge(base, over) == {
        "containers": [
            {"name": "a", "env": [{"name": "X", "value": "2"}, {"name": "Y"}]},
            {"name": "b"},
        ],
        "tolerations": [{"key": "a"}, {"key": "b"}],
        "nodeSelector": {"a": "1", "b": "2"},
    }


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, ("false", "false", "disabled")),
        ({"annotations": {"linkerd.io/inject": "enabled"}}, ("false", "false", "enabled")),
        ({"labels": {"sidecar.istio.io/inject": "true"}}, ("true", "false", "disabled")),
    ],
)
def test_meshes_are_told_not_to_inject_unless_the_job_says_so(
    given: Object, seen: tuple[str, str, str]
) -> None:
    body = job({"spec.podTemplate": {"metadata": given}})
    assert problems(body) == []
    assert denials(OSFTJob.model_validate(body)) == []
    replicas = render(body)[-1]["spec"]["pytorchReplicaSpecs"]
    metadata = replicas["Master"]["template"]["metadata"]
    istio, linkerd = "sidecar.istio.io/inject", "linkerd.io/inject"
    found = (metadata["labels"][istio], metadata["annotations"][istio])
    assert (*found, metadata["annotations"][linkerd]) == seen
