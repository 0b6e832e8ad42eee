"""The node runs any pod: volumes, configuration, logs and deletion, seen through kubectl."""

import json
import subprocess
import threading
from collections.abc import Callable

import pytest

from cluster.api import ApiError, wait_for
from cluster.fixtures import Cluster
from osft_operator import process_tree

pytestmark = pytest.mark.cluster


def pod(name: str, script: str, *, restart_policy: str = "Never", **spec: object) -> dict:
    container = {"name": "pytorch", "image": "i", "command": ["sh", "-c", script]}
    container |= spec.pop("container", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": restart_policy,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            **spec,
        },
    }


def claim(name: str) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }


@pytest.fixture
def kubectl(cluster: Cluster, namespace: str) -> Callable[..., str]:
    """Kubectl in the test's namespace; a dict as `apply` is applied."""

    def run(*arguments: str, apply: dict | None = None, check: bool = True) -> str:
        if apply is not None:
            arguments, text = ("apply", "-f", "-"), json.dumps(apply)
            return cluster.plane.kubectl("-n", namespace, *arguments, input=text, check=check)
        return cluster.plane.kubectl("-n", namespace, *arguments, check=check)

    return run


@pytest.fixture
def read(cluster: Cluster, namespace: str) -> Callable[[str], dict]:
    """The pod of a name, as the API server has it."""
    return lambda name: cluster.plane.api.get(f"/api/v1/namespaces/{namespace}/pods/{name}")


def wait_for_phase(read: Callable[[str], dict], name: str, phase: str) -> dict:
    def reached() -> dict | None:
        found = read(name)
        return found if found["status"].get("phase") == phase else None

    return wait_for(f"pod {name} {phase}", reached)


def is_gone(read: Callable[[str], dict], name: str) -> bool:
    try:
        read(name)
    except ApiError as error:
        return error.code == 404
    return False


def test_a_claim_is_bound_shared_and_taken_away(cluster, namespace, kubectl, read) -> None:
    kubectl(apply=claim("data"))
    volume = {"name": "v", "persistentVolumeClaim": {"claimName": "data"}}
    container = {
        "volumeMounts": [{"name": "v", "mountPath": "/data", "subPath": "sub"}],
        "env": [{"name": "DATA", "value": "/data"}],
    }
    kubectl(apply=pod("write", "echo kept > $DATA/file", volumes=[volume], container=container))
    wait_for_phase(read, "write", "Succeeded")
    kubectl(apply=pod("read", "cat $DATA/file", volumes=[volume], container=container))
    wait_for_phase(read, "read", "Succeeded")
    assert kubectl("logs", "read") == "kept\n"
    folder = cluster.kubelet.claim_folder(namespace, "data")
    assert (folder / "sub" / "file").read_text() == "kept\n"
    assert "Bound" in kubectl("get", "pvc", "data")
    kubectl("delete", "pod", "write", "read")
    kubectl("delete", "pvc", "data")
    wait_for("folder gone", lambda: not folder.exists())


def test_a_pod_waits_for_its_claim_and_says_so(kubectl, read) -> None:
    volume = {"name": "v", "persistentVolumeClaim": {"claimName": "late"}}
    kubectl(apply=pod("waits", "true", volumes=[volume]))
    wait_for("event", lambda: "FailedMount" in kubectl("get", "events"))
    assert 'persistentvolumeclaim "late"' in kubectl("get", "events")
    assert read("waits")["status"]["phase"] == "Pending"
    kubectl(apply=claim("late"))
    wait_for_phase(read, "waits", "Succeeded")


