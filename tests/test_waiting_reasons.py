"""Why a job waits, in words: one row for each reason that people meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from job_samples import Object
from osft_operator.observed import Said, text_of
from world import START, World


@dataclass(frozen=True)
class Waits:
    """A pod that does not start, and what the status says of it."""

    name: str
    pod: dict[str, Any]
    """Changes to the pod's status."""
    reason: str
    words: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    """Changes to the job."""
    claim: str = "Bound"
    """Phase of the claim."""
    event: str = ""
    """Newest event about the pod."""
    claim_event: str = ""


def container(reason: str, message: str = "", kind: str = "containerStatuses") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {kind: [{"name": "pytorch", "restartCount": 0, "state": state}]}


def init(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    pytorch = container("PodInitializing")
    return {
        **pytorch,
        "initContainerStatuses": [
            {"name": "init-pytorch", "restartCount": 0, "state": state, **more},
        ],
    }


def unscheduled(message: str) -> dict[str, Any]:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }
    return {"containerStatuses": [], "conditions": [condition]}


TOKEN = {"spec.secrets": {"hfToken": {"name": "hub", "key": "token"}}}

WAITING = [
    Waits(
        "image",
        container("ImagePullBackOff", 'Back-off pulling image "trainer:1"'),
        "ImagePullBackOff",
        ("container pytorch of pod sample-master-0", "trainer:1", "spec.imagePullSecrets"),
    ),
    Waits(
        "image name",
        container("InvalidImageName", 'Failed to apply default image tag "A B"'),
        "InvalidImageName",
        ("correct spec.image",),
    ),
    Waits(
        "no room",
        unscheduled("0/5 nodes are available: 5 Insufficient nvidia.com/gpu."),
        "Unschedulable",
        ("pod sample-master-0: 0/5 nodes are available: 5 Insufficient nvidia.com/gpu.",),
    ),
    Waits(
        "claim pending",
        unscheduled("0/5 nodes are available: pod has unbound immediate PersistentVolumeClaims."),
        "ClaimPending",
        ("claim sample-checkpoints is Pending", "ProvisioningFailed", "0/5 nodes"),
        claim="Pending",
        claim_event='ProvisioningFailed: storageclass "fast" not found',
    ),
    Waits(
        "claim waits for the pod, which waits for GPUs",
        unscheduled("0/5 nodes are available: 5 Insufficient nvidia.com/gpu."),
        "Unschedulable",
        ("Insufficient",),
        claim="Pending",
    ),
    Waits(
        "init container stuck",
        init({"running": {"startedAt": text_of(START)}}),
        "InitStuck",
        ("init container init-pytorch of pod sample-master-0 has run for 10m0s", "master's name"),
    ),
    Waits(
        "init container of the job's own fails",
        init(
            {"waiting": {"reason": "CrashLoopBackOff"}},
            name="download",
            lastState={"terminated": {"exitCode": 4, "message": "no such host"}},
        ),
        "InitContainerFailing",
        ("download", "exit code 4", "no such host"),
    ),
    Waits(
        "init container of the training-operator fails",
        init(
            {"waiting": {"reason": "CrashLoopBackOff"}},
            lastState={"terminated": {"exitCode": 1}},
        ),
        "InitStuck",
        ("gives up again and again", "does the master's pod run?"),
    ),
    Waits(
        "image of the training-operator",
        {
            "initContainerStatuses": [
                {
                    "name": "init-pytorch",
                    "state": {
                        "waiting": {"reason": "ErrImagePull", "message": "429 Too Many Requests"}
                    },
                }
            ]
        },
        "ErrImagePull",
        ("--pytorch-init-container-image", "pytorchJobShape: worker-only"),
    ),
    Waits(
        "image that the kubelet waits to pull again",
        container("ImagePullBackOff", 'Back-off pulling image "trainer:1"'),
        "ImagePullBackOff",
        ("no space left on device; the node's disk is full",),
        event="Failed: Failed to pull image: write /var/lib/x: no space left on device",
    ),
    *(
        Waits(f"image: {words}", container("ErrImagePull", words), "ErrImagePull", (cure,))
        for words, cure in (
            ("toomanyrequests: You have reached your pull rate limit", "imagePullSecrets, or use"),
            ("no match for platform in manifest: not found", "not made for the node's processor"),
            ("dial tcp: lookup registry.example.com: no such host", "does not reach the registry"),
            (
                "pull access denied, repository does not exist",
                "check spec.image and spec.imagePull",
            ),
            ("manifest unknown", "; check spec.image"),
        )
    ),
    Waits(
        "claim of a mount missing",
        unscheduled('persistentvolumeclaim "models" not found'),
        "Unschedulable",
        ("make PersistentVolumeClaim models", "spec.storage.mounts[0].claimName"),
        changes={
            "spec.storage.mounts": [{"name": "m", "claimName": "models", "mountPath": "/models"}]
        },
    ),
    Waits(
        "secret missing",
        container("CreateContainerConfigError", 'secret "hub" not found'),
        "CreateContainerConfigError",
        ("make Secret hub in the job's namespace (named by spec.secrets.hfToken)",),
        changes=TOKEN,
    ),
    Waits(
        "key missing",
        container("CreateContainerConfigError", "couldn't find key token in Secret ns/hub"),
        "CreateContainerConfigError",
        ("add key token to Secret hub", "spec.secrets.hfToken"),
        changes=TOKEN,
    ),
    Waits(
        "map missing",
        container("CreateContainerConfigError", 'configmap "vars" not found'),
        "CreateContainerConfigError",
        ("make ConfigMap vars", "spec.envFrom[0].configMapRef"),
        changes={"spec.envFrom": [{"configMapRef": {"name": "vars"}}]},
    ),
    Waits(
        "volume of a secret",
        container("ContainerCreating"),
        "FailedMount",
        ('secret "data" not found', "spec.storage.mounts[0].secretName"),
        changes={
            "spec.storage.mounts": [{"name": "d", "secretName": "data", "mountPath": "/data"}]
        },
        event='FailedMount: MountVolume.SetUp failed for volume "d" : secret "data" not found',
    ),
    Waits(
        "volume in use",
        container("ContainerCreating"),
        "FailedAttachVolume",
        ("Multi-Attach error", "a pod on another node still has it"),
        event='FailedAttachVolume: Multi-Attach error for volume "pvc-1"',
    ),
    Waits("young", container("ContainerCreating"), "PodsStarting", ("0 of 1 pods run",)),
    Waits(
        "hostile",
        container("ImagePullBackOff", "\x1b[31m\x00gone\u202e" + "x" * 5000),
        "ImagePullBackOff",
        ("x" * 100,),
    ),
]


