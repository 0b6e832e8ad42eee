"""The chart's network policies: what reaches training pods, and what the operator reaches."""

from __future__ import annotations

import job_samples
from chart_rendering import (
    MATRIX,
    NAMESPACE,
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


def test_a_reader_of_metrics_is_the_same_pod_for_operator_and_trainers() -> None:
    prometheus = {"podSelector": {"matchLabels": {"app": "prometheus"}}}
    everywhere = {"namespaceSelector": {}, **prometheus}
    outside = {"ipBlock": {"cidr": "10.0.0.0/8"}}
    readers = [prometheus, everywhere, outside]
    closed = {"enabled": True, "trainers": True, "metricsFrom": readers}
    values = {**MATRIX["namespaces only"], "networkPolicy": closed}
    policies = {
        item["metadata"]["namespace"]: item["spec"]["ingress"][1]["from"]
        for item in render(values)
        if item["kind"] == "NetworkPolicy"
    }
    assert policies[NAMESPACE][:3] == readers
    # in the team's namespace the same words would be pods of the team
    home = {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}}
    for team in ("team-a", "team-b"):
        _, *found = policies[team]
        assert found == [{"namespaceSelector": home, **prometheus}, everywhere, outside]


def test_network_policy_opens_the_way_to_progress() -> None:
    policy = only(render({"networkPolicy": {"enabled": True}}), "NetworkPolicy")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert sorted(ports) == sorted([53, 53, 443, 6443, report.METRICS_PORT])
