"""The chart's values: described, bounded, and the operator's settings."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from chart_rendering import (
    CHART,
    environment,
    only,
    pod_of,
    render,
)
from osft_operator.settings import Settings


def test_what_people_say_themselves_is_not_mixed_with_ours() -> None:
    ours = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    theirs = {**ours, "labelSelector": {"matchLabels": {"a": "b"}}}
    arenas = {"name": "MALLOC_ARENA_MAX", "value": "4"}
    given = {"extraEnv": [arenas], "topologySpreadConstraints": [ours, theirs]}
    objects = render(given)
    (first, second), selector = (
        pod_of(objects)["topologySpreadConstraints"],
        only(objects, "Deployment")["spec"]["selector"],
    )
    assert first == {**ours, "labelSelector": selector}
    assert second == theirs
    (container,) = pod_of(objects)["containers"]
    assert [item for item in container["env"] if item["name"] == arenas["name"]] == [arenas]


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
