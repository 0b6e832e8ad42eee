"""The configuration for kube-state-metrics: its form, and that what it names is in the definition.

No kube-state-metrics here: the form is checked against its published reference, and `values` reads
an object as that describes (a path that is not there gives no value; True, times and numbers do).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from osft_operator import crd, names
from osft_operator.status_model import PHASES
from world import World

FILE = Path(__file__).parents[1] / "charts" / "osft-operator" / "files" / "kube-state-metrics.yaml"
CONFIG: dict[str, Any] = yaml.safe_load(FILE.read_text())
(RESOURCE,) = CONFIG["spec"]["resources"]
METRICS: list[dict[str, Any]] = RESOURCE["metrics"]
METADATA = {"name": "string", "namespace": "string", "creationTimestamp": "string"}
FORMS = {"Gauge": "gauge", "StateSet": "stateSet", "Info": "info"}
KEYS = {
    "Gauge": {"path", "labelsFromPath", "valueFrom", "nilIsZero"},
    "StateSet": {"labelName", "path", "list"},
    "Info": {"path", "labelsFromPath"},
}


def schema_at(path: list[str], schema: Any = None) -> Any:
    """The schema of a field; a list stands for its entries."""
    found = schema or crd.schema()
    if path[:1] == ["metadata"] and schema is None:
        return {"type": METADATA[path[1]], "format": "date-time"}
    for name in path:
        found = found.get("items", found)["properties"][name]
    return found


def paths(metric: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a metric reads: the role of each, and its schema."""
    told = metric["each"][FORMS[metric["each"]["type"]]]
    base = schema_at(told["path"]) if "path" in told else None
    for label, path in told.get("labelsFromPath", {}).items():
        yield f"label {label}", schema_at(path, base)
    if "valueFrom" in told:
        yield "value", schema_at(told["valueFrom"], base)
    elif base is not None:
        yield "value", base


def test_it_is_about_osftjobs() -> None:
    assert CONFIG["kind"] == "CustomResourceStateMetrics"
    kind = {"group": names.GROUP, "version": names.VERSION, "kind": names.KIND}
    assert RESOURCE["groupVersionKind"] == kind
    assert set(RESOURCE) <= {
        "groupVersionKind", "metricNamePrefix", "labelsFromPath", "errorLogV", "metrics"
    }  # fmt: skip
    for path in RESOURCE["labelsFromPath"].values():
        assert schema_at(path)
    found = [metric["name"] for metric in METRICS]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric["name"])
def test_each_metric_has_its_form_and_reads_what_there_is(metric: dict[str, Any]) -> None:
    assert set(metric) == {"name", "help", "each"}
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", metric["name"])
    kind = metric["each"]["type"]
    assert set(metric["each"]) == {"type", FORMS[kind]}
    assert set(metric["each"][FORMS[kind]]) <= KEYS[kind]
    for role, schema in paths(metric):
        scalar = schema["type"] in ("string", "number", "integer", "boolean")
        assert scalar, (role, schema)
        if role == "value" and kind == "Gauge" and schema["type"] == "string":
            assert schema.get("format") == "date-time" or schema["enum"] == [
                "True", "False", "Unknown"
            ]  # fmt: skip


def test_every_phase_is_in_the_set() -> None:
    (phases,) = (m["each"]["stateSet"] for m in METRICS if m["each"]["type"] == "StateSet")
    assert tuple(phases["list"]) == PHASES


def at(path: list[str], body: Any) -> Any:
    for name in path:
        body = body.get(name) if isinstance(body, dict) else None
    return body


def number(value: Any) -> float:
    if isinstance(value, str):
        said = {"true": 1.0, "false": 0.0, "unknown": 0.0}.get(value.lower())
        return datetime.datetime.fromisoformat(value).timestamp() if said is None else said
    return float(value)


def values(metric: dict[str, Any], body: dict[str, Any]) -> list[float]:
    """Its series of one object."""
    told = metric["each"][FORMS[metric["each"]["type"]]]
    if metric["each"]["type"] == "Info":
        return [1.0]
    found = at(told["path"], body)
    if metric["each"]["type"] == "StateSet":
        return [float(found == each) for each in told["list"]]
    entries = found if isinstance(found, list) else [found]
    raw = [at(told.get("valueFrom", []), entry) for entry in entries]
    return [number(each) for each in raw if each is not None]


def test_a_job_that_ran_has_a_number_for_each() -> None:
    world = World({"spec.nnodes": 2, "spec.suspend": False})
    world.settle()
    world.tell("sample", "Succeeded")
    world.settle()
    body = {**world.body, "status": {**world.status}}
    body["metadata"] = {**body["metadata"], "creationTimestamp": "2026-01-02T03:04:05Z"}
    body["status"]["progress"] = {"progressPercentage": 100, "step": 7, "loss": 1.5}
    assert [metric["name"] for metric in METRICS if not values(metric, body)] == []
    (phases,) = (values(m, body) for m in METRICS if m["each"]["type"] == "StateSet")
    assert sum(phases) == 1
