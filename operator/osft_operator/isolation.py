"""Where what one object brings out ends: it is logged and counted, and the others go on.

`set_aside` stands around each object in every loop over objects: the caches' lists and watches, the
metrics' survey, the polls, the events. It is for bugs of ours; what the API server answers, and
what an author did wrong, has its own ways. Must never hide what concerns all objects: a lost Lease
passes through.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator

from osft_operator import metrics
from osft_operator.internal_error import REASON, words
from osft_operator.leader import LeaseLost

logger = logging.getLogger(__name__)

REMEMBERED = 1000
"""Objects whose trouble was logged with its stack; again and again it is no news."""

_logged: OrderedDict[tuple[str, str], None] = OrderedDict()


@contextlib.contextmanager
def set_aside(part: str, about: object) -> Iterator[None]:
    """Do something for one object of many; an error ends here.

    Args:
        part: where this is, one of metrics.PARTS.
        about: the object, for the log.

    Raises:
        LeaseLost: this concerns all.
    """
    try:
        yield
    except LeaseLost:
        raise
    except Exception as error:
        count(part)
        is_news = (part, str(about)) not in _logged
        _logged[part, str(about)] = None
        if len(_logged) > REMEMBERED:
            _logged.popitem(last=False)
        logger.log(
            logging.ERROR if is_news else logging.DEBUG,
            "A bug; %s is set aside (%s): %s",
            about,
            part,
            words(error),
            exc_info=error if is_news else None,
        )


def count(part: str) -> None:
    """Count a bug that one object has brought out."""
    metrics.set_aside.labels(part, REASON).inc()
