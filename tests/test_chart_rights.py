"""The roles in the chart: the operator's exactly, people's by aggregation, none of them wide.

That the operator uses them all, and needs no more, is in test_rights.
"""

from __future__ import annotations

from typing import Any

from chart_rendering import (
    MATRIX,
    NAMESPACE,
    every_case,
    only,
    pod_of,
    render,
    rules,
)

OPERATOR_RULES = {
    ("osft.dev", "osftjobs"): {"get", "list", "watch", "delete"},
    ("osft.dev", "osftjobs/status"): {"patch"},
    ("osft.dev", "osftjobs/finalizers"): {"update"},
    ("kubeflow.org", "pytorchjobs"): {"get", "list", "watch", "create", "patch", "delete"},
    ("", "pods"): {"get", "list", "watch"},
    ("", "persistentvolumeclaims"): {"get", "list", "watch", "create"},
    ("", "events"): {"list", "create", "patch"},
}


def _granted(role: dict[str, Any]) -> dict[tuple[str, str], set[str]]:
    granted: dict[tuple[str, str], set[str]] = {}
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                granted.setdefault((group, resource), set()).update(rule["verbs"])
    return granted


def test_operator_has_exactly_its_rights() -> None:
    objects = render({})
    roles = {item["metadata"]["name"]: item for item in objects if item["kind"] == "ClusterRole"}
    assert _granted(roles["osft-osft-operator"]) == OPERATOR_RULES
    lease = only(objects, "Role")
    assert lease["metadata"]["namespace"] == NAMESPACE
    assert lease["rules"] == [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": ["osft-osft-operator"],
            "verbs": ["get", "update"],
        },
    ]


def test_namespaced_operator_needs_nothing_cluster_wide() -> None:
    objects = render(MATRIX["namespaces only"])
    assert all(item["metadata"].get("namespace") for item in objects), "a cluster-wide object"
    roles = {
        item["metadata"]["namespace"]: item
        for item in objects
        if item["kind"] == "Role" and not item["metadata"]["name"].endswith("-lease")
    }
    assert roles.keys() == {"team-a", "team-b"}
    assert all(_granted(role) == OPERATOR_RULES for role in roles.values())


@every_case
def test_every_binding_names_a_role_and_the_operators_account(values: dict[str, Any]) -> None:
    objects = render(values)
    account = pod_of(objects)["serviceAccountName"]
    roles = {
        (item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"])
        for item in objects
    }
    for item in objects:
        if item["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            role = item["roleRef"]
            assert (role["kind"], item["metadata"].get("namespace"), role["name"]) in roles
            assert item["subjects"] == [
                {"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}
            ]


@every_case
def test_no_role_is_wide_or_reads_secrets(values: dict[str, Any]) -> None:
    for rule in rules(render(values)):
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        touched = {resource.partition("/")[0] for resource in rule["resources"]}
        assert touched <= {
            "osftjobs", "pytorchjobs", "pods", "persistentvolumeclaims", "events", "leases"
        }  # fmt: skip
        assert not {"pods/exec", "pods/attach", "pods/log"} & set(rule["resources"])


def test_people_get_their_roles_by_aggregation() -> None:
    roles = {
        item["metadata"]["name"].removeprefix("osft-osft-operator-job-"): item
        for item in render({})
        if item["kind"] == "ClusterRole" and "-job-" in item["metadata"]["name"]
    }
    aggregated = {
        name: {
            label.rpartition("aggregate-to-")[2]
            for label in role["metadata"]["labels"]
            if "aggregate-to-" in label
        }
        for name, role in roles.items()
    }
    assert aggregated == {
        "viewer": {"view", "edit", "admin"},
        "editor": {"edit", "admin"},
        "author": {"edit", "admin"},
    }
    # Only for those who may create pods anyway: a bound editor role brings no pods.
    assert _granted(roles["author"]) == {("kubeflow.org", "pytorchjobs"): {"create"}}
    assert ("kubeflow.org", "pytorchjobs") not in _granted(roles["editor"])
    assert "patch" not in _granted(roles["viewer"])["osft.dev", "osftjobs"]
    assert _granted(roles["editor"])["osft.dev", "osftjobs/status"] == {"get"}
