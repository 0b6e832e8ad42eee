"""What one author's OSFTJob may not do to the others, shown on the running operator.

The API server is real, and takes all of these. Each job is set aside with words for its author,
and a healthy job beside them starts as soon as it does alone.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import job_samples
import operator_process
from cluster.api import ApiError, wait_for
from cluster.control_plane import ControlPlane
from cluster.fixtures import own_crds
from operator_thread import OperatorThread
from osft_operator import reconcile
from osft_operator.metrics import registry
from osft_operator.resources import QUANTITY_PATTERN

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

USUAL_SECONDS = 5.0
"""A healthy job's PyTorchJob is there after so long, whatever stands beside it."""
LIMITS = "spec.resources.limits"
POD = "spec.podTemplate.spec"

Object = dict[str, Any]


def _deep(levels: int) -> str:
    """JSON text; Python's own writer ends at a thousand levels."""
    return '{"a":' * levels + "1" + "}" * levels


HOSTILE: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpus": ({LIMITS: {"nvidia.com/gpu": "1e999"}}, "InvalidSpec", "a quantity below 8E"),
    "half": ({LIMITS: {"nvidia.com/gpu": "0.5"}}, "InvalidSpec", "whole numbers"),
    "exponent": ({LIMITS: {"cpu": "1e999999999999999999"}}, "InvalidSpec", "a quantity below 8E"),
    "sidecar": (
        {f"{POD}.containers": [{"name": "s", "resources": {"limits": {"a/b": "1e99"}}}]},
        "Denied",
        "limits[a/b]: '1e99' is beyond",
    ),
    "deep": ({f"{POD}.affinity": "DEEP600"}, "InvalidSpec", "levels deep: write it flatter"),
    "deeper": ({f"{POD}.affinity": "DEEP3000"}, "InvalidSpec", "levels deep: write it flatter"),
    "arguments": (
        {"spec.training.lrSchedulerKwargs": {"a": "DEEP990"}},
        "InvalidSpec",
        "lrSchedulerKwargs.a.a",
    ),
    "large": (
        {"spec.podTemplate.metadata": {"annotations": {"a": "x" * 1_300_000}}},
        "InvalidSpec",
        "at most 131072",
    ),
}
"""What is changed in a healthy job, and how its author is told."""


