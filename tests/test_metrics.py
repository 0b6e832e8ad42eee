"""Metrics and probes over HTTP, as Prometheus and the kubelet read them."""

from __future__ import annotations

import platform
import socket
import urllib.error
import urllib.request
from typing import Any

import pytest

from osft_operator import metrics, probes
from osft_operator.settings import Settings


def fetch(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_have_the_names_that_dashboards_know() -> None:
    metrics.reconciles.labels(metrics.CONTROLLER, "success").inc()
    metrics.api_requests.labels("200", "GET", "127.0.0.1:6443").inc()
    port, close = metrics.serve("127.0.0.1", 0)
    try:
        code, text = fetch(port, "/metrics")
    finally:
        close()
    assert code == 200
    assert 'controller_runtime_reconcile_total{controller="osftjob",result="success"}' in text
    labels = '{code="200",host="127.0.0.1:6443",method="GET"}'
    assert f"rest_client_requests_total{labels}" in text
    assert f'osft_operator_build_info{{python_version="{platform.python_version()}"' in text
    # controller-runtime's and client-go's own names, for dashboards that are there already
    for name in (
        "controller_runtime_reconcile_errors_total",
        "controller_runtime_reconcile_time_seconds",
        "workqueue_adds_total",
        "workqueue_depth",
        "workqueue_longest_running_processor_seconds",
        "workqueue_queue_duration_seconds",
        "workqueue_retries_total",
        "workqueue_unfinished_work_seconds",
        "workqueue_work_duration_seconds",
        "leader_election_master_status",
    ):
        assert f"# TYPE {name} " in text, name


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_probes_answer_and_readiness_waits_for_the_first_sync() -> None:
    clock = Clock()
    health = probes.Health(Settings(), clock=clock)
    port, close = probes.serve(health, "127.0.0.1", 0)
    try:
        assert fetch(port, "/healthz") == (200, "ok")
        assert fetch(port, "/readyz")[0] == 503
        health.ready = True
        assert fetch(port, "/readyz") == (200, "ok")
        assert fetch(port, "/elsewhere")[0] == 404
        clock.now += 31
        code, text = fetch(port, "/healthz")
        assert code == 503
        assert "the event loop stands still for 31 s" in text
    finally:
        close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on the loopback")
@pytest.mark.parametrize(
    ("address", "hosts"), [("::1", ["[::1]"]), (Settings().bind_address, ["[::1]", "127.0.0.1"])]
)
def test_probes_and_metrics_are_served_on_ipv6(address: str, hosts: list[str]) -> None:
    """As shipped, on IPv4, too: a cluster has one of them, or both."""
    address = probes.usable(address)
    port, close = probes.serve(probes.Health(Settings()), address, 0)
    try:
        assert {fetch(port, "/healthz", host) for host in hosts} == {(200, "ok")}
    finally:
        close()
    port, close = metrics.serve(address, 0)
    try:
        assert {fetch(port, "/metrics", host)[0] for host in hosts} == {200}
    finally:
        close()


@pytest.mark.parametrize("fails", ["socket", "bind"])
def test_without_ipv6_all_of_ipv4_is_served(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without it has no such socket; one where it is switched off has no such address."""

    class Socket(socket.socket):
        def __init__(self, family: int) -> None:
            if fails == "socket":
                raise OSError("Address family not supported by protocol")
            super().__init__(family)

        def bind(self, _: Any) -> None:
            raise OSError("Cannot assign requested address")

    with monkeypatch.context() as without:
        without.setattr(socket, "socket", Socket)
        address = probes.usable(Settings().bind_address)
    port, close = probes.serve(probes.Health(Settings()), address, 0)
    try:
        assert fetch(port, "/healthz", "127.0.0.1") == (200, "ok")
    finally:
        close()
    assert probes.usable("10.0.0.7") == "10.0.0.7"


def test_liveness_fails_when_work_stops_though_the_loop_runs() -> None:
    clock = Clock()
    health = probes.Health(Settings(), clock=clock)
    health.resynced(True)
    health.beat(91, 0)
    assert health.problems() == ["OSFTJobs are due, and none was taken up for 91 s"]
    health.beat(0, 60)
    assert health.problems() == []
    health.beat(0, 76)
    assert health.problems() == ["the watches have been behind the API server for 76 s"]
    health.beat(0, 0)
    assert health.problems() == []
    clock.now += 1201
    health.beat(0, 0)
    assert health.problems() == ["the last list ended 1201 s ago"]
    health.resynced(False)
    assert health.problems() == []


def test_readiness_says_what_is_left_out() -> None:
    health = probes.Health(Settings())
    health.ready = True
    health.remarks = lambda: ["namespace a is not served: pods: no"]
    port, close = probes.serve(health, "127.0.0.1", 0)
    try:
        assert fetch(port, "/readyz") == (200, "ok\nnamespace a is not served: pods: no")
        assert fetch(port, "/healthz") == (200, "ok")
    finally:
        close()


def test_a_standby_that_never_syncs_is_healthy() -> None:
    clock = Clock()
    health = probes.Health(Settings(), clock=clock)
    clock.now += 10**6
    health.beat(0, 0)
    assert health.problems() == []
