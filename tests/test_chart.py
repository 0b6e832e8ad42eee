"""The Helm chart, rendered: valid for every supported Kubernetes, restricted, and least privileged.

Rendered and linted by Helm's own code (helm-python-sdk) and validated against the schemas of the
built-in kinds (kubernetes-validate). Metrics, alerts and the admission policy have tests of their
own; what needs an API server is in test_chart_install.py. With OSFT_SOAK set, every Kubernetes
from the oldest to the newest is tried, else these two.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

import job_samples
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
    rules,
    toggles,
    validate,
)
from osft_operator.pod import labels
from osft_operator.settings import Settings
from osft_operator.spec import OSFTJob
from osft_trainer import report


def _versions() -> list[str]:
    newest = kubernetes_validate.latest_version()
    if not os.environ.get("OSFT_SOAK"):
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
        for key, value in values.get("commonLabels", {}).items():
            assert item["metadata"]["labels"][key] == value


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica"),
        ({"leaderElection": {"enable": False}}, "enable"),
        ({"trainer": {"image": {"registery": "x"}}}, "registery"),
        ({"logging": {"level": "LOUD"}}, "/logging/level"),
        ({"replicas": "2"}, "/replicas"),
        ({"runAsUser": 0}, "/runAsUser"),
        ({"image": {"digest": "sha256:123"}}, "/image/digest"),
        ({"extraEnv": [{"name": "OSFT_WORKERS", "value": "9"}]}, "/extraEnv/0/name"),
        ({"policy": {"images": ["a,b"]}}, "/policy/images/0"),
        ({"policy": {"image": []}}, "image"),
        (
            {"metrics": {"serviceMonitor": {"interval": "often"}}},
            "/metrics/serviceMonitor/interval",
        ),
        ({"podLabels": {"app.kubernetes.io/name": "mine"}}, "app.kubernetes.io/name"),
        ({"podLabels": {"a b": "mine"}}, "a b"),
        ({"commonLabels": {"a": "two words"}}, "/commonLabels/a"),
        ({"leaderElection": {"leaseName": "My Lease"}}, "/leaderElection/leaseName"),
        ({"serviceAccount": {"name": "A"}}, "/serviceAccount/name"),
        ({"image": {"registry": "https://here"}}, "/image/registry"),
        ({"image": {"repository": "osft:1"}}, "/image/repository"),
        ({"probes": {"bindAddress": "127.0.0.1"}}, "/probes/bindAddress"),
        ({"probes": {"bindAddress": "localhost"}}, "/probes/bindAddress"),
        ({"metrics": {"prometheusRule": {"queueSeconds": 0.5}}}, "/prometheusRule/queueSeconds"),
        ({"metrics": {"prometheusRule": {"gpuWaitSeconds": 1e30}}}, "/gpuWaitSeconds"),
        ({"reconcile": {"resyncSeconds": 0.1}}, "/reconcile/resyncSeconds"),
        ({"podDisruptionBudget": {"maxUnavailable": "0%"}}, "/podDisruptionBudget/maxUnavailable"),
        ({"podDisruptionBudget": {"maxUnavailable": "100%"}}, "/maxUnavailable"),
        ({"networkPolicy": {"metricsFrom": [{}]}}, "/networkPolicy/metricsFrom/0"),
        ({"networkPolicy": {"metricsFrom": [{"podSelecter": {}}]}}, "podSelecter"),
        ({"networkPolicy": {"apiServerPorts": [443, 443]}}, "/networkPolicy/apiServerPorts"),
        ({"resources": {"limits": {"memory": "1 GiB"}}}, "/resources/limits/memory"),
        ({"extraEnv": [{"name": "A=B", "value": "x"}]}, "/extraEnv/0/name"),
        ({"extraEnv": [{"name": "A", "value": "x", "valueFrom": {"fieldRef": {}}}]}, "/extraEnv/0"),
        ({"tolerations": [{"effect": "NoWay"}]}, "/tolerations/0/effect"),
        ({"affinity": {"nodeafinity": {}}}, "nodeafinity"),
        ({"topologySpreadConstraints": [{"maxSkew": 1}]}, "/topologySpreadConstraints/0"),
        ({"nodeSelector": {"kubernetes.io/os": "two words"}}, "/nodeSelector"),
        ({"priorityClassName": "A B"}, "/priorityClassName"),
        ({"policy": {"capabilities": ["CAP_IPC_LOCK"]}}, "/policy/capabilities/0"),
        ({"terminationGracePeriodSeconds": 5}, "/terminationGracePeriodSeconds"),
        # null takes the default away, which would be an empty list: nothing allowed
        ({"policy": {"images": None}}, "images"),
        ({"metrics": None}, "metrics"),
        ({"replicas": None}, "replicas"),
    ],
)
def test_schema_names_what_is_wrong(values: dict[str, Any], named: str) -> None:
    with (
        helm_python.Chart.load(CHART) as chart,
        pytest.raises(helm_python.HelmValuesError, match=re.escape(named)),
    ):
        chart.validate_schema(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"networkPolicy": {"enabled": True, "trainers": True}}, "watch.namespaces"),
        ({"metrics": {"prometheusRule": {"enabled": True}}}, "metrics.serviceMonitor.enabled"),
        (
            {"metrics": {"serviceMonitor": {"enabled": True}, "service": {"enabled": False}}},
            "metrics.service.enabled",
        ),
        ({"leaderElection": {"renewSeconds": 8}}, "leaderElection.renewSeconds is 8"),
        ({"metrics": {"port": 8081}}, "probes.port and metrics.port are both 8081"),
        ({"reconcile": {"backoffMaxSeconds": 0.5}}, "reconcile.backoffInitialSeconds is 1"),
        ({"reconcile": {"watchCheckSeconds": 60}}, "set it to at least 135"),
        ({"probes": {"watchStallSeconds": 54}}, "set it to at least 55"),
        ({"serviceAccount": {"create": False}}, "name an account"),
        (
            {"replicas": 2, "podDisruptionBudget": {"maxUnavailable": 2}},
            "podDisruptionBudget.maxUnavailable is 2 of 2",
        ),
        ({"networkPolicy": {"metricsFrom": [{"podSelector": {}}]}}, "networkPolicy.enabled"),
        ({"extraEnv": [{"name": "A"}, {"name": "A"}]}, "extraEnv has A twice"),
    ],
)
def test_what_goes_ill_together_is_refused_with_the_cure(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=re.escape(words)):
        render(values)


def test_every_value_has_a_comment_and_a_schema() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r" *\w+:", line):
            assert before.lstrip().startswith("# "), f"no comment above {line!r}"
    schema = json.loads((CHART / "values.schema.json").read_text())
    missing = list(_differences(yaml.safe_load("\n".join(lines)), schema, schema["$defs"], ""))
    assert missing == []


def test_every_value_is_bounded() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert sorted(_loose(schema, "")) == [
        # what Kubernetes and Grafana define, and the text of a variable
        "/$defs/annotations/additionalProperties",
        "/properties/affinity/additionalProperties",
        "/properties/extraEnv/items/properties/value",
        "/properties/extraEnv/items/properties/valueFrom/properties/configMapKeyRef",
        "/properties/extraEnv/items/properties/valueFrom/properties/fieldRef",
        "/properties/extraEnv/items/properties/valueFrom/properties/resourceFieldRef",
        "/properties/extraEnv/items/properties/valueFrom/properties/secretKeyRef",
        "/properties/global",
        "/properties/tolerations/items/properties/tolerationSeconds",
    ]


BOUNDS = {
    "string": {"pattern", "enum"},
    "integer": {"maximum"},
    "number": {"maximum", "exclusiveMinimum"},
    "object": {"additionalProperties"},
    "array": {"items"},
}


def _loose(schema: Any, path: str) -> Iterator[str]:
    """Paths of the schemas that take any value of a type."""
    if isinstance(schema, dict):
        kind = schema.get("type")
        if isinstance(kind, str) and kind in BOUNDS and not BOUNDS[kind] & schema.keys():
            yield path
        for name, inner in schema.items():
            yield from _loose(inner, f"{path}/{name}")
    elif isinstance(schema, list):
        for index, inner in enumerate(schema):
            yield from _loose(inner, f"{path}/{index}")


def _differences(
    values: dict[str, Any], schema: dict[str, Any], definitions: dict[str, Any], path: str
) -> Iterator[str]:
    """Values without schema, schemas without value, and objects that take unknown names."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "properties" not in schema or path == "/global":
        return
    if schema.get("additionalProperties") is not False:
        yield f"{path} takes unknown names"
    for name in values.keys() ^ schema["properties"].keys():
        yield f"{path}/{name} is only in one of values.yaml and values.schema.json"
    for name in values.keys() & schema["properties"].keys():
        if isinstance(values[name], dict):
            inner = schema["properties"][name]
            yield from _differences(values[name], inner, definitions, f"{path}/{name}")


