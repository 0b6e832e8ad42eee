"""How many status writes may come, and whose: as many as there are, shared by namespaces."""

from __future__ import annotations

from osft_operator.budget import Budget
from osft_operator.queue import Key


def key(name: object, namespace: str = "n") -> Key:
    return Key(namespace, str(name))


def test_a_budget_is_shared_and_refills() -> None:
    now = [0.0]
    budget = Budget(2, lambda: now[0])
    assert [budget.take(key(each)) for each in "abc"] == [0, 0, 0.5]
    now[0] += 0.5
    assert budget.take(key("c")) == 0
    now[0] += 100
    assert [budget.take(key(each)) for each in "abc"] == [0, 0, 0.5]


def test_who_waits_for_the_budget_has_a_place_of_its_own() -> None:
    now = [0.0]
    budget = Budget(2, lambda: now[0])
    waits = [budget.take(key(each)) for each in range(1000)]
    assert waits[:5] == [0, 0, 0.5, 1, 1.5]
    assert len(set(waits[1:])) == 999, "else all come again at once, each time"
    now[0] += 1
    assert [budget.take(key(each)) for each in (2, 4, 3)] == [0, 0.5, 0]
    budget.forget(key(4))
    assert budget.take(key(4)) > 400, "a place that was given up is at the end"


def test_a_burst_of_one_namespace_puts_off_no_other() -> None:
    now = [0.0]
    budget = Budget(20, lambda: now[0])
    burst = [budget.take(key(each, "crowd")) for each in range(10_000)]
    assert burst[-1] > 400
    assert [budget.take(key(each, "other")) for each in range(5)] == [0] * 5
    # and whatever many namespaces want, not much more than the bound is used
    waits = [budget.take(key(each, f"n-{each % 50}")) for each in range(1000)]
    in_ten_seconds = sum(wait < 10 for wait in waits)
    assert in_ten_seconds < 4 * 20 * 10
