"""Asking pods for progress: what is taken, what is refused, and what is worth telling."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from aiohttp import web

from osft_operator.actions import PollTarget
from osft_operator.polling import NOTHING, Poller, is_milestone
from osft_operator.queue import Key
from osft_operator.settings import Settings
from osft_trainer.report import MAX_DOCUMENT_BYTES, Progress

KEY = Key("n", "job")
GOOD = {"runId": "u1", "step": 3, "totalSteps": 100, "loss": 2.5, "phase": "Training"}

Handler = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


class Pod:
    """A server in a pod's place, and a poller that asks it."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.clock: Callable[[], float] = time.monotonic
        self.settings = Settings(progress_timeout_seconds=0.5)
        self.paths: list[str] = []
        self.news: list[bool] = []

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        return await self.handler(request)

    async def ask(self, story: Callable[[Poller, PollTarget], Coroutine[Any, Any, None]]) -> None:
        runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        (_, port), *_ = runner.addresses
        try:
            async with Poller(
                self.settings, lambda _, milestone: self.news.append(milestone), clock=self.clock
            ) as poller:
                await story(poller, PollTarget(pod="p", ip="127.0.0.1", port=port))
        finally:
            await runner.cleanup()


def play(
    handler: Handler, story: Callable[[Pod, Poller, PollTarget], Coroutine[Any, Any, None]]
) -> Pod:
    pod = Pod(handler)
    asyncio.run(pod.ask(lambda poller, target: story(pod, poller, target)))
    return pod


def answer(document: dict[str, Any]) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response(document)

    return handler


async def ask_all(poller: Poller) -> None:
    """Ask every pod once, due or not."""
    for key, pod in list(poller._order):
        poller._order._plan(key, pod, poller._clock())
    while (turn := poller._order.next()) is not None:
        await poller._ask(*turn)


async def ask_once(_: Pod, poller: Poller, target: PollTarget) -> None:
    poller.watch(KEY, [target])
    await ask_all(poller)
    assert poller.progress(KEY) is None


def test_an_answer_is_kept_and_told_once() -> None:
    async def story(pod: Pod, poller: Poller, target: PollTarget) -> None:
        poller.watch(KEY, [target])
        await ask_all(poller)
        progress = poller.progress(KEY)
        assert progress is not None
        assert (progress.step, progress.loss) == (3, 2.5)
        assert pod.news == [True]
        await ask_all(poller)
        assert pod.news == [True], "the same answer was told twice"
        poller.watch(KEY, [target])
        assert poller.progress(KEY) == progress, "watching the same pod again lost its answer"
        poller.watch(KEY, [])
        assert poller.progress(KEY) is None

    assert set(play(answer(GOOD), story).paths) == {"/progress"}


def test_only_rank_zero_counts() -> None:
    pod = play(answer({**GOOD, "globalRank": 2}), ask_once)
    assert pod.news == []


def test_a_redirect_is_not_followed() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/progress":
            raise web.HTTPFound("/secret")
        return web.json_response(GOOD)

    assert play(handler, ask_once).paths == ["/progress"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        json.dumps([GOOD]),
        json.dumps({**GOOD, "step": -1}),
        json.dumps(GOOD).replace("2.5", "NaN"),
        json.dumps({**GOOD, "padding": "x" * MAX_DOCUMENT_BYTES}),
    ],
    ids=["empty", "no json", "a list", "negative", "nan", "too long"],
)
def test_what_is_no_progress_is_refused(text: str) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(text=text)

    assert play(handler, ask_once).news == []


def test_an_endless_answer_is_cut_off() -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while sent < 1 << 30:
                await response.write(b" " * 65536)
                sent += 65536
        except ConnectionError:
            pass
        return response

    play(handler, ask_once)
    assert sent < 1 << 26, "far more was read than a document can be long"


def test_a_slow_pod_is_given_up() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.json_response(GOOD)

    play(handler, ask_once)


def test_a_compressed_answer_is_not_unpacked() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        response = web.json_response(GOOD)
        response.enable_compression(web.ContentCoding.gzip)
        return response

    play(handler, ask_once)


