"""The queue: once each, one worker per key, later after failures, namespaces in turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from osft_operator.queue import Key, WorkQueue

A1, A2, A3, B1 = Key("a", "1"), Key("a", "2"), Key("a", "3"), Key("b", "1")


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: Callable[[], float] | None = None, chance: float = 1.0) -> WorkQueue:
    return WorkQueue(clock=clock or Clock(), chance=lambda: chance)


async def take(queue: WorkQueue) -> Key | None:
    """The next key, or None when none is due now."""
    try:
        return await asyncio.wait_for(queue.get(), 0.02)
    except TimeoutError:
        return None


def run(test: Callable[[], object]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_a_key_waits_once() -> None:
    async def story() -> None:
        queue = make()
        for _ in range(3):
            queue.add(A1)
        assert len(queue) == 1
        assert await take(queue) == A1
        assert await take(queue) is None

    run(story)


def test_a_key_in_work_is_not_given_out_again_until_done() -> None:
    async def story() -> None:
        queue = make()
        queue.add(A1)
        assert await take(queue) == A1
        queue.add(A1)
        queue.add(A1)
        assert await take(queue) is None, "two workers on one job"
        queue.done(A1)
        assert await take(queue) == A1, "news during the work was lost"
        queue.done(A1)
        assert await take(queue) is None

    run(story)


def test_namespaces_take_turns() -> None:
    async def story() -> None:
        queue = make()
        for key in (A1, A2, A3, B1):
            queue.add(key)
        assert [await take(queue) for _ in range(4)] == [A1, B1, A2, A3]

    run(story)


def test_delayed_keys_come_when_due_and_the_earlier_appointment_wins() -> None:
    async def story() -> None:
        clock = Clock()
        queue = make(clock)
        queue.add_after(A1, 60)
        queue.add_after(A1, 10)
        queue.add_after(A1, 30)
        assert await take(queue) is None
        clock.now += 10
        assert await take(queue) == A1
        queue.done(A1)
        clock.now += 100
        assert await take(queue) is None, "an appointment that was replaced came nevertheless"

    run(story)


def test_a_delayed_key_wakes_a_waiting_worker() -> None:
    async def story() -> None:
        queue = WorkQueue()
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.add_after(A1, 0.01)
        assert await asyncio.wait_for(waiting, 5) == A1

    run(story)


def test_every_waiting_worker_gets_a_key() -> None:
    async def story() -> None:
        queue = WorkQueue()
        workers = [asyncio.create_task(queue.get()) for _ in range(3)]
        await asyncio.sleep(0)
        for key in (A1, A2, B1):
            queue.add(key)
        assert set(await asyncio.wait_for(asyncio.gather(*workers), 5)) == {A1, A2, B1}

    run(story)


def test_failures_wait_longer_up_to_the_maximum_and_are_forgotten() -> None:
    async def story() -> None:
        queue = make()
        waits = [queue.retry(A1) for _ in range(12)]
        assert waits[:5] == [1, 2, 4, 8, 16]
        assert waits[-1] == 300
        assert queue.retry(B1) == 1, "failures of one key delayed another"
        queue.forget(A1)
        assert queue.retry(A1) == 1

    run(story)


@pytest.mark.parametrize(("chance", "wait"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_half_of_the_wait_is_chance(chance: float, wait: float) -> None:
    async def story() -> None:
        assert make(chance=chance).retry(A1) == wait

    run(story)


def test_the_servers_wait_is_respected() -> None:
    async def story() -> None:
        assert make().retry(A1, at_least=7) == 7

    run(story)


def test_the_oldest_waiting_key_is_known() -> None:
    async def story() -> None:
        clock = Clock()
        queue = make(clock)
        assert queue.oldest_seconds() == 0
        queue.add(A1)
        clock.now += 5
        queue.add(B1)
        clock.now += 2
        assert queue.oldest_seconds() == 7
        await take(queue)
        assert queue.oldest_seconds() == 2

    run(story)


def test_a_long_queue_that_moves_does_not_stand_still() -> None:
    async def story() -> None:
        clock = Clock()
        queue = make(clock)
        for key in (A1, A2, A3):
            queue.add(key)
        for _ in range(2):
            clock.now += 60
            await take(queue)
        assert queue.oldest_seconds() == 120
        assert queue.stalled_seconds() == 0
        clock.now += 91
        assert queue.stalled_seconds() == 91

    run(story)


def test_an_api_server_that_is_away_is_asked_again_soon() -> None:
    async def story() -> None:
        queue = make()
        waits = [queue.retry(A1, at_most=15) for _ in range(12)]
        assert waits[-1] == 15
        assert queue.retry(A1, at_least=60, at_most=15) == 60, "the server's own wish wins"
        assert queue.retry(A1) == 300

    run(story)


@pytest.mark.parametrize("steps", range(4))
def test_a_worker_that_is_cancelled_ends_even_if_news_comes_then(steps: int) -> None:
    """As when a paused process goes on: all timers, all news and the end come at once."""

    async def story() -> None:
        queue = make()
        queue.add_after(A1, 60)
        worker = asyncio.create_task(queue.get())
        await asyncio.sleep(0.01)
        queue.add(B1)
        for _ in range(steps):
            await asyncio.sleep(0)
        ended = worker.done()
        worker.cancel()
        await asyncio.wait([worker])
        assert worker.cancelled() or ended

    run(story)


def test_what_has_no_hurry_lets_others_go_first_and_still_has_its_turn() -> None:
    async def story() -> None:
        queue = WorkQueue()
        for number in range(20):
            queue.add_unhurried(Key("a", f"old-{number}"))
        queue.add(Key("a", "old-3"))
        for number in range(20):
            queue.add(Key("a", f"new-{number}"))
        taken = [(await queue.get()).name for _ in range(40)]
        assert taken[0] == "old-3", "news of it make hurry"
        assert taken[1:7] == [f"new-{number}" for number in range(6)]
        assert [name for name in taken[:16] if name.startswith("old")] == [
            "old-3",
            "old-0",
            "old-1",
        ]
        assert len(set(taken)) == 40
        assert len(queue) == 0

    asyncio.run(story())


def test_unhurried_news_of_a_key_that_is_worked_on_is_not_lost() -> None:
    async def story() -> None:
        queue = make()
        queue.add(A1)
        assert await queue.get() == A1
        queue.add_unhurried(A1)
        queue.done(A1)
        assert await queue.get() == A1

    run(story)
