"""The chart's network policies: what reaches training pods, and what the operator reaches."""

from __future__ import annotations

import job_samples
from chart_rendering import (
    MATRIX,
    only,
    render,
)
from osft_operator.pod import labels
from osft_operator.spec import OSFTJob
from osft_trainer import report


def test_training_pods_are_reached_by_their_kind_and_by_the_operator_alone() -> None:
    objects = render(MATRIX["namespaces only"])
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    (team,) = [item for item in policies if item["metadata"]["namespace"] == "team-a"]
    ours = labels(OSFTJob.model_validate(job_samples.job()), attempt=1)
    assert team["spec"]["podSelector"]["matchLabels"].items() <= ours.items()
    among, operator = team["spec"]["ingress"]
    assert among == {"from": [{"podSelector": team["spec"]["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [report.METRICS_PORT]
    (peer,) = operator["from"]
    pod = only(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= pod.items()


def test_network_policy_opens_the_way_to_progress() -> None:
    policy = only(render({"networkPolicy": {"enabled": True}}), "NetworkPolicy")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert sorted(ports) == sorted([53, 53, 443, 6443, report.METRICS_PORT])
