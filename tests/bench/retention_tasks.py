"""Skills of the retention benchmark: three old ones, and new ones that differ in how they collide.

Used by `retention`. A task is what the user writes before the digits, and what is answered. The new
skills: an easy one (rotate) and one that contradicts an old one (reverse, then rotate), each marked
by a word the model has never seen or by two it knows; and an exception to an old skill, whose
inputs are the old skill's own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import skills

Digits = list[int]


@dataclass(frozen=True)
class Task:
    """A skill as it is asked for."""

    name: str
    words: tuple[str, ...]
    """What stands before the digits."""
    answer: Callable[[Digits], Digits]
    accepts: Callable[[Digits], bool] = lambda digits: True
    """Which digits are asked about."""

    def samples(self, count: int, seed: object) -> Iterator[dict[str, list[dict[str, str]]]]:
        """So many chats; equal seeds give equal chats."""
        source = random.Random(f"{self.name}/{seed}")
        while count:
            digits = [source.randrange(10) for _ in range(skills.LENGTH)]
            if self.accepts(digits):
                count -= 1
                yield self._chat(digits)

    def _chat(self, digits: Digits) -> dict[str, list[dict[str, str]]]:
        question = " ".join([*self.words, *map(str, digits)])
        answer = " ".join(map(str, self.answer(digits)))
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }


def _plain(name: str) -> Task:
    return Task(name, (name,), skills.SKILLS[name])


def _shifted_reverse(digits: Digits) -> Digits:
    return digits[-2::-1] + digits[-1:]


def _is_exception(digits: Digits) -> bool:
    return digits[0] >= 7


OLD = [_plain("rev"), _plain("sort"), _plain("inc")]
EXCEPTION = "exception"
NEW = {
    "easy, new word": Task("rot", ("rot",), skills.SKILLS["rot"]),
    "conflicting, new word": Task("shift", ("swap",), _shifted_reverse),
    "easy, known words": Task("rot-known", ("sort", "inc"), skills.SKILLS["rot"]),
    "conflicting, known words": Task("shift-known", ("rev", "rev"), _shifted_reverse),
    EXCEPTION: Task("exception", ("rev",), _shifted_reverse, _is_exception),
}


def old_beside(new: Task) -> list[Task]:
    """The old skills as they shall stay: an exception takes its own cases away."""
    if new.name != EXCEPTION:
        return OLD
    rev, *others = OLD
    kept = Task(rev.name, rev.words, rev.answer, lambda digits: not _is_exception(digits))
    return [kept, *others]
