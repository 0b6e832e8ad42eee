"""The control plane serves what the other tests take for granted."""

import copy
import json
import uuid

import pytest

from cluster.api import ApiError, wait_for
from cluster.control_plane import ControlPlane
from cluster.jobs import JOBS, pytorchjob
from cluster.webhook import Webhook
from osft_operator import process_tree

pytestmark = pytest.mark.cluster

WIDGETS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "spec": {
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {"size": {"type": "integer"}},
                                "x-kubernetes-validations": [
                                    {"rule": "self.size < 10", "message": "too large"},
                                    {"rule": "self == oldSelf", "message": "immutable"},
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def widgets_crd(plural: str) -> dict:
    names = {"plural": plural, "singular": plural[:-1], "kind": plural[:-1].capitalize()}
    metadata = {"name": f"{plural}.{plural}.example.com"}
    spec = {**WIDGETS["spec"], "group": f"{plural}.example.com", "names": names}
    return {**WIDGETS, "metadata": metadata, "spec": spec}


def test_every_definition_is_accepted(control_plane: ControlPlane) -> None:
    assert control_plane.refused == {}


def test_kubectl_applies_gets_and_patches_a_custom_resource(
    control_plane: ControlPlane, namespace: str
) -> None:
    def kubectl(*arguments: str, **more: object) -> str:
        return control_plane.kubectl("-n", namespace, *arguments, **more)

    job = pytorchjob("a", ["true"])
    assert "created" in kubectl("apply", "-f", "-", input=json.dumps(job))
    assert "unchanged" in kubectl("apply", "-f", "-", input=json.dumps(job))
    kubectl("patch", "pytorchjob", "a", "--type=merge", "-p", '{"metadata":{"labels":{"x":"y"}}}')
    shown = kubectl("get", "pytorchjobs", "--show-labels")
    assert shown.split("\n")[0].split() == ["NAME", "STATE", "AGE", "LABELS"]
    assert "x=y" in shown


def test_unknown_field_is_refused_by_name(control_plane: ControlPlane, namespace: str) -> None:
    job = pytorchjob("a", ["true"])
    job["spec"]["learningRate"] = 1
    path = JOBS.format(namespace=namespace) + "?fieldValidation=Strict"
    with pytest.raises(ApiError, match=r'unknown field "spec.learningRate"'):
        control_plane.api.post(path, job)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda job: job["metadata"].update(name="1a"), "DNS-1035"),
        (lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"].pop("replicas"), "must be 1"),
        (
            lambda job: job["spec"]["pytorchReplicaSpecs"].update(
                Chief=job["spec"]["pytorchReplicaSpecs"].pop("Worker")
            ),
            r'Unsupported value: "Chief": supported values: "Master", "Worker"',
        ),
        (
            lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].update(replicas=0),
            "at least 1",
        ),
        (
            lambda job: (
                job["spec"]["pytorchReplicaSpecs"].pop("Worker"),
                job["spec"].update(elasticPolicy={}),
            ),
            "must be configured if elastic policy is used",
        ),
        (
            lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"][
                "containers"
            ][0].update(name="trainer"),
            "at least one container with name pytorch",
        ),
        (
            lambda job: job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"][
                "containers"
            ][0].pop("image"),
            r"containers\[0\].image: Required value",
        ),
    ],
    ids=["name", "master", "keys", "workers", "elastic", "container", "image"],
)
@pytest.mark.pytorchjob_webhook
def test_webhook_rules_refuse_a_bad_pytorchjob(
    control_plane: ControlPlane, namespace: str, change, words: str
) -> None:
    job = copy.deepcopy(pytorchjob("a", ["true"], workers=1))
    change(job)
    with pytest.raises(ApiError, match=words) as refused:
        control_plane.api.post(JOBS.format(namespace=namespace), job)
    assert refused.value.code == 403
    assert "admission webhook" in refused.value.message


@pytest.mark.pytorchjob_webhook
def test_nothing_can_be_made_while_the_webhook_is_away(
    webhook: tuple[ControlPlane, Webhook], namespace: str
) -> None:
    plane, hook = webhook
    path = JOBS.format(namespace=namespace)
    hook.away()
    try:
        with pytest.raises(ApiError, match="failed calling webhook") as refused:
            plane.api.post(path, pytorchjob("a", ["true"]))
        assert refused.value.code == 500
    finally:
        hook.serve()
    plane.api.post(path, pytorchjob("a", ["true"], runPolicy={"suspend": True}))


def test_a_crd_can_come_and_go(control_plane: ControlPlane, namespace: str) -> None:
    plural = f"w{uuid.uuid4().hex[:6]}s"
    crd = widgets_crd(plural)
    group = crd["spec"]["group"]
    path = f"/apis/{group}/v1/namespaces/{namespace}/{plural}"
    control_plane.install_crd(crd)
    widget = {
        "apiVersion": f"{group}/v1",
        "kind": crd["spec"]["names"]["kind"],
        "metadata": {"name": "a"},
        "spec": {"size": 3},
    }
    made = control_plane.api.post(path, widget)
    with pytest.raises(ApiError, match="immutable"):
        control_plane.api.put(f"{path}/a", {**made, "spec": {"size": 4}})
    with pytest.raises(ApiError, match="too large"):
        control_plane.api.post(path, {**widget, "metadata": {"name": "b"}, "spec": {"size": 30}})
    control_plane.remove_crd(crd["metadata"]["name"], ["v1"])
    with pytest.raises(ApiError) as gone:
        control_plane.api.get(path)
    assert gone.value.code in (404, 503)


def test_children_of_a_deleted_owner_are_collected(
    control_plane: ControlPlane, namespace: str
) -> None:
    api = control_plane.api
    owner = api.post(
        JOBS.format(namespace=namespace), pytorchjob("a", ["true"], runPolicy={"suspend": True})
    )
    reference = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "name": "a",
        "uid": owner["metadata"]["uid"],
    }
    maps = f"/api/v1/namespaces/{namespace}/configmaps"
    api.post(maps, {"metadata": {"name": "child", "ownerReferences": [reference]}})
    api.delete(JOBS.format(namespace=namespace) + "/a")

    def gone() -> bool:
        return all(each["metadata"]["name"] != "child" for each in api.get(maps)["items"])

    wait_for("collected child", gone, timeout_seconds=60)


def test_a_service_account_has_its_own_rights_only(
    control_plane: ControlPlane, namespace: str
) -> None:
    kubeconfig = control_plane.service_account_kubeconfig(namespace, "default")
    told = control_plane.kubectl(
        f"--kubeconfig={kubeconfig}", "-n", namespace, "get", "pods", check=False
    )
    assert f"system:serviceaccount:{namespace}:default" in told
    assert "forbidden" in told


def test_a_deleted_namespace_goes_with_its_objects(control_plane: ControlPlane) -> None:
    name = f"going-{uuid.uuid4().hex[:6]}"
    control_plane.create_namespace(name)
    api = control_plane.api
    api.post(JOBS.format(namespace=name), pytorchjob("a", ["true"], runPolicy={"suspend": True}))
    control_plane.delete_namespace(name)

    def gone() -> bool:
        return "NotFound" in control_plane.kubectl("get", "namespace", name, check=False)

    wait_for("end of the namespace", gone, timeout_seconds=60)


def test_its_processes_carry_the_sessions_mark(
    control_plane: ControlPlane, session_mark: str
) -> None:
    assert len(process_tree.find(f"{session_mark}/control-plane")) >= 2
