"""What the author of a job is told when a bug of the operator's keeps it from being judged.

Called by reconcile, and for its words by isolation. Pure. What an author did wrong has words of its
own in spec and policy; this is for what nobody thought of.
"""

from __future__ import annotations

import datetime
import re

from osft_operator.actions import Decision, Event
from osft_operator.failure import clean
from osft_operator.observed import Object, find_condition
from osft_operator.readiness import conclude
from osft_operator.status import set_condition

REASON = "InternalError"
"""Of the condition Accepted, the event and the metric."""
MAX_WORDS = 1024

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")


def verdict(body: Object, error: Exception, now: datetime.datetime) -> Decision:
    """The status and the event of a job that the operator fails to judge.

    Args:
        body: the OSFTJob with the status as it is recorded.
        error: what came of judging it.
        now: the time.
    """
    recorded, generation = body.get("status") or {}, body["metadata"].get("generation", 1)
    text = (
        f"{words(error)}: a bug of the operator, which tries again later; please report it. Other "
        "jobs are not affected, and pods that run go on"
    )
    status, known = dict(recorded), {}
    try:
        known = dict(find_condition(recorded, "Accepted"))
        set_condition(status, generation, now, "Accepted", "False", REASON, text)
        conclude(status, generation, now)
    except Exception:
        # what is recorded may be just what cannot be judged
        status = {**recorded, "conditions": []}
        set_condition(status, generation, now, "Accepted", "False", REASON, text)
    status["observedGeneration"] = generation
    told = (known.get("reason"), known.get("message")) == (REASON, text)
    return Decision(status, events=() if told else (Event("Warning", REASON, text),))


def words(error: BaseException) -> str:
    """An error in a few words, the same each time."""
    return _ADDRESS.sub("0x...", clean(f"{type(error).__name__}: {str(error)[:MAX_WORDS]}"))
