"""The chart rendered by Helm's own code, for the tests that look at what it makes.

MATRIX is every way to install it that a test should see. Rendered objects are read strictly (a name
that stands twice is an error) and validated strictly, against the schemas of the built-in kinds
(kubernetes-validate) and monitoring_kinds.
"""

from __future__ import annotations

import atexit
import copy
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

import monitoring_kinds

CHART = Path(__file__).parents[1] / "charts" / "osft-operator"
RELEASE, NAMESPACE = "osft", "osft-system"
VERSION = ".Capabilities.KubeVersion.Version"
OLDEST = "1.29"

MATRIX: dict[str, dict[str, Any]] = {
    "defaults": {},
    "namespaced": {"watch": {"namespaces": ["team-a", "team-b"]}},
    "replicas": {"replicas": 2, "leaderElection": {"enabled": False}},
    "no election": {"leaderElection": {"enabled": False}},
    "network policy": {
        "networkPolicy": {
            "enabled": True,
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}],
        }
    },
    "monitoring": {
        "metrics": {
            "perJob": True,
            "serviceMonitor": {"enabled": True, "labels": {"release": "p"}, "interval": "15s"},
            "prometheusRule": {"enabled": True, "labels": {"release": "p"}},
            "dashboard": {"enabled": True, "annotations": {"folder": "osft"}},
        }
    },
    "policy": {
        "policy": {
            "images": ["here/*"],
            "serviceAccounts": ["train-*"],
            "nodeSelectors": ["gpu=h200", "pool"],
            "priorityClasses": [],
            "capabilities": ["IPC_LOCK"],
            "trustRemoteCode": False,
        },
        "admissionPolicy": {"failurePolicy": "Ignore"},
    },
    "no admission policy": {"admissionPolicy": {"enabled": False}},
    "namespaces only": {
        "watch": {"namespaces": ["team-a", "team-b"]},
        "crds": {"enabled": False},
        "rbac": {"userRoles": {"create": False}},
        "admissionPolicy": {"enabled": False},
        "networkPolicy": {"enabled": True, "trainers": True},
    },
    "labels of all and of one": {
        "commonLabels": {"release": "all", "rbac.authorization.k8s.io/aggregate-to-edit": "no"},
        "podLabels": {"release": "own"},
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "own"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "own"}},
            "dashboard": {"enabled": True, "labels": {"release": "own"}},
        },
    },
    "no aggregation": {"rbac": {"userRoles": {"aggregate": False}}},
    "OpenShift": {
        "runAsUser": None,
        "runAsGroup": None,
        "trainer": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
    },
    "nothing optional": {
        "crds": {"enabled": False},
        "rbac": {"create": False, "userRoles": {"create": False}},
        "serviceAccount": {"create": False},
        "metrics": {"service": {"enabled": False}},
        "podDisruptionBudget": {"enabled": False},
        "admissionPolicy": {"enabled": False},
    },
    "everything optional": {
        "replicas": 3,
        "global": {"imageRegistry": "mirror:5000", "imagePullSecrets": [{"name": "all"}]},
        "fullnameOverride": "trainer-of-models",
        "commonLabels": {"team": "ml"},
        "image": {"digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "one"}],
        "crds": {"keep": False},
        "serviceAccount": {"annotations": {"a": "b"}},
        "metrics": {"service": {"annotations": {"a": "b"}}},
        "podDisruptionBudget": {"maxUnavailable": "50%"},
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "proxy:3128"}],
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "control", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "priorityClassName": "system-cluster-critical",
    },
}


