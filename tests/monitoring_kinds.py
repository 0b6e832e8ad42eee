"""Strict schemas of the Prometheus operator's kinds, as far as the chart uses them.

Written from the kinds' published reference; unknown fields are refused, as by the API server.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Schema = {
    "type": "string",
    "pattern": "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?"
    "(([0-9]+)ms)?)$",
}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": properties,
    }


def _kind(kind: str, spec: Schema) -> Schema:
    metadata = _object(
        ["name", "namespace"], name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS
    )
    return _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


ENDPOINT = _object(
    ["port"],
    port=TEXT,
    path=TEXT,
    scheme={"enum": ["http", "https"]},
    interval=DURATION,
    scrapeTimeout=DURATION,
    honorLabels={"type": "boolean"},
)
SERVICE_MONITOR = _object(
    ["selector", "endpoints"],
    jobLabel=TEXT,
    selector=_object([], matchLabels=TEXTS, matchExpressions={"type": "array"}),
    namespaceSelector=_object(
        [], any={"type": "boolean"}, matchNames={"type": "array", "items": TEXT}
    ),
    endpoints={"type": "array", "minItems": 1, "items": ENDPOINT},
)
ALERT = {
    **_object(
        ["alert", "expr"],
        alert=TEXT,
        expr=TEXT,
        labels=TEXTS,
        annotations=TEXTS,
        **{"for": DURATION, "keep_firing_for": DURATION},
    )
}
GROUP = _object(
    ["name", "rules"], name=TEXT, interval=DURATION, rules={"type": "array", "items": ALERT}
)
PROMETHEUS_RULE = _object(["groups"], groups={"type": "array", "items": GROUP})

SCHEMAS: dict[str, Schema] = {
    "ServiceMonitor": _kind("ServiceMonitor", SERVICE_MONITOR),
    "PrometheusRule": _kind("PrometheusRule", PROMETHEUS_RULE),
}
"""By kind."""
