"""Patterns of the allow-lists: what they match, and that no tenant's text keeps them busy."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_operator.policy_allowed import matches, refused_labels

TEXTS = st.text("ab*/", max_size=12)


@given(TEXTS, TEXTS)
def test_a_star_stands_for_any_characters(value: str, pattern: str) -> None:
    expression = ".*".join(map(re.escape, pattern.split("*")))
    assert matches(value, [pattern]) is (re.fullmatch(expression, value, re.DOTALL) is not None)


def test_no_text_keeps_a_pattern_busy() -> None:
    """A backtracking expression would take years for this one."""
    assert not matches("a" * 100_000 + "c", ["a*" * 40 + "b"])


TERM = {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h200"]}]}


@pytest.mark.parametrize(
    "required",
    [
        {"nodeSelectorTerms": [TERM]},
        {"nodeSelectorTerms": [TERM], "matchExpressions": []},
        {"nodeSelectorTerms": [TERM], "matchFields": []},
        {"nodeSelectorTerms": [{"matchExpressions": [], "more": [TERM]}]},
    ],
)
def test_a_key_that_does_not_belong_there_hides_no_label(required: dict[str, Any]) -> None:
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    asked = [text for _, text in refused_labels({"affinity": affinity}, ["zone=*"])]
    assert asked == ["gpu=h200"]
