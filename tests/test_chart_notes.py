"""What `helm install` prints: names that exist, and what each choice of values brings with it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from chart_rendering import NAMESPACE, notes, only, render


def test_what_it_names_is_there() -> None:
    text, objects = notes({}), render({})
    (deployment,) = re.findall(r"rollout status deployment/(\S+)", text)
    assert deployment == only(objects, "Deployment")["metadata"]["name"]
    assert f"helm -n {NAMESPACE} test osft" in text
    asked = only(objects, "ValidatingAdmissionPolicy")["spec"]["validations"][0][
        "messageExpression"
    ]
    assert "create pytorchjobs.kubeflow.org" in text
    assert "create pytorchjobs.kubeflow.org" in asked


@pytest.mark.parametrize(
    ("values", "words", "otherwise"),
    [
        ({"watch": {"namespaces": ["a", "b"]}}, "works in namespaces a, b.", "in all namespaces."),
        ({"crds": {"enabled": False}}, "apply the OSFTJob's CustomResourceDefinition", ""),
        ({"crds": {"keep": False}}, "deletes every OSFTJob in the cluster", ""),
        ({"replicas": 2, "leaderElection": {"enabled": False}}, "it was switched on", ""),
        ({"policy": {"trustRemoteCode": False}}, "policy.images allows every image", ""),
        (
            {"metrics": {"service": {"enabled": False}}},
            "",
            f"helm -n {NAMESPACE} test osft",
        ),
        ({"admissionPolicy": {"enabled": False}}, "", "kubectl auth can-i create pytorchjobs"),
    ],
)
def test_a_choice_is_followed_by_what_it_means(
    values: dict[str, Any], words: str, otherwise: str
) -> None:
    chosen, default = notes(values), notes({})
    assert words in chosen
    assert otherwise in default
    assert chosen != default
    assert not words or words not in default
    assert not otherwise or otherwise not in chosen


def test_who_cannot_be_asked_for_rights_is_said() -> None:
    old, new = notes({}, "1.29"), notes({}, "1.30")
    assert "Kubernetes v1.29.0 has no ValidatingAdmissionPolicy" in old
    assert "kubectl auth can-i create pytorchjobs" not in old
    assert "has no ValidatingAdmissionPolicy" not in new
    assert "kubectl auth can-i create pytorchjobs" in new
    off = {"admissionPolicy": {"enabled": False}}
    assert notes(off, "1.29") == notes(off, "1.30")


def test_a_definition_that_is_not_this_releases_is_not_said_to_go_with_it() -> None:
    without = notes({"crds": {"enabled": False}})
    assert notes({"crds": {"enabled": False, "keep": False}}) == without