def test_secrets_and_config_maps_reach_files_and_environment(kubectl, read) -> None:
    kubectl("create", "secret", "generic", "hub", "--from-literal=token=t0ken")
    kubectl("create", "configmap", "text", "--from-literal=a.txt=words")
    volumes = [
        {"name": "s", "secret": {"secretName": "hub"}},
        {"name": "c", "configMap": {"name": "text", "items": [{"key": "a.txt", "path": "b.txt"}]}},
        {"name": "e", "emptyDir": {}},
    ]
    container = {
        "volumeMounts": [
            {"name": "s", "mountPath": "/secret"},
            {"name": "c", "mountPath": "/text"},
            {"name": "e", "mountPath": "/scratch"},
        ],
        "env": [
            {"name": "T", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            {"name": "S", "value": "/secret/token"},
            {"name": "C", "value": "/text/b.txt"},
            {"name": "E", "value": "/scratch"},
        ],
    }
    script = "echo $T; cat $S; echo; cat $C; echo; touch $E/x && ls $E"
    kubectl(apply=pod("conf", script, volumes=volumes, container=container))
    wait_for_phase(read, "conf", "Succeeded")
    assert kubectl("logs", "conf") == "t0ken\nt0ken\nwords\nx\n"


def test_logs_of_this_and_the_previous_attempt(kubectl, read) -> None:
    script = "if [ -e $E/x ]; then echo second; sleep 600; fi; touch $E/x; echo first; exit 1"
    container = {
        "volumeMounts": [{"name": "e", "mountPath": "/scratch"}],
        "env": [{"name": "E", "value": "/scratch"}],
    }
    volumes = [{"name": "e", "emptyDir": {}}]
    kubectl(
        apply=pod("again", script, restart_policy="OnFailure", volumes=volumes, container=container)
    )
    wait_for("second attempt", lambda: kubectl("logs", "again", check=False) == "second\n")
    assert kubectl("logs", "--previous", "again") == "first\n"

    def counted() -> bool:
        return read("again")["status"]["containerStatuses"][0]["restartCount"] == 1

    wait_for("restart in the status", counted)
    assert kubectl("get", "pod", "again").splitlines()[1].split()[3] == "1"
    kubectl("delete", "pod", "again")


def test_logs_can_be_followed_and_cut(kubectl, read) -> None:
    kubectl(apply=pod("talk", "for i in 1 2 3; do echo line $i; sleep 0.3; done"))
    wait_for("start", lambda: read("talk")["status"]["phase"] != "Pending")
    assert kubectl("logs", "-f", "talk") == "line 1\nline 2\nline 3\n"
    assert kubectl("logs", "--tail=1", "talk") == "line 3\n"


def test_each_pod_has_an_address_of_its_own(kubectl, read) -> None:
    address = {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    for name in ("one", "two"):
        kubectl(apply=pod(name, "echo $IP; hostname -i", container={"env": [address]}))
    seen = {wait_for_phase(read, name, "Succeeded")["status"]["podIP"] for name in ("one", "two")}
    assert len(seen) == 2
    assert all(each.startswith("127.") for each in seen)
    assert kubectl("logs", "one").splitlines()[0] in seen


def test_deletion_waits_for_the_grace_period_and_leaves_nothing(cluster, kubectl, read) -> None:
    kubectl(apply=pod("stubborn", "trap '' TERM; sleep 600 & wait; sleep 600"))
    uid = wait_for_phase(read, "stubborn", "Running")["metadata"]["uid"]
    mark = f"{cluster.mark}/pods/{uid}"
    wait_for("processes", lambda: process_tree.find(mark))
    kubectl("delete", "pod", "stubborn")
    assert is_gone(read, "stubborn")
    assert process_tree.find(mark) == []


def test_forced_deletion_ends_the_processes_too(cluster, kubectl, read) -> None:
    kubectl(apply=pod("forced", "sleep 600"))
    uid = wait_for_phase(read, "forced", "Running")["metadata"]["uid"]
    kubectl("delete", "pod", "forced", "--force", "--grace-period=0")
    wait_for("no process", lambda: not process_tree.find(f"{cluster.mark}/pods/{uid}"))


def test_a_killed_container_is_restarted(cluster, namespace, kubectl, read) -> None:
    kubectl(apply=pod("killed", "sleep 600", restart_policy="OnFailure"))
    wait_for_phase(read, "killed", "Running")
    process_id = cluster.kubelet.runner(namespace, "killed").container("pytorch").process_id
    subprocess.run(["kill", "-9", str(process_id)], check=True)
    wait_for(
        "restart",
        lambda: read("killed")["status"]["containerStatuses"][0]["restartCount"] == 1,
    )
    ended = read("killed")["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "Error")
    kubectl("delete", "pod", "killed")


def test_the_node_is_ready_and_the_threads_are_named(kubectl) -> None:
    assert "Ready" in kubectl("get", "nodes").splitlines()[1].split()
    assert {"kubelet", "training-operator"} <= {each.name for each in threading.enumerate()}