def test_a_pod_that_is_not_there_is_no_error() -> None:
    async def story(_: Pod, poller: Poller, __: PollTarget) -> None:
        poller.watch(KEY, [PollTarget(pod="gone", ip="127.0.0.1", port=9)])
        await ask_all(poller)
        assert poller.progress(KEY) is None

    play(answer(GOOD), story)


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")

    async def story(pod: Pod, poller: Poller, target: PollTarget) -> None:
        poller.watch(KEY, [target])
        await ask_all(poller)
        assert pod.news == [True]

    play(answer(GOOD), story)


def test_what_passes_a_milestone_is_told_at_once() -> None:
    last = Progress(run_id="u1", step=3, total_steps=100, phase="Training")

    def after(**changes: Any) -> bool:
        return is_milestone(last, last.model_copy(update=changes))

    assert is_milestone(None, last)
    assert not after(step=4, loss=1.0)
    assert after(step=5)
    assert after(phase="Saving")
    assert after(latest_checkpoint="/checkpoints/step-00000003")
    assert after(final="/checkpoints/final")
    assert after(epoch=1.0)
    assert after(attempt=2)


def test_when_a_step_was_heard_first_is_known() -> None:
    document = dict(GOOD)

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response(document)

    async def story(_: Pod, poller: Poller, target: PollTarget) -> None:
        assert poller.heard(KEY) == NOTHING
        poller.watch(KEY, [target])
        assert poller.heard(KEY).progress is None
        await ask_all(poller)
        first = poller.heard(KEY)
        assert first.since is not None
        assert first.pod == "p"
        document["lastUpdatedTime"] = "2026-01-01T00:00:00Z"
        await ask_all(poller)
        assert poller.heard(KEY).since == first.since, "a heartbeat is no progress"
        document["step"] = 4
        await ask_all(poller)
        since = poller.heard(KEY).since
        assert since is not None
        assert since > first.since
        poller.watch(KEY, ())
        assert poller.heard(KEY) == NOTHING

    play(handler, story)


def test_a_new_pod_is_asked_at_once() -> None:
    async def story(_: Pod, poller: Poller, target: PollTarget) -> None:
        running = asyncio.create_task(poller.run())
        await asyncio.sleep(0.05)
        poller.watch(KEY, [target])
        for _ in range(40):
            await asyncio.sleep(0.05)
            if poller.progress(KEY) is not None:
                break
        running.cancel()
        assert poller.progress(KEY) is not None, "the next round is ten seconds away"

    play(answer(GOOD), story)


def test_an_answer_counts_until_it_was_asked_for_in_vain_for_long() -> None:
    now, is_mute = 0.0, False

    async def handler(_: web.Request) -> web.StreamResponse:
        if is_mute:
            raise web.HTTPServiceUnavailable
        return web.json_response(GOOD)

    pod = Pod(handler)
    pod.clock = lambda: now

    async def story(poller: Poller, target: PollTarget) -> None:
        nonlocal now, is_mute
        poller.watch(KEY, [target])
        await ask_all(poller)
        now = 10_000.0
        assert poller.heard(KEY).progress is not None, "nobody has asked since"
        is_mute = True
        await ask_all(poller)
        heard = poller.heard(KEY)
        assert (heard.progress, heard.listening_seconds) == (None, 10_000.0)
        is_mute = False
        await ask_all(poller)
        assert poller.heard(KEY).progress is not None
        assert poller.heard(KEY).listening_seconds == 0.0
        is_mute = True
        now += 29.0
        await ask_all(poller)
        assert poller.heard(KEY).progress is not None
        now += 1.0
        await ask_all(poller)
        assert poller.heard(KEY).progress is None

    asyncio.run(pod.ask(story))


def test_pods_that_accept_and_say_nothing_hold_up_no_other() -> None:
    """640 of them, as behind a mesh, in the same namespace as a healthy one."""

    async def story(poller: Poller, good: PollTarget) -> None:
        poller.watch(KEY, [good])
        silent = await asyncio.start_server(lambda *_: asyncio.sleep(3600), "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        for number in range(640):
            mute = PollTarget(pod=f"mute-{number}", ip="127.0.0.1", port=port)
            poller.watch(Key("n", mute.pod), [mute])
        running = asyncio.create_task(poller.run())
        await asyncio.sleep(2.0)
        running.cancel()
        silent.close()
        assert poller.heard(KEY).progress is not None

    pod = Pod(answer(GOOD))
    pod.settings = Settings(progress_timeout_seconds=0.5, progress_poll_seconds=0.25)
    asyncio.run(pod.ask(story))
    assert len(pod.paths) >= 5, "asked more rarely than it should be"
