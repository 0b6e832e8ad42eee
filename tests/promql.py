"""Which metrics and labels a PromQL query asks for: enough of its grammar to check names.

Called by the tests of alerts, dashboard and documentation.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from osft_operator import job_metrics
from osft_operator.metrics import registry

WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right"}
WORDS |= {"bool", "offset", "inf", "nan"}
FUNCTIONS = {
    "absent",
    "histogram_quantile",
    "increase",
    "label_values",
    "max",
    "min",
    "rate",
    "sum",
}
FUNCTIONS |= {"time"}
"""Those that the chart uses; another one has to be looked up and added."""
TARGET = {"namespace", "service", "pod", "job", "instance", "endpoint", "container"}
"""Labels that a scrape through a ServiceMonitor adds."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[A-Za-z_:][A-Za-z0-9_:]*|\[[^\]]*\]|[0-9.]+|\S')


@dataclass(frozen=True)
class Asked:
    """A metric that a query asks for, with the labels it is chosen by."""

    metric: str
    labels: frozenset[str]


def asked(query: str) -> Iterator[Asked]:
    """Every metric of a query.

    Raises:
        AssertionError: the query is not of the kind that the chart uses.
    """
    tokens = _TOKEN.findall(query)
    assert tokens.count("(") == tokens.count(")"), query
    place = 0
    while place < len(tokens):
        token, following = tokens[place], tokens[place + 1 : place + 2]
        place += 1
        if not re.match(r"[A-Za-z_]", token) or token in WORDS:
            if token in ("by", "without", "on", "ignoring"):
                place = tokens.index(")", place) + 1
            continue
        if token in FUNCTIONS and following in (["("], ["by"], ["without"]):
            continue
        assert following != ["("], f"unknown function {token} in {query}"
        labels: list[str] = []
        if following == ["{"]:
            end = tokens.index("}", place)
            inside = tokens[place + 1 : end]
            labels = [
                name
                for name, after in itertools.pairwise(inside)
                if after in ("=", "!") and re.match(r"[A-Za-z_]", name)
            ]
            place = end + 1
        elif "label_values" in tokens and following in (["]"], [")"]):
            continue  # the label that Grafana asks the values of
        yield Asked(token, frozenset(labels))


def grouped(query: str) -> set[str]:
    """The labels that a query groups by."""
    found = re.findall(r"\bby\s*\(([^)]*)\)", query)
    return {label.strip() for group in found for label in group.split(",")}


def exported() -> dict[str, frozenset[str]]:
    """Every series the operator exports, with its own labels."""
    found: dict[str, frozenset[str]] = {}
    for collector in set(registry._collector_to_names):
        if not isinstance(collector, Counter | Gauge | Histogram):
            continue
        labels = frozenset(collector._labelnames)
        name = collector._name
        if isinstance(collector, Counter):
            found[f"{name}_total"] = labels
        elif isinstance(collector, Histogram):
            found[f"{name}_bucket"] = labels | {"le"}
            found[f"{name}_sum"] = found[f"{name}_count"] = labels
        else:
            found[name] = labels
    for name, _ in job_metrics.PER_JOB.values():
        found[name] = frozenset({"namespace", "name"})
    found[job_metrics.INFO[0]] = frozenset({"namespace", "name", "phase"})
    return found
