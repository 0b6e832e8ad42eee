"""What the API server can answer instead of a result, sorted by what a caller may do about it.

Part of cluster, which raises these and hands them on. Pure: an answer's code and bytes come in.
"""

from __future__ import annotations

from osft_operator.bounds import read_json
from osft_operator.kinds import Kind, Object

MAX_RETRY_AFTER_SECONDS = 300.0
"""Longest wait that an answer may ask for."""
MAX_MESSAGE = 1024
"""Longest part of the server's words that is kept."""


class ClusterError(Exception):
    """What the API server or the way to it answered instead of a result."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "") -> None:
        super().__init__(message[:MAX_MESSAGE])
        self.code = code
        self.reason = reason


class NotFound(ClusterError):
    """404: the object, or the namespace it should be made in, is not there."""


class KindMissing(NotFound):
    """404 for the whole kind: its CustomResourceDefinition is not installed (yet)."""


class Conflict(ClusterError):
    """409: changed meanwhile; look again."""


class AlreadyExists(Conflict):
    """409 on creating: the name is taken."""


class Refused(ClusterError):
    """4xx: the server does not want this request, and says why. The same one never helps."""


class Forbidden(Refused):
    """403: a right or a quota is missing. It may come, so a later try can help."""


class Unavailable(ClusterError):
    """No answer, 401, 429 or 5xx: try again later."""

    def __init__(self, message: str, *, code: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class TooLarge(ClusterError):
    """The answer is longer than what may be held at one time; ask for less."""


class Gone(Unavailable):
    """410: the version that was asked for is too old; list anew."""


def of_answer(
    method: str, kind: Kind, code: int, raw: bytes, retry_after: str | None
) -> ClusterError:
    """An answer that is no result, sorted by what a caller may do about it."""
    status = document(raw)
    message = str(status.get("message") or raw[:MAX_MESSAGE].decode(errors="replace")).strip()
    reason = str(status.get("reason", ""))
    text = f"{method} {kind.plural}: {message}"
    if code == 404:
        # A missing object is named in the answer's details; a missing kind has no details.
        named = (status.get("details") or {}).get("name")
        return (NotFound if named else KindMissing)(text, code=code, reason=reason)
    if code == 409:
        taken = reason == "AlreadyExists"
        return (AlreadyExists if taken else Conflict)(message, code=code, reason=reason)
    if code == 410:
        return Gone(text, code=code)
    if code in (401, 408, 429) or code >= 500:
        wait = float(retry_after) if retry_after and retry_after.isdecimal() else None
        wait = None if wait is None else min(wait, MAX_RETRY_AFTER_SECONDS)
        return Unavailable(text, code=code, retry_after=wait)
    if code == 403:
        return Forbidden(message, code=code, reason=reason)
    return Refused(message, code=code, reason=reason)


def document(raw: bytes) -> Object:
    """The JSON object of an answer; empty when it is none, as from a proxy in between."""
    try:
        found = read_json(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