class Scene:
    """A namespace and what stands in it."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.api = plane.api
        self.jobs = f"/apis/osft.dev/v1alpha1/namespaces/{namespace}/osftjobs"
        self.pytorch_jobs = f"/apis/kubeflow.org/v1/namespaces/{namespace}/pytorchjobs"
        self.events = f"/api/v1/namespaces/{namespace}/events"

    def apply(self, name: str, changes: dict[str, Any]) -> None:
        text = json.dumps(job_samples.job(changes, name=name))
        for levels in (600, 990, 3000):
            text = text.replace(f'"DEEP{levels}"', _deep(levels))
        self.api.call("POST", self.jobs, text)

    def takes(self, changes: dict[str, Any]) -> bool:
        """Whether the API server takes such a job."""
        try:
            self.api.post(f"{self.jobs}?dryRun=All", job_samples.job(changes))
        except ApiError:
            return False
        return True

    def accepted(self, name: str) -> Object:
        status = self.api.get(f"{self.jobs}/{name}").get("status") or {}
        found = [each for each in status.get("conditions") or [] if each["type"] == "Accepted"]
        return found[0] if found else {}

    def told(self, name: str) -> set[str]:
        """Reasons of the events on a job."""
        items = self.api.get(self.events)["items"]
        return {each["reason"] for each in items if each["involvedObject"]["name"] == name}

    def seconds_until_it_starts(self, name: str) -> float:
        began = time.monotonic()
        wait_for(f"the PyTorchJob of {name}", lambda: self._has(name), timeout_seconds=60)
        return time.monotonic() - began

    def _has(self, name: str) -> bool:
        try:
            return bool(self.api.get(f"{self.pytorch_jobs}/{name}"))
        except ApiError:
            return False


@contextmanager
def _older_definition(plane: ControlPlane, scene: Scene) -> Iterator[None]:
    """The definition without rules about amounts, as an older release left it."""
    (crd,), strange = own_crds(), HOSTILE["gpus"][0]
    older = copy.deepcopy(crd)
    (version,) = older["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del spec["resources"]["x-kubernetes-validations"]
    for amounts in spec["resources"]["properties"].values():
        amounts["additionalProperties"]["pattern"] = QUANTITY_PATTERN
    try:
        plane.install_crd(older)
        wait_for("the older definition", lambda: scene.takes(strange))
        yield
    finally:
        plane.install_crd(crd)
        wait_for("the definition", lambda: not scene.takes(strange))


def test_hostile_jobs_are_set_aside_and_a_healthy_one_starts_as_soon_as_ever(
    control_plane: ControlPlane,
    namespace: str,
    session_mark: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """They are there when it starts (lists), and come while it works (watches)."""
    scene = Scene(control_plane, namespace)
    with _older_definition(control_plane, scene):
        for name, (changes, _, _) in HOSTILE.items():
            scene.apply(f"{name}-before", changes)
        scene.apply("healthy-before", {})
        with operator_process.running(
            control_plane, namespace, tmp_path, session_mark, operator_process.QUICK
        ) as operator:
            first = scene.seconds_until_it_starts("healthy-before")
            for name, (changes, _, _) in HOSTILE.items():
                scene.apply(f"{name}-after", changes)
            scene.apply("healthy-after", {})
            second = scene.seconds_until_it_starts("healthy-after")
            for name, (_, reason, words) in HOSTILE.items():
                for when in ("before", "after"):
                    _is_told(scene, f"{name}-{when}", reason, words)
            scene.apply("healthy-last", {})
            third = scene.seconds_until_it_starts("healthy-last")
            record_property("seconds", (first, second, third))
            assert max(first, second, third) < USUAL_SECONDS
            log = operator.log()
            assert log.count('"Serving"') == 1, "it ended and was started anew"
            assert '"severity": "error"' not in log, log[-5000:]
            assert "Traceback" not in log


def _is_told(scene: Scene, name: str, reason: str, words: str) -> None:
    found = wait_for(f"a word about {name}", lambda: scene.accepted(name))
    assert (found["status"], found["reason"]) == ("False", reason), found
    assert words in found["message"]
    wait_for(f"the event about {name}", lambda: reason in scene.told(name))


def test_a_bug_that_one_job_brings_out_is_told_to_its_author_and_stops_no_other(
    control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator as it is, but for a bug in the decision about one job."""
    decide = reconcile.decide

    def broken(observed: Any, now: Any) -> Any:
        if observed.name == "broken":
            raise ZeroDivisionError("division by zero")
        return decide(observed, now)

    def passes() -> float:
        labels = {"part": "decision", "reason": "InternalError"}
        return registry.get_sample_value("osft_operator_set_aside_total", labels) or 0.0

    monkeypatch.setattr(reconcile, "decide", broken)
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    scene, before = Scene(control_plane, namespace), passes()
    scene.apply("broken", {})
    with OperatorThread(namespace, backoff_max_seconds=4) as operator:
        _is_told(scene, "broken", "InternalError", "ZeroDivisionError: division by zero")
        scene.apply("healthy", {})
        assert scene.seconds_until_it_starts("healthy") < USUAL_SECONDS
        wait_for("the next try", lambda: passes() >= before + 2)
        assert passes() < before + 8, "it is tried again later each time"
        monkeypatch.setattr(reconcile, "decide", decide)
        assert scene.seconds_until_it_starts("broken") < 10
        wait_for("it is accepted", lambda: scene.accepted("broken").get("status") == "True")
        assert operator.ends == []
