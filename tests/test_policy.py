"""What an OSFTJob may not ask for, by sample; and that nothing refused is ever rendered."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from drawn import examples
from job_samples import job
from osft_operator.names import QUEUE_LABEL, WORKLOAD_PRIORITY_LABEL
from osft_operator.policy import Allowed, Rule, denials
from osft_operator.render import RenderSettings, pytorch_job, resolve
from osft_operator.spec import OSFTJob
from world import World

POD = "spec.podTemplate.spec"


def _denied(changes: dict[str, Any], allowed: Allowed | None = None, **metadata: Any) -> list[str]:
    body = OSFTJob.model_validate(job(changes, **metadata))
    return [str(denial) for denial in denials(body, allowed)]


def _container(**fields: Any) -> dict[str, Any]:
    return {f"{POD}.containers": [{"name": "sidecar", "image": "x", **fields}]}


def _trainer(**fields: Any) -> dict[str, Any]:
    return {f"{POD}.containers": [{"name": "pytorch", **fields}]}


def _volume(**fields: Any) -> dict[str, Any]:
    return {f"{POD}.volumes": [{"name": "v", **fields}]}


def _mounted(path: str) -> dict[str, Any]:
    """A mount of the user's own volume in the trainer's container."""
    return _trainer(volumeMounts=[{"name": "v", "mountPath": path}])


DATA = {"spec.storage.mounts": [{"name": "data", "claimName": "d", "mountPath": "/data"}]}

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
    ({f"{POD}.priority": 1000}, "spec.priorityClassName"),
    ({f"{POD}.securityContext": {"runAsUser": 0}}, "runAsUser"),
    ({f"{POD}.securityContext": {"runAsNonRoot": False}}, "runAsNonRoot"),
    ({f"{POD}.securityContext": {"sysctls": []}}, "sysctls"),
    ({f"{POD}.securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile"),
    ({f"{POD}.securityContext": 3}, "securityContext"),
    (_container(securityContext={"privileged": True}), "containers[0].securityContext.privileged"),
    (_container(securityContext={"allowPrivilegeEscalation": True}), "allowPrivilegeEscalation"),
    (_container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}), "capabilities.add"),
    (_container(securityContext={"capabilities": {"add": ["IPC_LOCK"]}}), "rule Capability"),
    (_container(securityContext={"capabilities": {"add": "SYS_ADMIN"}}), "list of texts"),
    (_container(securityContext={"capabilities": []}), "capabilities: must be an object"),
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
    (_trainer(ports=[{"name": "metrics", "containerPort": 1}]), "ports[0]: metrics is the name"),
    (_trainer(ports=[{"name": "pytorchjob-port", "containerPort": 1}]), "rule ReservedName"),
    (_trainer(image="other"), "spec.image"),
    (_trainer(command=["sh"]), "containers[0].command"),
    (_trainer(args=[]), "containers[0].args"),
    (_trainer(env=[]), "spec.env"),
    (_trainer(resources={}), "spec.resources"),
    (_volume(hostPath={"path": "/"}), "volumes[0].hostPath"),
    (_volume(nfs={}), "volumes[0].nfs"),
    (_volume(projected={"sources": [{"serviceAccountToken": {}}]}), "projected"),
    (_volume(projected={"sources": [{"podCertificate": {}}]}), "projected"),
    (_container(livenessProbe={"httpGet": {"host": "169.254.169.254"}}), "another host"),
    (_container(readinessProbe={"tcpSocket": {"host": "db"}}), "readinessProbe.tcpSocket.host"),
    (_container(lifecycle={"preStop": {"httpGet": {"host": "db"}}}), "lifecycle.preStop"),
    (_mounted("/checkpoints"), "would hide /checkpoints"),
    (_mounted("/checkpoints/"), "would hide /checkpoints"),
    (_mounted("checkpoints"), "would hide /checkpoints"),
    (_mounted("/x/..//checkpoints/."), "would hide /checkpoints"),
    (_mounted("/checkpoints/sample"), "spec.storage.checkpoints"),
    (_mounted("/"), "would hide /checkpoints"),
    (_mounted("/cache"), "spec.storage.cache"),
    (_mounted("/dev"), "would hide /dev/shm"),
    (_mounted("/dev/termination-log"), "rule ReservedMount"),
    (_mounted("/data") | DATA, "would hide /data of the trainer: use spec.storage.mounts"),
    ({f"{POD}.volumes": [{"name": "data", "emptyDir": {}}]} | DATA, "spec.storage.mounts"),
    ({"spec.envFrom": [{"prefix": "PET_", "configMapRef": {"name": "c"}}]}, "ReservedVariable"),
    ({f"{POD}.volumes": [{"name": "checkpoints", "emptyDir": {}}]}, "volumes[0]"),
    ({f"{POD}.containers": [1]}, "must be a list of objects"),
    ({f"{POD}.volumes": "x"}, "must be a list of objects"),
    ({f"{POD}.containers": [{"name": []}]}, "containers[0].name: must be a string"),
    (_container(env=[{"name": {}}]), "env[0].name: must be a string"),
    (_container(volumeMounts=[{"mountPath": 1}]), "volumeMounts[0].mountPath: must be a string"),
    ({"spec.podTemplate.metadata": {"labels": {"osft.dev/job": "other"}}}, "osft.dev/job"),
    ({"spec.podTemplate.metadata": {"labels": {"training.kubeflow.org/job-role": "x"}}}, "belongs"),
    ({"spec.podTemplate.metadata": {"labels": {"app.kubernetes.io/name": "x"}}}, "belongs"),
    ({"spec.podTemplate.metadata": {"labels": {QUEUE_LABEL: "q"}}}, "use spec.queueName"),
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
    assert all(re.search(r"\(rule [A-Z]\w+\)$", line) for line in found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {f"{POD}.nodeSelector": {"gpu": "h200"}, f"{POD}.tolerations": [{"operator": "Exists"}]},
        {f"{POD}.affinity": {}, f"{POD}.runtimeClassName": "nvidia"},
        _container(securityContext={"readOnlyRootFilesystem": True}),
        _container(securityContext={"capabilities": {"drop": ["ALL"]}}),
        _mounted("/v"),
        _trainer(ports=[{"name": "mine", "containerPort": 1}]),
        _container(ports=[{"name": "metrics", "containerPort": 1}]),
        _mounted("/cache/configuration"),
        _mounted("/tmp/more"),
        _container(volumeMounts=[{"name": "v", "mountPath": "/checkpoints"}]),
        _container(livenessProbe={"httpGet": {"port": 1}}, lifecycle={"postStart": {"exec": {}}}),
        _volume(ephemeral={}),
        {"spec.podTemplate.metadata": {"labels": {"team": "a"}, "annotations": {"b": "c"}}},
        {"spec.env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "HF_TOKEN"}]},
    ],
)
def test_allowed(changes: dict[str, Any]) -> None:
    assert _denied(changes) == []


TERM = {
    "nodeSelectorTerms": [
        {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h200", "b200"]}]}
    ]
}
AFFINITY = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": TERM}}
ANY_GPU = [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
PREFERRED = [{"weight": 1, "preference": ANY_GPU[0]}]
BY_NAME = [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}]


def _node(required: list[Any]) -> dict[str, Any]:
    terms = {"nodeSelectorTerms": required}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


LISTS: list[tuple[str, tuple[str, ...], dict[str, Any], Rule]] = [
    ("images", ("here/*",), {"spec.image": "there/x:1"}, Rule.IMAGE),
    ("images", ("here/*",), {f"{POD}.containers": [{"name": "s", "image": "x"}]}, Rule.IMAGE),
    ("images", ("here/*",), {f"{POD}.initContainers": [{"name": "s", "image": "x"}]}, Rule.IMAGE),
    # the whole text counts, and `.` is a dot
    ("images", ("here.x/*",), {"spec.image": "evil/here.x/a"}, Rule.IMAGE),
    ("images", ("here.x/*",), {"spec.image": "herezx/a"}, Rule.IMAGE),
    ("images", ("here/a:1",), {"spec.image": "here/a:12"}, Rule.IMAGE),
    ("images", (), {"spec.image": "x"}, Rule.IMAGE),
    ("service_accounts", ("train-*",), {f"{POD}.serviceAccountName": "a"}, Rule.SERVICE_ACCOUNT),
    ("node_selectors", ("gpu=h200",), {f"{POD}.nodeSelector": {"gpu": "b"}}, Rule.NODE_SELECTOR),
    ("node_selectors", ("gpu=h200",), {f"{POD}.nodeSelector": {"x": "h200"}}, Rule.NODE_SELECTOR),
    ("node_selectors", ("gpu=h200",), {f"{POD}.affinity": AFFINITY}, Rule.NODE_SELECTOR),
    ("node_selectors", ("gpu=h200",), {f"{POD}.affinity": _node(ANY_GPU)}, Rule.NODE_SELECTOR),
    ("node_selectors", ("gpu",), {f"{POD}.affinity": _node(BY_NAME)}, Rule.NODE_SELECTOR),
    (
        "node_selectors",
        ("gpu=h200",),
        {
            f"{POD}.affinity": {
                "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": PREFERRED}
            }
        },
        Rule.NODE_SELECTOR,
    ),
    ("priority_classes", ("low",), {"spec.priorityClassName": "high"}, Rule.PRIORITY_CLASS),
    (
        "priority_classes",
        ("low",),
        {"spec.workloadPriorityClassName": "high", "spec.queueName": "q"},
        Rule.PRIORITY_CLASS,
    ),
    (
        "priority_classes",
        ("low",),
        {"metadata.labels": {WORKLOAD_PRIORITY_LABEL: "high"}},
        Rule.PRIORITY_CLASS,
    ),
    (
        "capabilities",
        ("IPC_LOCK",),
        _container(securityContext={"capabilities": {"add": ["IPC_LOCK", "SYS_ADMIN"]}}),
        Rule.CAPABILITY,
    ),
]


@pytest.mark.parametrize(("name", "patterns", "changes", "rule"), LISTS)
def test_what_is_not_listed_is_refused_by_its_rule(
    name: str, patterns: tuple[str, ...], changes: dict[str, Any], rule: Rule
) -> None:
    allowed = Allowed.model_validate({f"allowed_{name}": patterns})
    found = denials(OSFTJob.model_validate(job(changes)), allowed)
    assert {denial.rule for denial in found} == {rule}
    assert len(found) == 1, found
    assert "allowed are: " in found[0].message
    everything = Allowed.model_validate({f"allowed_{name}": ("*",)})
    assert denials(OSFTJob.model_validate(job(changes)), everything) == []


@pytest.mark.parametrize(
    ("name", "patterns", "changes"),
    [
        ("images", ("here/*", "a:1"), {"spec.image": "here/b/c@sha256:0"}),
        ("images", (), {}),
        ("service_accounts", ("train-*",), {f"{POD}.serviceAccountName": "train-a"}),
        ("node_selectors", ("gpu=*200",), {f"{POD}.affinity": AFFINITY}),
        ("node_selectors", ("gpu",), {f"{POD}.affinity": _node(ANY_GPU)}),
        ("node_selectors", ("gpu=*",), {f"{POD}.affinity": _node(ANY_GPU)}),
        ("node_selectors", ("gpu=*",), {f"{POD}.nodeSelector": {"gpu": "b"}}),
        ("node_selectors", ("g",), {f"{POD}.affinity": {"podAffinity": {}}}),
        ("priority_classes", ("low",), {"spec.priorityClassName": "low"}),
        (
            "capabilities",
            ("IPC_LOCK",),
            _container(securityContext={"capabilities": {"add": ["IPC_LOCK"]}}),
        ),
    ],
)
def test_what_is_listed_is_allowed(
    name: str, patterns: tuple[str, ...], changes: dict[str, Any]
) -> None:
    assert _denied(changes, Allowed.model_validate({f"allowed_{name}": patterns})) == []


def test_an_allowed_capability_reaches_the_pod_and_all_others_are_dropped() -> None:
    changes = _trainer(securityContext={"capabilities": {"add": ["IPC_LOCK"]}})
    body = OSFTJob.model_validate(job(changes))
    manifest = pytorch_job(body, resolve(body, RenderSettings(trainer_image="t")))
    master = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    context = master["containers"][0]["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert context["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("kind", ["containers", "initContainers"])
def test_the_administrators_own_trainer_may_be_named_without_being_listed(kind: str) -> None:
    allowed = Allowed(trainer_image="here/trainer:2", allowed_images=("there/*",))
    assert _denied({"spec.image": "here/trainer:2"}, allowed) == []
    assert _denied({f"{POD}.{kind}": [{"name": "s", "image": "here/trainer:2"}]}, allowed) == []
    # only that very image, not another tag or digest of it
    for image in ("here/trainer:3", "here/trainer", "x/here/trainer:2", "here/trainer:2@sha256:0"):
        (line,) = _denied({"spec.image": image}, allowed)
        assert line.startswith(f"spec.image: {image} is not allowed here; allowed are: there/*")


def test_the_list_of_images_and_the_trainers_own_reach_the_judgement() -> None:
    world = World({"spec.image": "here/trainer:2"})
    update = {"allowed_images": (), "trainer_image": "here/trainer:1"}
    world.settings = world.settings.model_copy(update=update)
    world.settle()
    assert world.condition("Accepted")["reason"] == "Denied"
    world.settings = world.settings.model_copy(update={"trainer_image": "here/trainer:2"})
    world.settle()
    assert list(world.jobs) == ["sample"]


def test_a_rule_made_later_leaves_a_running_job_alone_and_holds_its_next_attempt() -> None:
    world = World({"spec.image": "there/x:1"})
    world.settle()
    world.run_pods()
    world.settle()
    world.settings = world.settings.model_copy(update={"allowed_images": ("here/*",)})
    world.settle()
    assert world.status["phase"] == "Running"
    world.tell("sample", "Failed")
    world.pods = []
    world.settle()
    assert not world.jobs, "no pod with a refused image"
    accepted = world.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "Denied")
    assert accepted["message"] == (
        "spec.image: there/x:1 is not allowed here; allowed are: here/* (rule Image)"
    )
    world.settings = world.settings.model_copy(update={"allowed_images": ("*",)})
    world.settle()
    assert list(world.jobs) == ["sample-a2"]


def test_a_template_edited_while_the_job_runs_is_judged_before_the_next_attempt() -> None:
    world = World()
    world.settle()
    world.run_pods()
    world.edit(podTemplate={"spec": {"hostNetwork": True}})
    world.settle()
    assert world.status["phase"] == "Running"
    world.tell("sample", "Failed")
    world.pods = []
    world.settle()
    assert not world.jobs
    assert "rule HostAccess" in world.condition("Accepted")["message"]


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
        "lifecycle",
        "affinity",
        "nodeAffinity",
        "matchExpressions",
        "nodeSelector",
        "x",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=examples(300), deadline=None, phases=[Phase.generate])
@given(spec=st.dictionaries(KEY, JSON, max_size=4))
def test_no_pod_template_breaks_the_operator(spec: dict[str, Any]) -> None:
    body = OSFTJob.model_validate(job({POD: spec}))
    denials(body, Allowed(allowed_node_selectors=("a",), allowed_images=()))
    if not denials(body):
        pytorch_job(body, resolve(body, RenderSettings(trainer_image="t")))