def toggles() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every switch in values.yaml: its path, values without it, and the same with it turned."""
    needed = {
        "metrics.prometheusRule.enabled": {"metrics": {"serviceMonitor": {"enabled": True}}},
        "networkPolicy.trainers": {
            "networkPolicy": {"enabled": True},
            "watch": {"namespaces": ["team-a"]},
        },
        "podDisruptionBudget.enabled": {"replicas": 2},
        "serviceAccount.create": {"serviceAccount": {"name": "mine"}},
    }
    for path, default in _switches(yaml.safe_load((CHART / "values.yaml").read_text()), ""):
        base = needed.get(path, {})
        turned = copy.deepcopy(base)
        *parents, last = path.split(".")
        place = turned
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = not default
        yield path, base, turned


def _switches(values: dict[str, Any], where: str) -> Iterator[tuple[str, bool]]:
    for name, value in values.items():
        if isinstance(value, bool):
            yield f"{where}{name}", value
        elif isinstance(value, dict):
            yield from _switches(value, f"{where}{name}.")


every_case = pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())


def render(
    values: dict[str, Any], version: str = "", *, release: str = RELEASE, home: str = NAMESPACE
) -> list[dict[str, Any]]:
    """The objects of the chart with these values, as `helm template` makes them.

    Args:
        values: what is not as in values.yaml.
        version: of Kubernetes, like 1.29; absent: the one that Helm was built for.
        release: its name.
        home: its namespace.
    """
    return copy.deepcopy(_rendered(json.dumps(values), version, release, home))


@functools.cache
def _chart_for(version: str) -> Path:
    """The chart for a version: this Helm has no --kube-version, so a copy has it in its text."""
    if not version:
        return CHART
    folder = Path(tempfile.mkdtemp(prefix="osft-chart-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copied = folder / CHART.name
    major, minor = version.split(".")[:2]
    shutil.copytree(CHART, copied)
    found = 0
    for path in (each for each in copied.joinpath("templates").rglob("*") if each.is_file()):
        text = path.read_text()
        found += text.count(VERSION)
        path.write_text(text.replace(VERSION, f'"v{major}.{minor}.0"'))
    assert found, "no template looks at the version any more"
    return copied


def notes(values: dict[str, Any], version: str = "") -> str:
    """What `helm install` prints; the version is that of Kubernetes, like render's."""
    texts = _texts(values, _chart_for(version), RELEASE, NAMESPACE)
    return texts[f"{CHART.name}/templates/NOTES.txt"].strip()


def _texts(values: dict[str, Any], chart: Path, release: str, home: str) -> dict[str, str]:
    with helm_python.Chart.load(chart) as loaded:
        loaded.validate_schema(values)
        found: dict[str, str] = loaded.render(values, name=release, namespace=home)
    return found


@functools.cache
def _rendered(values: str, version: str, release: str, home: str) -> list[dict[str, Any]]:
    texts = _texts(json.loads(values), _chart_for(version), release, home)
    documents = [
        _parsed(document)
        for path, text in texts.items()
        if path.endswith(".yaml")
        for document in text.split("\n---\n")
    ]
    return [document for document in documents if document]


@functools.cache
def _parsed(text: str) -> Any:
    # most renderings repeat each other's objects
    return yaml.load(text, StrictLoader)


class StrictLoader(yaml.SafeLoader):
    """Refuses a name that stands twice in one mapping, as Flux does."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    found = loader.construct_mapping(node, deep=True)
    names = [loader.construct_object(name, deep=True) for name, _ in node.value]
    assert len(names) == len(found), f"a name stands twice in {names}"
    return found


StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def validate(version: str, item: dict[str, Any]) -> None:
    """Refuse unknown fields and wrong values of an object, for that Kubernetes."""
    _validated(version, json.dumps(item))


@functools.cache
def _validated(version: str, document: str) -> None:
    item = json.loads(document)
    schema = monitoring_kinds.SCHEMAS.get(item["kind"])
    if schema is not None:
        jsonschema.validate(item, schema)
    else:
        kubernetes_validate.validate(item, version, strict=True)


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The one object of a kind."""
    found = [item for item in objects if item["kind"] == kind]
    assert len(found) == 1, [item["metadata"]["name"] for item in found]
    return found[0]


def pod_of(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The operator's pod specification."""
    spec: dict[str, Any] = only(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def environment(values: dict[str, Any]) -> dict[str, str]:
    """The operator's OSFT_* variables as the container sees them, field references filled in."""
    fields = {"metadata.namespace": NAMESPACE, "metadata.name": "the-pod"}
    (container,) = pod_of(render(values))["containers"]
    return {
        item["name"]: item["value"]
        if "value" in item
        else fields[item["valueFrom"]["fieldRef"]["fieldPath"]]
        for item in container["env"]
        if item["name"].startswith("OSFT_")
    }


def rules(objects: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rules of every role in the chart."""
    for item in objects:
        if item["kind"] in ("Role", "ClusterRole"):
            yield from item["rules"]
