"""Values that the chart refuses, before anything is installed.

What is wrong by itself is refused by the schema, what is wrong together by the templates; both name
the value and the cure.
"""

from __future__ import annotations

import re
from typing import Any

import helm_python
import pytest

from chart_rendering import CHART, render


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "replica"),
        ({"leaderElection": {"enable": False}}, "enable"),
        ({"trainer": {"image": {"registery": "x"}}}, "registery"),
        ({"logging": {"level": "LOUD"}}, "/logging/level"),
        ({"replicas": "2"}, "/replicas"),
        ({"runAsUser": 0}, "/runAsUser"),
        # their pods, too, are runAsNonRoot
        ({"trainer": {"runAsUser": 0}}, "/trainer/runAsUser"),
        ({"image": {"digest": "sha256:123"}}, "/image/digest"),
        ({"extraEnv": [{"name": "OSFT_WORKERS", "value": "9"}]}, "/extraEnv/0/name"),
        ({"policy": {"images": ["a,b"]}}, "/policy/images/0"),
        ({"policy": {"image": []}}, "image"),
        (
            {"metrics": {"serviceMonitor": {"interval": "often"}}},
            "/metrics/serviceMonitor/interval",
        ),
        ({"podLabels": {"app.kubernetes.io/name": "mine"}}, "app.kubernetes.io/name"),
        ({"podLabels": {"a b": "mine"}}, "a b"),
        ({"commonLabels": {"a": "two words"}}, "/commonLabels/a"),
        ({"leaderElection": {"leaseName": "My Lease"}}, "/leaderElection/leaseName"),
        ({"serviceAccount": {"name": "A"}}, "/serviceAccount/name"),
        ({"image": {"registry": "https://here"}}, "/image/registry"),
        ({"image": {"repository": "osft:1"}}, "/image/repository"),
        ({"probes": {"bindAddress": "127.0.0.1"}}, "/probes/bindAddress"),
        ({"probes": {"bindAddress": "localhost"}}, "/probes/bindAddress"),
        ({"metrics": {"prometheusRule": {"queueSeconds": 0.5}}}, "/prometheusRule/queueSeconds"),
        ({"metrics": {"prometheusRule": {"gpuWaitSeconds": 1e30}}}, "/gpuWaitSeconds"),
        ({"reconcile": {"resyncSeconds": 0.1}}, "/reconcile/resyncSeconds"),
        ({"podDisruptionBudget": {"maxUnavailable": "0%"}}, "/podDisruptionBudget/maxUnavailable"),
        ({"podDisruptionBudget": {"maxUnavailable": "100%"}}, "/maxUnavailable"),
        ({"networkPolicy": {"metricsFrom": [{}]}}, "/networkPolicy/metricsFrom/0"),
        ({"networkPolicy": {"metricsFrom": [{"podSelecter": {}}]}}, "podSelecter"),
        (
            {"networkPolicy": {"metricsFrom": [{"podSelector": {}, "ipBlock": {"cidr": "::/0"}}]}},
            "/networkPolicy/metricsFrom/0",
        ),
        *(
            ({"networkPolicy": {"metricsFrom": [{"ipBlock": {"cidr": cidr}}]}}, "/ipBlock/cidr")
            for cidr in ("999.1.1.1/99", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.0")
        ),
        ({"networkPolicy": {"apiServerPorts": [443, 443]}}, "/networkPolicy/apiServerPorts"),
        ({"resources": {"limits": {"memory": "1 GiB"}}}, "/resources/limits/memory"),
        ({"extraEnv": [{"name": "A=B", "value": "x"}]}, "/extraEnv/0/name"),
        ({"extraEnv": [{"name": "A", "value": "x", "valueFrom": {"fieldRef": {}}}]}, "/extraEnv/0"),
        ({"tolerations": [{"effect": "NoWay"}]}, "/tolerations/0/effect"),
        # without a key only `Exists` is taken: every taint
        ({"tolerations": [{}]}, "/tolerations/0"),
        ({"tolerations": [{"operator": "Equal", "value": "x"}]}, "/tolerations/0"),
        ({"affinity": {"nodeafinity": {}}}, "nodeafinity"),
        ({"topologySpreadConstraints": [{"maxSkew": 1}]}, "/topologySpreadConstraints/0"),
        ({"nodeSelector": {"kubernetes.io/os": "two words"}}, "/nodeSelector"),
        ({"priorityClassName": "A B"}, "/priorityClassName"),
        ({"policy": {"capabilities": ["CAP_IPC_LOCK"]}}, "/policy/capabilities/0"),
        ({"terminationGracePeriodSeconds": 5}, "/terminationGracePeriodSeconds"),
    ],
)
def test_schema_names_what_is_wrong(values: dict[str, Any], named: str) -> None:
    with (
        helm_python.Chart.load(CHART) as chart,
        pytest.raises(helm_python.HelmValuesError, match=re.escape(named)),
    ):
        chart.validate_schema(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"networkPolicy": {"enabled": True, "trainers": True}}, "watch.namespaces"),
        ({"metrics": {"prometheusRule": {"enabled": True}}}, "metrics.serviceMonitor.enabled"),
        (
            {"metrics": {"serviceMonitor": {"enabled": True}, "service": {"enabled": False}}},
            "metrics.service.enabled",
        ),
        ({"leaderElection": {"renewSeconds": 8}}, "leaderElection.renewSeconds is 8"),
        ({"metrics": {"port": 8081}}, "probes.port and metrics.port are both 8081"),
        ({"reconcile": {"backoffMaxSeconds": 0.5}}, "reconcile.backoffInitialSeconds is 1"),
        ({"reconcile": {"watchCheckSeconds": 60}}, "set it to at least 135"),
        ({"probes": {"watchStallSeconds": 54}}, "set it to at least 55"),
        ({"serviceAccount": {"create": False}}, "name an account"),
        (
            {"replicas": 2, "podDisruptionBudget": {"maxUnavailable": 2}},
            "podDisruptionBudget.maxUnavailable is 2 of 2",
        ),
        (
            {"replicas": 2, "podDisruptionBudget": {"maxUnavailable": "51%"}},
            "podDisruptionBudget.maxUnavailable is 51% of 2",
        ),
        (
            {"replicas": 10, "podDisruptionBudget": {"maxUnavailable": "91%"}},
            "podDisruptionBudget.maxUnavailable is 91% of 10",
        ),
        ({"networkPolicy": {"metricsFrom": [{"podSelector": {}}]}}, "networkPolicy.enabled"),
        ({"extraEnv": [{"name": "A"}, {"name": "A"}]}, "extraEnv has A twice"),
        ({"fullnameOverride": "1osft"}, "set fullnameOverride"),
    ],
)
def test_what_goes_ill_together_is_refused_with_the_cure(
    values: dict[str, Any], words: str
) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=re.escape(words)):
        render(values)


def test_a_release_whose_name_no_service_can_have_is_told_the_cure() -> None:
    with pytest.raises(helm_python.HelmRenderError, match=r"called a\.b-osft-operator, but a"):
        render({}, release="a.b")
    assert render({"fullnameOverride": "osft"}, release="a.b")
    assert render({"metrics": {"service": {"enabled": False}}}, release="a.b")


def test_what_is_like_a_mistake_and_is_none_is_taken() -> None:
    blocks = ("0.0.0.0/0", "10.1.2.3/32", "fd00::/8", "::ffff:10.0.0.1/128")
    peers = [{"ipBlock": {"cidr": cidr, "except": [cidr]}} for cidr in blocks]
    both = {"podSelector": {}, "namespaceSelector": {}}
    tolerations = [{"operator": "Exists"}, {"key": "a", "value": "b"}]
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(
            {"networkPolicy": {"metricsFrom": [*peers, both]}, "tolerations": tolerations}
        )
