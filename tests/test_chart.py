"""The Helm chart, rendered: valid for every supported Kubernetes, and its pods restricted.

Rendered and linted by Helm's own code (helm-python-sdk) and validated against the schemas of the
built-in kinds (kubernetes-validate). Values, rights, networks, monitoring, notes and the admission
policy have files of their own; what needs an API server is in test_chart_install. With OSFT_SOAK
set, every Kubernetes from the oldest to the newest is tried, else these two.
"""

from __future__ import annotations

from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from chart_rendering import (
    CHART,
    MATRIX,
    NAMESPACE,
    OLDEST,
    environment,
    every_case,
    only,
    pod_of,
    render,
    toggles,
    validate,
)
from drawn import SOAK


def _versions() -> list[str]:
    newest = kubernetes_validate.latest_version()
    if not SOAK:
        return [OLDEST, newest]
    first, last = (int(version.split(".")[1]) for version in (OLDEST, newest))
    return [f"1.{minor}" for minor in range(first, last + 1)]


VERSIONS = _versions()


def test_lint_is_clean() -> None:
    findings = helm_python.lint(
        CHART, {}, strict=True, namespace=NAMESPACE, kube_version=f"v{OLDEST}.0"
    )
    assert findings["errors"] == []
    # An icon would be the only remark, and there is none to show.
    assert [m["error"] for m in findings["messages"]] == ["icon is recommended"]


@every_case
@pytest.mark.parametrize("version", VERSIONS)
def test_rendered_objects_are_valid(values: dict[str, Any], version: str) -> None:
    objects = render(values, version)
    assert objects
    for item in objects:
        validate(version, item)


TOGGLES = list(toggles())


@pytest.mark.parametrize(("path", "base", "turned"), TOGGLES, ids=[path for path, *_ in TOGGLES])
def test_every_switch_does_something_valid(
    path: str, base: dict[str, Any], turned: dict[str, Any]
) -> None:
    assert render(base) != render(turned), f"{path} is accepted and ignored"
    for version in VERSIONS:
        for item in render(turned, version):
            validate(version, item)


