"""The pod of `helm test`: it asks the operator, is let through, and runs where the operator may."""

from __future__ import annotations

import subprocess
import sys

import pytest

from chart_rendering import MATRIX, only, pod_of, render
from osft_operator import metrics


def test_helm_test_passes_where_the_operator_answers_and_fails_elsewhere() -> None:
    pod = only(render({}), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    selector = only(render({}), "Service")["spec"]["selector"].items()
    assert not selector <= pod["metadata"]["labels"].items(), "the test would ask itself"
    python, option, script, url = pod["spec"]["containers"][0]["command"]
    assert (python, url) == (
        "python",
        "http://osft-osft-operator-metrics.osft-system.svc:8080/metrics",
    )

    def run(port: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, option, script, f"http://127.0.0.1:{port}/metrics"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    metrics.leader.labels("l").set(0)
    port, close = metrics.serve("127.0.0.1", 0)
    try:
        assert run(port).stdout == "the operator answers\n"
    finally:
        close()
    assert run(port).returncode != 0


@pytest.mark.parametrize("case", ["network policy", "defaults"])
def test_the_network_policy_lets_helm_test_through(case: str) -> None:
    values = {**MATRIX[case], "nameOverride": "n" * 63}
    objects = render(
        {**values, "networkPolicy": {**values.get("networkPolicy", {}), "enabled": True}}
    )
    test, policy = only(objects, "Pod"), only(objects, "NetworkPolicy")
    operator = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= operator
    (rule,) = [each for each in policy["spec"]["ingress"] if each["ports"][0]["port"] == 8080]
    # a peer without a namespaceSelector is in the policy's own namespace; no peers are all
    assert test["metadata"]["namespace"] == policy["metadata"]["namespace"]
    chosen = [
        peer["podSelector"]["matchLabels"].items()
        for peer in rule.get("from", [])
        if peer.keys() == {"podSelector"}
    ]
    assert "from" not in rule or any(
        each <= test["metadata"]["labels"].items() for each in chosen
    ), "helm test would time out"


def test_helm_test_runs_where_the_operator_does() -> None:
    objects = render(
        {
            **MATRIX["everything optional"],
            "podLabels": {"c": "d", "team": "own"},
            "podAnnotations": {"a": "b", "helm.sh/hook": "pre-install"},
            "affinity": {"nodeAffinity": {"x": {}}},
        }
    )
    test, operator = only(objects, "Pod"), pod_of(objects)
    for name in ("priorityClassName", "nodeSelector", "tolerations", "affinity"):
        assert test["spec"][name] == operator[name]
    assert {"c": "d", "team": "own"}.items() <= test["metadata"]["labels"].items()
    assert test["metadata"]["annotations"]["a"] == "b"
    assert test["metadata"]["annotations"]["helm.sh/hook"] == "test", "it would come too early"
    unset = only(render({}), "Pod")["spec"]
    assert not {"priorityClassName", "nodeSelector", "tolerations", "affinity"} & unset.keys()
