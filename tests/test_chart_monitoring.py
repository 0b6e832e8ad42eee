"""ServiceMonitor, alerts and dashboard: every name in them is one that is exported."""

from __future__ import annotations

import json
import re
from typing import Any

import helm_python
import pytest

import promql
from chart_rendering import CHART, MATRIX, environment, only, render
from osft_operator import job_metrics
from osft_operator.metrics import registry
from osft_operator.probes import RESYNCS_MISSED
from osft_operator.resync import WATCHED
from osft_operator.settings import Settings

SERIES = promql.exported() | {"up": frozenset()}
LONGEST_INTERVAL = 120
"""Seconds between scrapes that the alerts are made for."""


def monitoring(**changes: Any) -> list[dict[str, Any]]:
    return render({"metrics": {**MATRIX["monitoring"]["metrics"], **changes}})


def alerts(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups = only(objects, "PrometheusRule")["spec"]["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def dashboard() -> dict[str, Any]:
    maps = only(monitoring(), "ConfigMap")
    found: dict[str, Any] = json.loads(maps["data"]["osft.json"])
    return found


def queries() -> list[str]:
    panels = dashboard()["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    variables = dashboard()["templating"]["list"]
    found += [each["query"] for each in variables if each["type"] == "query"]
    return found + [rule["expr"] for rule in alerts(monitoring()).values()]


@pytest.mark.parametrize("query", queries())
def test_every_query_asks_for_what_is_exported(query: str) -> None:
    found = list(promql.asked(query))
    assert found, "asks for nothing"
    own: set[str] = set()
    for each in found:
        assert each.metric in SERIES, f"{each.metric} is not exported"
        own |= SERIES[each.metric]
        assert each.labels <= SERIES[each.metric] | promql.TARGET, each
    assert promql.grouped(query) <= own | promql.TARGET


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ('sum by (a, b) (rate(x_total{c="}",d=~"e"}[5m])) > 0', {("x_total", "cd")}),
        ("time() - max(y) > 900 or absent(z == 1)", {("y", ""), ("z", "")}),
    ],
)
def test_the_reader_of_queries_reads(query: str, found: set[tuple[str, str]]) -> None:
    seen = {(each.metric, "".join(sorted(each.labels))) for each in promql.asked(query)}
    assert seen == {(name, labels) for name, labels in found}


def test_everything_that_is_promised_has_an_alert() -> None:
    found = alerts(monitoring())
    assert found.keys() == {
        "OSFTOperatorDown",
        "OSFTOperatorNoLeader",
        "OSFTOperatorQueueOld",
        "OSFTOperatorWatchStale",
        "OSFTOperatorListStale",
        "OSFTOperatorNamespaceNotServed",
        "OSFTOperatorErrors",
        "OSFTOperatorBug",
        "OSFTJobStalled",
        "OSFTJobLossNotFinite",
        "OSFTJobWaitsForGPUs",
    }
    documented = re.findall(r"^\| (OSFT\w+) \|", (CHART / "README.md").read_text(), re.MULTILINE)
    assert documented == list(found)
    for rule in found.values():
        assert {"summary", "description"} == rule["annotations"].keys()


def test_alerts_say_whose_they_are() -> None:
    objects = monitoring()
    service = only(objects, "Service")["metadata"]
    for rule in alerts(objects).values():
        # max and the like drop what the series say of themselves
        severity = rule["labels"].pop("severity")
        assert severity in ("critical", "warning")
        assert rule["labels"] == {"namespace": service["namespace"], "service": service["name"]}


def test_alerts_ask_what_the_service_monitor_scrapes() -> None:
    objects = monitoring()
    service = only(objects, "Service")
    monitor = only(objects, "ServiceMonitor")
    chosen = monitor["spec"]["selector"]["matchLabels"].items()
    assert chosen <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    # else Prometheus renames the jobs' own label to exported_namespace
    assert endpoint["honorLabels"] is True
    name, home = service["metadata"]["name"], service["metadata"]["namespace"]
    for rule in alerts(objects).values():
        # two releases of one name, in two namespaces, are two operators
        selectors = re.findall(r"\{([^}]*)\}", rule["expr"])
        assert len(selectors) == len(list(promql.asked(rule["expr"])))
        for each in selectors:
            assert f'namespace="{home}"' in each
            assert f'service="{name}"' in each


def test_every_panel_shows_the_chosen_operator_alone() -> None:
    variables = {each["name"]: each for each in dashboard()["templating"]["list"]}
    assert list(variables) == ["datasource", "home", "service", "namespace", "name"]
    targets = [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", [])]
    assert targets
    for query in targets:
        for each in re.findall(r"\{([^}]*)\}", query):
            assert 'service=~"$service"' in each
            # a single job's namespace is its own; that of all other numbers is the operator's
            of_a_job = 'namespace=~"$namespace",name=~"$name"' in each
            assert of_a_job or 'namespace=~"$home"' in each
    for name, chosen in (("service", "$home"), ("namespace", "$service"), ("name", "$namespace")):
        assert chosen in variables[name]["query"]


def test_a_number_and_a_table_are_of_now_and_a_table_shows_columns() -> None:
    now = [panel for panel in dashboard()["panels"] if panel["type"] in ("stat", "table")]
    for panel in now:
        for target in panel["targets"]:
            # over a time, the last value of a series that has ended would be shown
            assert target["instant"] is True, panel["title"]
            assert target["range"] is False, panel["title"]
    (table,) = [panel for panel in now if panel["type"] == "table"]
    (target,), (columns,) = table["targets"], table["transformations"]
    assert target["format"] == "table"
    assert promql.grouped(target["expr"]) == {"namespace", "name", "phase"}
    assert columns["options"]["excludeByName"] == {"Time": True, "Value": True}


def test_a_job_is_one_line_and_one_that_has_ended_has_no_speed() -> None:
    queries = {
        panel["title"]: target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", [])
        if "name=~" in target["expr"]
    }
    assert len(queries) == 1 + len(job_metrics.PER_JOB)
    for query in queries.values():
        # each leader tells them under its own pod
        assert promql.grouped(query) >= {"namespace", "name"}
    for title in ("Tokens per second", "Time left", "Age of the last progress"):
        numbers, _, running = queries[title].partition(" and on (namespace, name) ")
        assert numbers.endswith(")")
        assert re.fullmatch(r'osftjob_info\{.*,phase="Running"\}', running)


@pytest.mark.parametrize(
    "alert",
    ["OSFTOperatorWatchStale", "OSFTOperatorErrors", "OSFTOperatorBug", "OSFTJobLossNotFinite"],
)
def test_what_an_alert_sees_grow_is_there_before_the_first_time(alert: str) -> None:
    asked = re.findall(r"(?:increase|rate)\((\w+)", alerts(monitoring())[alert]["expr"])
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    assert asked
    for name in asked:
        found = [sample.labels for sample in samples if sample.name == name]
        assert found, "a series that is born at 1 has not increased"
        if name == "osft_operator_resync_drift_total":
            assert {each["kind"] for each in found} == {kind.plural for kind in WATCHED}


def test_thresholds_are_values() -> None:
    rule = {"enabled": True, "queueSeconds": 77, "gpuWaitSeconds": 88}
    objects = monitoring(prometheusRule=rule)
    assert "> 77" in alerts(objects)["OSFTOperatorQueueOld"]["expr"]
    assert "> 88" in alerts(objects)["OSFTJobWaitsForGPUs"]["expr"]


@pytest.mark.parametrize(("resync", "seconds"), [(1000, 3000), (100, 300), (5, 300), (1.5, 300)])
def test_stale_is_three_resyncs_and_never_less_than_scrapes_show(
    resync: float, seconds: int
) -> None:
    metrics_values = MATRIX["monitoring"]["metrics"]
    found = alerts(render({"metrics": metrics_values, "reconcile": {"resyncSeconds": resync}}))
    lists, watch = found["OSFTOperatorListStale"], found["OSFTOperatorWatchStale"]
    # with 2m between scrapes, two samples lie in the window and no age seems higher than it is
    assert lists["expr"].endswith(f" > {seconds}")
    assert f"[{seconds}s]" in watch["expr"]
    assert watch["for"] == f"{seconds}s"


def test_lists_that_do_not_end_are_told_before_liveness_ends_the_process() -> None:
    settings = Settings.from_environ(environment({}))
    found = alerts(monitoring())["OSFTOperatorListStale"]
    threshold = int(found["expr"].rpartition(" > ")[2])
    waits = int(found["for"].removesuffix("m")) * 60
    assert threshold + waits < RESYNCS_MISSED * settings.resync_seconds
    # else a process that has only begun, and tells 0, would be an alert by the next scrape
    assert waits > LONGEST_INTERVAL


@pytest.mark.parametrize("interval", ["2m", "120s", "1m60s", "500ms", "30s", "1m59s999ms"])
def test_alerts_can_count_on_scrapes_that_are_near_each_other(interval: str) -> None:
    monitor = {"enabled": True, "interval": interval}
    (endpoint,) = only(monitoring(serviceMonitor=monitor), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["interval"] == interval


@pytest.mark.parametrize("interval", ["1h", "3m", "121s", "2m1ms", "1m61s", "200000ms"])
def test_alerts_are_refused_where_numbers_vanish_between_scrapes(interval: str) -> None:
    monitor = {"enabled": True, "interval": interval}
    with pytest.raises(helm_python.HelmRenderError, match="at most 2m"):
        monitoring(serviceMonitor=monitor)
    assert monitoring(serviceMonitor=monitor, prometheusRule={"enabled": False})