@every_case
def test_names_fit_and_labels_say_whose_they_are(values: dict[str, Any]) -> None:
    for item in render({**values, "fullnameOverride": "a" * 63}):
        if item["kind"] == "CustomResourceDefinition":
            continue
        assert len(item["metadata"]["name"]) <= 63
        assert item["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
        for key in values.get("commonLabels", {}):
            assert key in item["metadata"]["labels"]


@every_case
def test_names_that_look_like_numbers_stay_names(values: dict[str, Any]) -> None:
    numbers = {
        "nameOverride": "7",
        "fullnameOverride": "o",
        "leaderElection": {"leaseName": "123"},
        "serviceAccount": {**values.get("serviceAccount", {}), "name": "1000"},
        "watch": {"namespaces": ["10042", "1e3"]},
        "networkPolicy": {"enabled": True, "trainers": True},
        "priorityClassName": "0x10",
    }
    without_service = {"metrics": {"service": {"enabled": False}}, "fullnameOverride": "007"}
    for version in VERSIONS:
        for given in ({**values, **numbers}, {**without_service, "replicas": 2}):
            for item in render(given, version, release="42", home="10043"):
                validate(version, item)


def test_what_an_object_is_given_for_itself_wins_over_the_labels_of_all() -> None:
    objects = render(MATRIX["labels of all and of one"])
    for kind in ("ServiceMonitor", "PrometheusRule", "ConfigMap"):
        assert only(objects, kind)["metadata"]["labels"]["release"] == "own"
    deployment = only(objects, "Deployment")
    assert deployment["metadata"]["labels"]["release"] == "all"
    assert deployment["spec"]["template"]["metadata"]["labels"]["release"] == "own"
    names = [item["metadata"]["name"] for item in objects if item["kind"] == "ClusterRole"]
    joined = [
        item["metadata"]["name"]
        for item in objects
        if item["metadata"].get("labels", {}).get("rbac.authorization.k8s.io/aggregate-to-edit")
        == "true"
    ]
    assert joined == [name for name in names if "-job-" in name]


@pytest.mark.parametrize(("replicas", "strategy"), [(1, "Recreate"), (2, "RollingUpdate")])
def test_one_operator_at_a_time(replicas: int, strategy: str) -> None:
    objects = render({"replicas": replicas, "leaderElection": {"enabled": False}})
    assert only(objects, "Deployment")["spec"]["strategy"]["type"] == strategy
    elected = environment({"replicas": replicas, "leaderElection": {"enabled": False}})
    assert elected["OSFT_LEADER_ELECTION"] == ("true" if replicas > 1 else "false")
    budgets = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == (1 if replicas > 1 else 0)
    # a pod that is not ready is no standby, and must not stand in the way of drains
    assert all(each["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow" for each in budgets)


@pytest.mark.parametrize(
    ("replicas", "away"), [(2, 1), (2, "50%"), (3, "66%"), (10, "90%"), (1, "99%")]
)
def test_a_budget_that_keeps_one_is_taken(replicas: int, away: int | str) -> None:
    assert render({"replicas": replicas, "podDisruptionBudget": {"maxUnavailable": away}})


@every_case
def test_pods_are_restricted(values: dict[str, Any]) -> None:
    objects = render(values)
    tests = [item["spec"] for item in objects if item["kind"] == "Pod"]
    assert len(tests) <= 1
    for pod in (pod_of(objects), *tests):
        _assert_restricted(pod)


def _assert_restricted(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"].get("runAsUser", 65532) > 0
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("emptyDir" in volume for volume in pod.get("volumes", []))
    for container in pod["containers"] + pod.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


def test_services_of_the_namespace_stay_out_of_the_environment() -> None:
    # A Service `osft-x` would else be OSFT_X_SERVICE_HOST, which the operator refuses.
    assert pod_of(render({}))["enableServiceLinks"] is False


def test_probes_and_metrics_are_where_the_operator_serves_them() -> None:
    objects = render({"probes": {"port": 9001}, "metrics": {"port": 9002}})
    (container,) = pod_of(objects)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"probes": 9001, "metrics": 9002}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "probes"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "probes"}
    assert only(objects, "Service")["spec"]["ports"][0]["targetPort"] == "metrics"


@pytest.mark.parametrize(
    ("image", "settings", "expected"),
    [
        ({}, {}, "osft-operator:0.1.0"),
        ({"tag": "2"}, {}, "osft-operator:2"),
        ({"registry": "here:5000"}, {}, "here:5000/osft-operator:0.1.0"),
        ({"registry": "here:5000"}, {"imageRegistry": "m"}, "m/osft-operator:0.1.0"),
        (
            {"tag": "2", "digest": "sha256:" + "a" * 64},
            {},
            "osft-operator@sha256:" + "a" * 64,
        ),
    ],
)
def test_image_reference(image: dict[str, str], settings: dict[str, str], expected: str) -> None:
    pod = pod_of(render({"image": image, "global": settings}))
    assert pod["containers"][0]["image"] == expected


def test_crd_is_kept_unless_told_otherwise() -> None:
    crd = only(render({}), "CustomResourceDefinition")
    assert crd["metadata"]["name"] == "osftjobs.osft.dev"
    assert crd["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    free = only(render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "helm.sh/resource-policy" not in free["metadata"].get("annotations", {})
    without = render({"crds": {"enabled": False}})
    assert "CustomResourceDefinition" not in {item["kind"] for item in without}


def test_what_1_29_does_not_have_is_left_out_there() -> None:
    old, new = render({}, "1.29"), render({}, "1.30")
    kinds = {item["kind"] for item in old}
    assert {item["kind"] for item in new} - kinds == {
        "ValidatingAdmissionPolicy",
        "ValidatingAdmissionPolicyBinding",
    }
    # it is for the policy's question alone
    author = {item["metadata"]["name"] for item in new} - {item["metadata"]["name"] for item in old}
    assert author == {"osft-osft-operator-author", "osft-osft-operator-job-author"}
    (ours,) = only(old, "CustomResourceDefinition")["spec"]["versions"]
    (theirs,) = only(new, "CustomResourceDefinition")["spec"]["versions"]
    assert theirs == {**ours, "selectableFields": [{"jsonPath": ".status.phase"}]}


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    project = (CHART.parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{chart["appVersion"]}"\n' in project