def test_environment_is_the_operators_settings() -> None:
    assert environment({}).keys() == {Settings.variable(name) for name in Settings.model_fields}


def test_default_values_are_the_settings_own_defaults() -> None:
    given = {"instance_name": "the-pod", "lease_name": "osft-osft-operator"}
    assert Settings.from_environ(environment({})) == Settings.model_validate(given)


def test_values_reach_the_settings() -> None:
    values = {
        "replicas": 2,
        "watch": {"namespaces": ["team-a", "team-b"]},
        "trainer": {
            "image": {"registry": "here:5000", "repository": "t", "tag": "9"},
            "runAsUser": None,
            "fsGroup": 1000680000,
        },
        "leaderElection": {"enabled": False, "leaseName": "mine"},
        "policy": {
            "images": ["here:5000/*", "there/x:1"],
            "priorityClasses": [],
            "nodeSelectors": ["gpu=h200"],
            "trustRemoteCode": False,
        },
        "metrics": {"perJob": True},
        "progress": {"timeoutSeconds": 0.5},
    }
    settings = Settings.from_environ(environment(values))
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.trainer_image == "here:5000/t:9"
    assert settings.run_as_user is None
    assert settings.fs_group == 1000680000
    assert settings.lease_name == "mine"
    assert settings.progress_timeout_seconds == 0.5
    assert settings.allowed_images == ("here:5000/*", "there/x:1")
    assert settings.allowed_priority_classes == (), "an empty list allows nothing"
    assert settings.allowed_node_selectors == ("gpu=h200",)
    assert settings.allow_remote_code is False
    assert settings.metrics_per_job is True
    assert settings.leader_election, "two replicas without a Lease would both work"


