"""Signals that come one upon another: the first one stops, and none waits for another."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from osft_trainer import __main__ as rank
from osft_trainer import api


@contextmanager
def in_a_rank() -> Iterator[threading.Event]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield rank._stop_on_signals()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def in_a_call() -> Iterator[threading.Event]:
    with api._stop_on_signals() as (stop, _):
        yield stop


@pytest.mark.parametrize("listening", [in_a_rank, in_a_call])
def test_a_signal_that_comes_while_another_is_noted_waits_for_nothing(
    listening: Callable[[], Iterator[threading.Event]],
) -> None:
    """`Event.set` holds a lock; here another thread stands for the handler that it interrupts."""
    with listening() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        handler = signal.getsignal(signal.SIGTERM)
        assert callable(handler)
        with stop._cond:
            second = threading.Thread(target=handler, args=(signal.SIGTERM, None), daemon=True)
            second.start()
            second.join(10)
            assert not second.is_alive()
