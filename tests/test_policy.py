"""What an OSFTJob may not ask for, by sample; and that nothing refused is ever rendered."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from job_samples import job
from osft_operator.names import QUEUE_LABEL
from osft_operator.policy import denials
from osft_operator.render import RenderSettings, pytorch_job, resolve
from osft_operator.spec import OSFTJob

POD = "spec.podTemplate.spec"


def _denied(changes: dict[str, Any], **metadata: Any) -> list[str]:
    return [str(denial) for denial in denials(OSFTJob.model_validate(job(changes, **metadata)))]


def _container(**fields: Any) -> dict[str, Any]:
    return {f"{POD}.containers": [{"name": "sidecar", "image": "x", **fields}]}


def _trainer(**fields: Any) -> dict[str, Any]:
    return {f"{POD}.containers": [{"name": "pytorch", **fields}]}


def _volume(**fields: Any) -> dict[str, Any]:
    return {f"{POD}.volumes": [{"name": "v", **fields}]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({f"{POD}.{key}": value}, f"{POD}.{key}")
        for key, value in {
            "hostNetwork": True,
            "hostPID": True,
            "hostIPC": True,
            "hostUsers": False,
            "serviceAccountName": "admin",
            "serviceAccount": "admin",
            "automountServiceAccountToken": True,
            "nodeName": "n",
            "restartPolicy": "Always",
            "hostname": "h",
            "subdomain": "s",
            "priorityClassName": "p",
            "schedulerName": "s",
            "terminationGracePeriodSeconds": 1,
            "activeDeadlineSeconds": 1,
            "imagePullSecrets": [],
        }.items()
    ),
    ({f"{POD}.securityContext": {"runAsUser": 0}}, "runAsUser"),
    ({f"{POD}.securityContext": {"runAsNonRoot": False}}, "runAsNonRoot"),
    ({f"{POD}.securityContext": {"sysctls": []}}, "sysctls"),
    ({f"{POD}.securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile"),
    ({f"{POD}.securityContext": 3}, "securityContext"),
    (_container(securityContext={"privileged": True}), "containers[0].securityContext.privileged"),
    (_container(securityContext={"allowPrivilegeEscalation": True}), "allowPrivilegeEscalation"),
    (_container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "capabilities.add"),
    (_container(securityContext={"capabilities": {"drop": []}}), "capabilities.drop"),
    (_trainer(securityContext={"capabilities": {"drop": ["NET_RAW"]}}), "capabilities.drop"),
    (_container(securityContext={"procMount": "Unmasked"}), "procMount"),
    (_container(ports=[{"name": "a", "containerPort": 1, "hostPort": 1}]), "hostPort"),
    (_container(ports=[{"containerPort": 1}]), "ports[0]"),
    (
        _container(volumeMounts=[{"mountPath": "/a", "mountPropagation": "Bidirectional"}]),
        "mountPropagation",
    ),
    (
        {f"{POD}.initContainers": [{"name": "i", "securityContext": {"privileged": True}}]},
        "initContainers[0].securityContext.privileged",
    ),
    ({f"{POD}.initContainers": [{"name": "pytorch"}]}, "initContainers[0]"),
    (_trainer(image="other"), "spec.image"),
    (_trainer(command=["sh"]), "containers[0].command"),
    (_trainer(args=[]), "containers[0].args"),
    (_trainer(env=[]), "spec.env"),
    (_trainer(resources={}), "spec.resources"),
    (_volume(hostPath={"path": "/"}), "volumes[0].hostPath"),
    (_volume(nfs={}), "volumes[0].nfs"),
    (_volume(projected={"sources": [{"serviceAccountToken": {}}]}), "projected"),
    (_volume(projected={"sources": [{"podCertificate": {}}]}), "projected"),
    ({f"{POD}.volumes": [{"name": "checkpoints", "emptyDir": {}}]}, "volumes[0]"),
    ({f"{POD}.containers": [1]}, "must be a list of objects"),
    ({f"{POD}.volumes": "x"}, "must be a list of objects"),
    ({"spec.podTemplate.metadata": {"labels": {"osft.dev/job": "other"}}}, "osft.dev/job"),
    ({"spec.podTemplate.metadata": {"labels": {"training.kubeflow.org/job-role": "x"}}}, "belongs"),
    ({"spec.podTemplate.metadata": {"labels": {"a": 1}}}, "quotes"),
    ({"spec.podTemplate.metadata": {"name": "x"}}, "metadata.name"),
    ({"spec.env": [{"name": "A"}, {"name": "A"}]}, "spec.env[1].name: A is given twice"),
    (
        {
            "spec.env": [{"name": "HF_TOKEN", "value": "x"}],
            "spec.secrets": {"hfToken": {"name": "s", "key": "k"}},
        },
        "spec.secrets.hfToken",
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(changes: dict[str, Any], words: str) -> None:
    found = _denied(changes)
    assert len(found) >= 1
    assert any(words in line for line in found), found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {f"{POD}.nodeSelector": {"gpu": "h200"}, f"{POD}.tolerations": [{"operator": "Exists"}]},
        {f"{POD}.affinity": {}, f"{POD}.runtimeClassName": "nvidia"},
        _container(securityContext={"readOnlyRootFilesystem": True}),
        _container(securityContext={"capabilities": {"drop": ["ALL"]}}),
        _trainer(volumeMounts=[{"name": "v", "mountPath": "/v"}]),
        _volume(ephemeral={}),
        {"spec.podTemplate.metadata": {"labels": {"team": "a"}, "annotations": {"b": "c"}}},
        {"spec.env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "HF_TOKEN"}]},
    ],
)
def test_allowed(changes: dict[str, Any]) -> None:
    assert _denied(changes) == []


def test_two_queues_are_refused() -> None:
    labels = {QUEUE_LABEL: "a"}
    assert _denied({"spec.queueName": "a"}, labels=labels) == []
    assert "keep one" in _denied({"spec.queueName": "b"}, labels=labels)[0]


KEY = st.sampled_from(
    [
        "name",
        "containers",
        "volumes",
        "env",
        "ports",
        "securityContext",
        "volumeMounts",
        "projected",
        "sources",
        "capabilities",
        "add",
        "tolerations",
        "mountPath",
        "x",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, phases=[Phase.generate])
@given(spec=st.dictionaries(KEY, JSON, max_size=4))
def test_no_pod_template_breaks_the_operator(spec: dict[str, Any]) -> None:
    body = OSFTJob.model_validate(job({POD: spec}))
    if not denials(body):
        pytorch_job(body, resolve(body, RenderSettings(trainer_image="t")))
