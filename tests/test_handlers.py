"""What kopf's watches do with errors: one ends itself and goes on, and never the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from kopf._cogs.clients import errors

from osft_operator import handlers

PODS = SimpleNamespace(plural="pods")
ADDED = {"type": "ADDED", "object": {"metadata": {"name": "p"}}}


def watched(
    monkeypatch: pytest.MonkeyPatch, *events: Any, ends: Exception | None = None
) -> tuple[list[Any], list[float]]:
    """What kopf sees of a watch that tells these events, and how long it waits."""
    waits: list[float] = []

    async def watch(**_: object) -> AsyncIterator[Any]:
        for event in events:
            yield event
        if ends is not None:
            raise ends

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def whole() -> list[Any]:
        return [event async for event in handlers._watch_on(resource=PODS, namespace="n")]

    monkeypatch.setattr(handlers, "_kopf_watches", watch)
    monkeypatch.setattr(handlers, "asyncio", SimpleNamespace(sleep=sleep))
    return asyncio.run(whole()), waits


@pytest.mark.parametrize("status", [{"code": 500, "message": "cannot decode"}, {"code": 403}, {}])
def test_an_error_within_a_watch_is_a_new_list(
    status: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second), waits = watched(monkeypatch, ADDED, {"type": "ERROR", "object": status})
    assert first == ADDED
    assert second == {"type": "ERROR", "object": {**status, "code": handlers.GONE}}
    assert waits == [handlers.LONGEST_ERROR_WAIT]


def test_a_version_that_is_too_old_is_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"type": "ERROR", "object": {"code": handlers.GONE}}
    assert watched(monkeypatch, gone) == ([gone], [])


@pytest.mark.parametrize(
    "error", [errors.APIForbiddenError, errors.APIClientError, errors.APIServerError]
)
def test_an_error_of_the_request_ends_this_watch_alone(
    error: type[errors.APIError], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = error(None, status=400, headers={})
    assert watched(monkeypatch, ADDED, ends=ended) == ([ADDED], [handlers.LONGEST_ERROR_WAIT])


def test_a_kind_that_is_gone_ends_the_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = errors.APINotFoundError(None, status=404, headers={})
    with pytest.raises(errors.APINotFoundError):
        watched(monkeypatch, ends=gone)


def test_a_request_is_tried_without_an_end_and_said_once() -> None:
    waits = iter(handlers._ErrorWaits())
    assert [next(waits) for _ in range(1000)][-1] == handlers.LONGEST_ERROR_WAIT
    assert next(iter(handlers._ErrorWaits())) == 1, "each request begins anew"
    lines = [f"Request attempt #{number} failed; will retry: GET /x" for number in (1, 2, 12)]
    records = [logging.LogRecord("kopf", logging.ERROR, "", 0, line, None, None) for line in lines]
    assert [handlers._is_worth_a_line(record) for record in records] == [True, False, False]
    assert records[0].levelno == logging.WARNING