@pytest.mark.parametrize("case", WAITING, ids=lambda case: case.name)
def test_why_it_waits(case: Waits) -> None:
    world = World(case.changes)
    world.settle()
    world.run_pods()
    (pod,) = world.pods
    pod["status"] = {"phase": "Pending", **case.pod}
    assert world.claim is not None
    world.claim["status"] = {"phase": case.claim}
    world.claim["metadata"]["uid"] = "claim"
    said = {pod["metadata"]["uid"]: case.event, "claim": case.claim_event}
    world.news = {uid: Said(*text.split(": ", 1)) for uid, text in said.items() if text}
    world.wait(600)
    decision = world.settle()
    running = world.condition("Running")
    assert (running["status"], running["reason"]) == ("False", case.reason)
    assert (world.status["phase"], world.status["reason"]) == ("Starting", case.reason)
    for words in case.words:
        assert words in running["message"]
    assert not {"\x1b", "\x00", "\u202e"} & set(running["message"])
    assert len(running["message"]) <= 4096
    assert decision.requeue_after, "what a person changes is looked for"


@pytest.mark.parametrize("why", ["unschedulable", "unmounted"])
def test_what_keeps_the_master_is_told_before_who_waits_for_it(why: str) -> None:
    world = World({"spec.nnodes": 2})
    world.settle()
    world.run_pods(count=2)
    master, worker = world.pods
    gives_up = init({"waiting": {"reason": "CrashLoopBackOff"}})
    worker["status"] = {"phase": "Pending", **gives_up}
    if why == "unschedulable":
        master["status"] = {"phase": "Pending", **unscheduled("5 Insufficient nvidia.com/gpu")}
    else:
        master["status"] = {"phase": "Pending", **container("ContainerCreating")}
        world.news = {master["metadata"]["uid"]: Said("FailedMount", "no such volume")}
    world.wait(600)
    world.settle()
    assert world.status["reason"] == {"unschedulable": "Unschedulable"}.get(why, "FailedMount")
    assert "sample-master-0" in world.condition("Running")["message"]