@pytest.mark.parametrize(("replicas", "strategy"), [(1, "Recreate"), (2, "RollingUpdate")])
def test_one_operator_at_a_time(replicas: int, strategy: str) -> None:
    objects = render({"replicas": replicas, "leaderElection": {"enabled": False}})
    assert only(objects, "Deployment")["spec"]["strategy"]["type"] == strategy
    elected = environment({"replicas": replicas, "leaderElection": {"enabled": False}})
    assert elected["OSFT_LEADER_ELECTION"] == ("true" if replicas > 1 else "false")
    budgets = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == (1 if replicas > 1 else 0)


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


def test_training_pods_are_reached_by_their_kind_and_by_the_operator_alone() -> None:
    objects = render(MATRIX["namespaces only"])
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    (team,) = [item for item in policies if item["metadata"]["namespace"] == "team-a"]
    ours = labels(OSFTJob.model_validate(job_samples.job()), attempt=1)
    assert team["spec"]["podSelector"]["matchLabels"].items() <= ours.items()
    among, operator = team["spec"]["ingress"]
    assert among == {"from": [{"podSelector": team["spec"]["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [report.METRICS_PORT]
    (peer,) = operator["from"]
    pod = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= pod.items()


def test_network_policy_opens_the_way_to_progress() -> None:
    policy = only(render({"networkPolicy": {"enabled": True}}), "NetworkPolicy")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert sorted(ports) == sorted([53, 53, 443, 6443, report.METRICS_PORT])


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
    (ours,) = only(old, "CustomResourceDefinition")["spec"]["versions"]
    (theirs,) = only(new, "CustomResourceDefinition")["spec"]["versions"]
    assert theirs == {**ours, "selectableFields": [{"jsonPath": ".status.phase"}]}


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={OLDEST}.0-0"
    project = (CHART.parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{chart["appVersion"]}"\n' in project
