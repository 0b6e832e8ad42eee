"""Two operators at once: one works, and one that was paused never writes beside the other.

Each goes to the API server through a proxy of its own, which notes who writes when.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import job_samples
import operator_process
from cluster.api import wait_for
from cluster.control_plane import ControlPlane
from cluster.fault_proxy import FaultProxy
from drawn import SOAK
from operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

VALUES: dict[str, Any] = {} if SOAK else operator_process.QUICK
PAUSE_SECONDS = 60.0 if SOAK else 6.0
"""Longer than the Lease lasts."""
TAKE_OVER_SECONDS = 20.0
"""What is promised with the shipped settings, counted from the leader's death."""


@contextlib.contextmanager
def replica(
    plane: ControlPlane, namespace: str, folder: Path, mark: str, number: int
) -> Iterator[tuple[OperatorProcess, FaultProxy]]:
    """An operator behind a proxy of its own; the chart is installed."""
    place = folder / str(number)
    place.mkdir()
    operator = OperatorProcess(plane, namespace, place, f"{mark}/{number}")
    operator.environment["OSFT_INSTANCE_NAME"] = f"operator-{number}"
    with FaultProxy(Path(operator.environment["KUBECONFIG"]), place) as proxy:
        operator.environment["KUBECONFIG"] = str(proxy.kubeconfig)
        operator.start()
        try:
            yield operator, proxy
        finally:
            operator.go_on()
            operator.kill()


def writes(proxy: FaultProxy) -> list[str]:
    return [f"{each.method} {each.path}" for each in proxy.requests if each.is_write]


def is_at_rest(proxy: FaultProxy) -> bool:
    """Whether nothing is written. What a pause finds half sent is sent when it ends.

    That cannot be helped, and the API server takes it only where nothing has changed meanwhile.
    """
    before = writes(proxy)
    time.sleep(2)
    return writes(proxy) == before


def test_a_paused_leader_writes_nothing_when_it_goes_on(
    control_plane: ControlPlane,
    namespace: str,
    tmp_path: Path,
    session_mark: str,
    record_property: Callable[[str, object], None],
) -> None:
    jobs = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
    pytorch_jobs = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"

    def apply(name: str) -> None:
        control_plane.api.post(jobs, job_samples.job(name=name))

    def made() -> set[str]:
        return {each["metadata"]["name"] for each in control_plane.api.get(pytorch_jobs)["items"]}

    with (
        operator_process.running(control_plane, namespace, tmp_path, session_mark, VALUES) as chart,
        contextlib.ExitStack() as stack,
    ):
        chart.stop()  # only its chart is needed
        first, first_proxy = stack.enter_context(
            replica(control_plane, namespace, tmp_path, session_mark, 1)
        )
        second, second_proxy = stack.enter_context(
            replica(control_plane, namespace, tmp_path, session_mark, 2)
        )
        apply("one")
        wait_for("the first job", lambda: "one" in made())
        assert writes(second_proxy) == [], "the standby wrote"
        wait_for("rest", lambda: is_at_rest(first_proxy), timeout_seconds=60)
        before = writes(first_proxy)
        first.pause()
        stopped = time.monotonic()
        apply("two")
        wait_for("the second operator's work", lambda: "two" in made(), timeout_seconds=60)
        took = time.monotonic() - stopped
        record_property("takeover_seconds", took)
        record_property("pause_seconds", PAUSE_SECONDS)
        print(f"the standby took over after {took:.1f} s")
        assert took < TAKE_OVER_SECONDS
        time.sleep(max(0.0, PAUSE_SECONDS - took))
        apply("three")
        first.go_on()
        assert first.wait() == 1, "it ends, and is started anew as a standby"
        wait_for("the third job", lambda: "three" in made())
        assert writes(first_proxy) == before, "two wrote at one time"
        assert made() == {"one", "two", "three"}
        assert '"severity": "error"' not in second.log()