def test_what_goes_well_is_shown_and_no_warning() -> None:
    world = World()
    world.settle()
    world.run_pods()
    (pod,) = world.pods
    pod["status"] = {"phase": "Pending", **container("ContainerCreating")}
    uid = pod["metadata"]["uid"]
    world.news = {uid: Said("Pulling", 'Pulling image "trainer:1"', is_warning=False)}
    world.wait(60)
    decision = world.settle()
    running = world.condition("Running")
    assert running["reason"] == "PodsStarting"
    assert running["message"] == 'pod sample-master-0: Pulling image "trainer:1"'
    assert "Pulling" not in world.events
    assert decision.requeue_after


NOT_READY = {"type": "Ready", "status": "False"}
LOST = {
    "node controller took Ready away": {"conditions": [NOT_READY]},
    "unknown": {"phase": "Unknown"},
    "old word": {"reason": "NodeLost"},
}


@pytest.mark.parametrize("status", LOST.values(), ids=LOST)
@pytest.mark.parametrize("leaves", [False, True])
def test_a_pod_on_a_lost_node_does_not_run(status: dict[str, Any], leaves: bool) -> None:
    world = World({"spec.nnodes": 2})
    world.settle()
    world.run_pods(count=2)
    world.settle()
    assert world.condition("Running")["message"] == "2 of 2 pods run"
    world.pods[1]["status"] |= status
    if leaves:
        world.pods[1]["metadata"]["deletionTimestamp"] = text_of(world.now)
    world.settle()
    running = world.condition("Running")
    assert (running["status"], running["reason"]) == ("False", "NodeLost")
    assert "sample-worker-0" in running["message"]


def test_a_pod_that_leaves_does_not_run() -> None:
    world = World()
    world.settle()
    world.run_pods()
    world.settle()
    world.pods[0]["metadata"]["deletionTimestamp"] = text_of(world.now)
    world.settle()
    running = world.condition("Running")
    assert (running["status"], running["message"]) == ("False", "0 of 1 pods run")


def test_a_pod_that_a_probe_finds_not_ready_runs() -> None:
    world = World()
    world.settle()
    world.run_pods()
    world.pods[0]["status"]["conditions"] = [{**NOT_READY, "reason": "ContainersNotReady"}]
    world.settle()
    assert world.condition("Running")["status"] == "True"


def claim(mode: str = "ReadWriteMany", size: str = "10Gi", name: str = "mine") -> Object:
    return {
        "metadata": {"name": name, "labels": {"osft.dev/job": "sample"}},
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": size}}},
        "status": {"phase": "Bound"},
    }


@pytest.mark.parametrize(
    ("storage", "found", "nodes", "reason", "words"),
    [
        ({"claimName": "mine"}, claim("ReadWriteOnce"), 2, "ClaimNotShared", "ReadWriteMany"),
        ({"claimName": "mine"}, claim("ReadWriteOnce"), 1, None, ""),
        ({"claimName": "mine"}, claim(), 2, None, ""),
        ({"size": "20Gi"}, claim(), 1, "ClaimDiffers", "ReadWriteOnce"),
        ({"size": "20Gi"}, claim("ReadWriteOnce"), 1, "ClaimDiffers", "has 10Gi"),
        ({"size": "20Gi"}, claim("ReadWriteOnce", "0.02Ti"), 1, None, ""),
        ({"size": "20Gi"}, claim("ReadWriteOnce", "1Ti"), 1, None, ""),
        ({"size": "10Gi"}, claim("ReadWriteOnce"), 2, "ClaimDiffers", "ReadWriteMany"),
    ],
)
def test_a_claim_that_is_not_what_is_needed(
    storage: Object, found: Object, nodes: int, reason: str | None, words: str
) -> None:
    world = World({"spec.storage.checkpoints": storage, "spec.nnodes": nodes})
    found["metadata"]["name"] = "mine" if "claimName" in storage else "sample-checkpoints"
    world.claim = found
    decision = world.settle()
    if reason is None:
        assert list(world.jobs) == ["sample"]
        return
    assert (world.status["phase"], world.status["reason"]) == ("Pending", reason)
    assert found["metadata"]["name"] in world.condition("Running")["message"]
    assert words in world.condition("Running")["message"]
    assert decision.requeue_after == 30
    assert not world.jobs
    assert "startTime" not in world.status, "so that the job can still be edited"
