"""The chart's values: strict, described, and the operator's settings.

What is wrong by itself is refused by the schema, what is wrong together by the templates; both name
the value and the cure.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml

from chart_rendering import (
    CHART,
    environment,
    render,
)
from osft_operator.settings import Settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica"),
        ({"leaderElection": {"enable": False}}, "enable"),
        ({"trainer": {"image": {"registery": "x"}}}, "registery"),
        ({"logging": {"level": "LOUD"}}, "/logging/level"),
        ({"replicas": "2"}, "/replicas"),
        ({"runAsUser": 0}, "/runAsUser"),
        # their pods, too, are runAsNonRoot
        ({"trainer": {"runAsUser": 0}}, "/trainer/runAsUser"),
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
        (
            {"replicas": 2, "podDisruptionBudget": {"maxUnavailable": "51%"}},
            "podDisruptionBudget.maxUnavailable is 51% of 2",
        ),
        (
            {"replicas": 10, "podDisruptionBudget": {"maxUnavailable": "91%"}},
            "podDisruptionBudget.maxUnavailable is 91% of 10",
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
            "runAsGroup": 0,
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
    assert settings.run_as_group == 0
    assert settings.fs_group == 1000680000
    assert settings.lease_name == "mine"
    assert settings.progress_timeout_seconds == 0.5
    assert settings.allowed_images == ("here:5000/*", "there/x:1")
    assert settings.allowed_priority_classes == (), "an empty list allows nothing"
    assert settings.allowed_node_selectors == ("gpu=h200",)
    assert settings.allow_remote_code is False
    assert settings.metrics_per_job is True
    assert settings.leader_election, "two replicas without a Lease would both work"
