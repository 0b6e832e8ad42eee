"""Asks training pods how far they are.

Reconcile says which pods to ask (`watch`), service runs the loop, and `news` is called on the event
loop when an answer differs from the last. A pod is never trusted: its address comes from the API
server, the path is fixed, redirects and proxies and compression are off, time and size are bounded,
and the document is parsed strictly. A pod that does not answer is no error: the last word of a run
comes with its termination message.
"""

from __future__ import annotations

import asyncio
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
"""An answer older than both is none any more: the pod, or the way to it, is gone."""
FRESH_SECONDS = 1.0
"""Shortest time between two looks for pods that were not asked yet."""

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
    """For how long the present pods have been asked."""


NOTHING = Heard(None, None, None, 0.0)


class Poller:
    """The pods to ask, and their last answers."""

    def __init__(
        self, settings: Settings, news: News, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = settings.progress_poll_seconds
        self._places = asyncio.Semaphore(settings.progress_concurrency)
        self._news = news
        self._targets: dict[Key, tuple[PollTarget, ...]] = {}
        self._answers: dict[Key, dict[PollTarget, Progress]] = {}
        self._since: dict[Key, datetime.datetime] = {}
        self._answered: dict[Key, float] = {}
        self._began: dict[Key, float] = {}
        self._clock = clock
        self._new = asyncio.Event()
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
        if not targets:
            for kept in (
                self._targets,
                self._answers,
                self._since,
                self._answered,
                self._began,
            ):
                kept.pop(key, None)
            return
        if set(targets) - set(self._targets.get(key, ())):
            self._began[key] = self._clock()
            self._new.set()
        self._targets[key] = tuple(targets)
        answers = self._answers.get(key, {})
        self._answers[key] = {pod: answers[pod] for pod in targets if pod in answers}

    def __len__(self) -> int:
        """Jobs whose pods are asked."""
        return len(self._targets)

    def heard(self, key: Key) -> Heard:
        """What is known from a job's rank 0."""
        if key not in self._targets:
            return NOTHING
        listening = self._clock() - self._began[key]
        for pod, answer in self._answers[key].items():
            if answer.global_rank == 0:
                silent = self._clock() - self._answered[key]
                if silent > max(SILENT_SECONDS, SILENT_ROUNDS * self._interval):
                    return Heard(None, None, None, min(silent, listening))
                return Heard(answer, pod.pod, self._since.get(key), listening)
        return Heard(None, None, None, listening)

    def progress(self, key: Key) -> Progress | None:
        """The last answer of a job's rank 0; None when there is none from the present pods."""
        return self.heard(key).progress

    async def run(self) -> None:
        """Ask every pod again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            self._new.clear()
            await self.ask_all()
            pause = max(0.05, self._interval - (loop.time() - started))
            await self._ask_new_ones(loop.time() + pause)

    async def _ask_new_ones(self, until: float) -> None:
        """Until the next round, ask those that were not asked yet: they are news."""
        loop = asyncio.get_running_loop()
        while (left := until - loop.time()) > 0:
            try:
                # not wait_for: cancelled just as the wait ends, that forgets the cancellation
                async with asyncio.timeout(left):
                    await self._new.wait()
            except TimeoutError:
                return
            self._new.clear()
            answered = self._answers
            fresh = [
                (key, pod)
                for key, pods in self._targets.items()
                for pod in pods
                if pod not in answered.get(key, {})
            ]
            await asyncio.gather(*(self._ask(key, pod) for key, pod in fresh))
            # not more often than this, however many jobs start
            await asyncio.sleep(min(FRESH_SECONDS, max(0.0, until - loop.time())))

    async def ask_all(self) -> None:
        """Ask every pod once."""
        asked = [(key, pod) for key, pods in self._targets.items() for pod in pods]
        await asyncio.gather(*(self._ask(key, pod) for key, pod in asked))

    async def _ask(self, key: Key, pod: PollTarget) -> None:
        async with self._places:
            answer = await self._fetch(pod)
        metrics.progress_polls.labels("answer" if answer else "none").inc()
        if answer is None or pod not in self._targets.get(key, ()):
            return
        last = self._answers[key].get(pod)
        self._answers[key][pod] = answer
        if answer.global_rank == 0:
            self._answered[key] = self._clock()
        if answer.global_rank == 0 and (last is None or _place(last) != _place(answer)):
            self._since[key] = datetime.datetime.now(datetime.UTC)
        same = (
            last is not None
            and answer.model_copy(update={"last_updated_time": last.last_updated_time}) == last
        )
        if not same and answer.global_rank == 0:
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
