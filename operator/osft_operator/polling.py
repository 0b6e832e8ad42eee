"""Asks training pods how far they are.

Reconcile says which pods to ask (`watch`), service runs the loop, poll_order says whose turn it is,
and `news` is called on the event loop when an answer differs from the last. A pod is never trusted:
its address comes from the API server, the path is fixed, redirects and proxies and compression are
off, time and size are bounded, and the document is parsed strictly. A pod that does not answer is
no error: the last word of a run comes with its termination message.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import aiohttp

from osft_operator import metrics
from osft_operator.actions import PollTarget
from osft_operator.isolation import set_aside
from osft_operator.poll_order import PollOrder
from osft_operator.queue import Key
from osft_operator.settings import Settings
from osft_trainer.report import MAX_DOCUMENT_BYTES, Progress, percentage

logger = logging.getLogger(__name__)

PATH = "/progress"
"""Where every trainer serves its progress document."""
MILESTONE_PERCENT = 5
"""Every so many per cent the status is written without waiting."""

SILENT_SECONDS = 30.0
SILENT_ROUNDS = 3
"""A pod that has been asked in vain for so long, since its last answer, has none any more: it is
gone, or the way to it. An answer that is only old, since nobody has asked again, still counts."""

News = Callable[[Key, bool], None]
"""Takes the job and whether a milestone was passed."""


@dataclass(frozen=True)
class Heard:
    """What is known from a job's rank 0."""

    progress: Progress | None
    """Its last answer; None when there is none from the present pods."""
    pod: str | None
    """Which pod gave it."""
    since: datetime.datetime | None
    """When the step, phase or checkpoint of that answer was heard first."""
    listening_seconds: float
    """For how long the present pods have been asked in vain."""


NOTHING = Heard(None, None, None, 0.0)


class Poller:
    """The pods to ask, and their last answers."""

    def __init__(
        self, settings: Settings, news: News, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._silent = max(SILENT_SECONDS, SILENT_ROUNDS * settings.progress_poll_seconds)
        self._clock = clock
        self._order = PollOrder(
            settings.progress_poll_seconds, settings.progress_concurrency, clock
        )
        self._news = news
        self._answers: dict[Key, dict[PollTarget, Progress]] = {}
        self._since: dict[Key, datetime.datetime] = {}
        self._changed = asyncio.Event()
        self._session = aiohttp.ClientSession(
            trust_env=False,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=settings.progress_timeout_seconds),
            connector=aiohttp.TCPConnector(limit=settings.progress_concurrency),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def watch(self, key: Key, targets: Sequence[PollTarget]) -> None:
        """Ask these pods of a job from now on, and no others. New ones are asked at once."""
        if self._order.set(key, targets):
            self._changed.set()
        if not targets:
            self._answers.pop(key, None)
            self._since.pop(key, None)
            return
        answers = self._answers.get(key, {})
        self._answers[key] = {pod: answers[pod] for pod in targets if pod in answers}

    def crowd(self, namespace: str) -> int:
        """With how many jobs one of a namespace shares what there is, each namespace its part."""
        return self._order.crowd(namespace)

    def heard(self, key: Key) -> Heard:
        """What is known from a job's rank 0."""
        asked = self._order.asked(key)
        if not asked:
            return NOTHING
        # Who has not been asked yet, however long that takes, is not silent.
        in_vain = min(record.in_vain_seconds for record in asked.values())
        for pod, answer in self._answers[key].items():
            if answer.global_rank != 0:
                continue
            if asked[pod].in_vain_seconds < self._silent:
                return Heard(answer, pod.pod, self._since.get(key), in_vain)
            in_vain = asked[pod].in_vain_seconds
        return Heard(None, None, None, in_vain)

    def progress(self, key: Key) -> Progress | None:
        """The last answer of a job's rank 0; None when there is none from the present pods."""
        return self.heard(key).progress

    async def run(self) -> None:
        """Ask every pod again and again, each in its turn, until cancelled."""
        asking: set[asyncio.Task[None]] = set()
        try:
            while True:
                self._changed.clear()
                while (turn := self._order.next()) is not None:
                    task = asyncio.create_task(self._ask(*turn))
                    asking.add(task)
                    task.add_done_callback(asking.discard)
                await self._wait()
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _wait(self) -> None:
        """Until a pod is due, or a place is free, or there are new pods."""
        # not wait_for: cancelled just as the wait ends, that forgets the cancellation
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._order.wait_seconds()):
                await self._changed.wait()

    async def _ask(self, key: Key, pod: PollTarget) -> None:
        """Ask one pod; whatever it answers, the others are asked, too."""
        with set_aside("poll", f"pod {pod.pod} of {key}"):
            await self._ask_one(key, pod)

    async def _ask_one(self, key: Key, pod: PollTarget) -> None:
        asked, answer = self._clock(), None
        try:
            answer = await self._fetch(pod)
        finally:
            self._order.done(key, pod, asked=asked, is_answered=answer is not None)
            self._changed.set()
        metrics.progress_polls.labels("answer" if answer else "none").inc()
        if answer is not None and pod in self._order.asked(key):
            self._take(key, pod, answer)

    def _take(self, key: Key, pod: PollTarget, answer: Progress) -> None:
        last = self._answers[key].get(pod)
        self._answers[key][pod] = answer
        if answer.global_rank != 0:
            return
        if last is None or _place(last) != _place(answer):
            self._since[key] = datetime.datetime.now(datetime.UTC)
        same = (
            last is not None
            and answer.model_copy(update={"last_updated_time": last.last_updated_time}) == last
        )
        if not same:
            self._news(key, is_milestone(last, answer))

    async def _fetch(self, pod: PollTarget) -> Progress | None:
        """One answer; None when there is none or it is not what it should be."""
        try:
            address = ipaddress.ip_address(pod.ip)
            host = f"[{address}]" if address.version == 6 else str(address)
            async with self._session.get(
                f"http://{host}:{pod.port}{PATH}", allow_redirects=False
            ) as response:
                raw = await _bounded(response.content) if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            # ValueError: no address, or aiohttp on a malformed answer.
            logger.debug("%s does not answer: %r", pod.pod, error)
            return None
        return Progress.parse(raw) if raw is not None else None


def _place(progress: Progress) -> tuple[object, ...]:
    """What tells that a run comes forward."""
    return progress.attempt, progress.step, progress.phase, progress.latest_checkpoint


async def _bounded(content: aiohttp.StreamReader) -> bytes | None:
    """The whole body; None when it is longer than any progress document."""
    raw = bytearray()
    while chunk := await content.read(MAX_DOCUMENT_BYTES + 1 - len(raw)):
        raw += chunk
        if len(raw) > MAX_DOCUMENT_BYTES:
            return None
    return bytes(raw)


def is_milestone(last: Progress | None, new: Progress) -> bool:
    """Whether people want to see this at once."""
    if last is None:
        return True
    return (
        last.phase != new.phase
        or last.attempt != new.attempt
        or last.latest_checkpoint != new.latest_checkpoint
        or last.final != new.final
        or int(last.epoch) != int(new.epoch)
        or percentage(last) // MILESTONE_PERCENT != percentage(new) // MILESTONE_PERCENT
    )
