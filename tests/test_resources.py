"""Quantities are read exactly and bounded, and an amount that no pod can have is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn import examples
from job_samples import job
from osft_operator.policy import denials
from osft_operator.resources import QUANTITY_PATTERN, gpus, is_counted, quantity, threads
from osft_operator.spec import OSFTJob, problems

POD = "spec.podTemplate.spec"
SUFFIXES = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("500m", Fraction(1, 2)),
        ("2Gi", 2**31),
        ("1e3", 1000),
        ("1.5k", 1500),
        ("+5.", 5),
        (".5", Fraction(1, 2)),
        ("1E", 10**18),
        ("1E1", 10),
        ("0.1", Fraction(1, 10)),
        ("9223372036854775807", 2**63 - 1),
        ("1e-999", Fraction(1, 10**9)),
        ("0e999", 0),
    ],
)
def test_quantities_are_exact(text: str, value: Fraction) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize(
    "text", ["1e999", "1e99999999999999999999", "8Ei", "9223372036854775808", "-1", "", "1\n", "٣"]
)
def test_what_is_no_quantity_or_cannot_be_counted_is_an_error_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"write (a number|for instance)"):
        quantity(text)


@settings(max_examples=examples(50), deadline=None)
@given(st.from_regex(QUANTITY_PATTERN, fullmatch=True).map(str.strip))
def test_every_text_of_the_grammar_is_a_number_or_refused(text: str) -> None:
    """Whatever passes the schema's pattern ends in a number below 8E or in one plain error."""
    if len(text) <= 32 and is_counted(text):
        assert 0 <= quantity(text) < 2**63
    else:
        found = problems(job({"spec.sharedMemory.sizeLimit": text}))
        assert all(line.startswith("spec.sharedMemory.sizeLimit: ") for line in found)
        assert found


@given(st.integers(0, 10**19), st.sampled_from([*SUFFIXES, "e0", "E+9", "e17", "e-9"]))
def test_the_pattern_of_what_can_be_counted_agrees_with_the_number(
    number: int, suffix: str
) -> None:
    """The API server sees the pattern, the operator the number: the pattern never takes more."""
    if is_counted(f"{number}{suffix}"):
        quantity(f"{number}{suffix}")
    elif number < 10**18 and suffix in ("", "m", "e0"):
        pytest.fail("a plain number of at most 18 digits is refused")


def test_counts_from_resources() -> None:
    assert gpus({"nvidia.com/gpu": "8", "cpu": "4"}) == 8
    assert gpus({"amd.com/gpu": "2", "rdma/hca": "1"}) == 2
    assert threads({"cpu": "17"}, {}, 4) == 4
    assert threads({}, {"cpu": "500m"}, 1) == 1
    assert threads({}, {}, 1) is None
    assert threads({}, {}, 2) == 1


def _container(resources: Any) -> dict[str, Any]:
    return {f"{POD}.containers": [{"name": "sidecar", "image": "x", "resources": resources}]}


def _limit(name: str, amount: Any) -> dict[str, Any]:
    return _container({"limits": {name: amount}})


LIMITS = "spec.resources.limits"
REQUESTS = "spec.resources.requests"
REFUSED: list[tuple[dict[str, Any], str]] = [
    (_limit("nvidia.com/gpu", "0.5"), "whole numbers"),
    (_limit("nvidia.com/gpu", "1e999"), "limits[nvidia.com/gpu]: '1e999' is beyond"),
    (_limit("memory", "10 GB"), "is no quantity"),
    (_limit("memory", 0.5), "must be a quantity"),
    (_limit("memory", True), "must be a quantity"),
    (_limit("cpu", -1), "is no quantity"),
    (_limit("gpu", 1), "gpu is no resource of a container"),
    (_container({"limits": ["cpu"]}), "must be a map of quantities"),
    (_container("many"), "must be an object"),
    (_container({"limits": {"cpu": 1}, "requests": {"cpu": 2}}), "at most the limit, which is 1"),
    (
        {f"{POD}.initContainers": [{"name": "i", "resources": {"limits": {"a/b": "1m"}}}]},
        "initContainers[0].resources.limits[a/b]",
    ),
    ({f"{POD}.resources": {"requests": {"cpu": "1e99"}}}, f"{POD}.resources.requests[cpu]"),
    ({f"{POD}.overhead": {"cpu": "1e99"}}, f"{POD}.overhead[cpu]"),
    (
        {f"{POD}.volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1e99"}}]},
        "volumes[0].emptyDir.sizeLimit",
    ),
    (
        {
            f"{POD}.volumes": [
                {
                    "name": "v",
                    "ephemeral": {
                        "volumeClaimTemplate": {
                            "spec": {"resources": {"requests": {"storage": "1e99"}}}
                        }
                    },
                }
            ]
        },
        "ephemeral.volumeClaimTemplate.spec.resources.requests[storage]",
    ),
    (
        {
            f"{POD}.containers": [
                {
                    "name": "s",
                    "env": [{"name": "A", "valueFrom": {"resourceFieldRef": {"divisor": "1e99"}}}],
                }
            ]
        },
        "env[0].valueFrom.resourceFieldRef.divisor",
    ),
    ({LIMITS: {"gpu": 1}}, "write for instance nvidia.com/gpu"),
    ({LIMITS: {"nvidia.com/gpu": 1025}}, "set spec.nprocPerNode"),
    ({REQUESTS: {"nvidia.com/gpu": 1}}, "set spec.resources.limits[nvidia.com/gpu] to 1"),
    ({LIMITS: {"a/b": 2}, REQUESTS: {"a/b": 1}}, "the same as the limit"),
    ({LIMITS: {"memory": "1Gi"}, REQUESTS: {"memory": "1025Mi"}}, "at most the limit"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_amounts_that_no_pod_can_have_are_refused(changes: dict[str, Any], words: str) -> None:
    found = [str(each) for each in denials(OSFTJob.model_validate(job(changes)))]
    assert any(words in line for line in found), found
    assert len(found) == 1, "one error for one mistake"


@pytest.mark.parametrize(
    "changes",
    [
        _container({"limits": {"cpu": "500m", "a/b": "2.0"}, "requests": {"a/b": 2}}),
        _container(None),
        _container({"limits": None}),
        {LIMITS: {"nvidia.com/gpu": 1025}, "spec.nprocPerNode": 8},
        {LIMITS: {"hugepages-2Mi": "1Gi", "cpu": 1}, REQUESTS: {"cpu": "1", "memory": "1Gi"}},
        {f"{POD}.volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Gi"}}]},
    ],
)
def test_other_amounts_are_not(changes: dict[str, Any]) -> None:
    assert denials(OSFTJob.model_validate(job(changes))) == []
