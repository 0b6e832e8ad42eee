"""Chooses, among the events about an object that is not ours, the one that says why it waits.

Called by observer for what no status tells: a volume that cannot be mounted, a claim that is not
bound, pods that are not made. The newest event is often not it: controllers say the same Normal
things again with every try. A Warning counts until a later event shows that it is overcome. Reads
events; must never write any, nor judge what they mean for the job.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Sequence

from osft_operator.cluster import Cluster, ClusterError
from osft_operator.kinds import EVENTS, Object
from osft_operator.observed import Said, time_of

logger = logging.getLogger(__name__)

CLOCKS = datetime.timedelta(seconds=60)
"""By so much the clocks of a controller and of the API server may differ."""
COMBINED = "(combined from similar events): "
"""What event recorders write before the words of many that are alike."""
NOT_TELLING = ("DNSConfigForming", "FailedToRetrieveImagePullSecret")
"""Warnings about pods that start all the same; where they do not, their containers say why."""

SCHEDULING, ATTACHING, MOUNTING, PULLING, STARTING, STARTED = range(6)
"""Stages on a pod's way, or PROVISIONING on a claim's: each is left for the next."""
PROVISIONING = SCHEDULING
_FAILS_IN = {
    "FailedScheduling": SCHEDULING,
    "ProvisioningFailed": PROVISIONING,
    "FailedAttachVolume": ATTACHING,
    "Failed": PULLING,
    "BackOff": PULLING,
    "InspectFailed": PULLING,
    "ErrImageNeverPull": PULLING,
    "FailedPostStartHook": STARTED,
}
"""Stage in which a Warning holds a pod up; of all others, volumes and networks, it is MOUNTING."""
_LEADS_TO = {
    "Scheduled": ATTACHING,
    "ProvisioningSucceeded": ATTACHING,
    "SuccessfulAttachVolume": MOUNTING,
    "Pulling": PULLING,
    "Pulled": STARTING,
    "Created": STARTING,
    "Started": STARTED,
}
"""Stage that is reached when a Normal event of this reason comes."""


async def about(cluster: Cluster, namespace: str, uid: str) -> Sequence[Object]:
    """The events about an object; none when nobody answers."""
    try:
        found = await cluster.list_all(EVENTS, namespace, fields=f"involvedObject.uid={uid}")
    except ClusterError as error:
        logger.warning("The events about %s could not be read: %s", uid, error)
        return ()
    return found.items


def telling(events: Sequence[Object]) -> Said | None:
    """Why a pod or a claim waits: the newest Warning that is not overcome, else the newest event.

    Of two events of one second the Warning is told.
    """
    kept = [event for event in events if event.get("reason") not in NOT_TELLING]
    good = [event for event in kept if not _is_warning(event)]
    warnings = [
        event
        for event in kept
        if _is_warning(event) and not any(_overcomes(other, event) for other in good)
    ]
    newest = max(warnings or good, key=last_time, default=None)
    return None if newest is None else _said(newest)


def refusal(events: Sequence[Object], since: datetime.datetime) -> Said | None:
    """Why pods of a PyTorchJob are not made, in its controller's words.

    Its Normal events say nothing of it: the controller repeats them with every try that fails. Of
    its Warnings those about pods that are there are left out; their statuses say more.

    Args:
        events: about the PyTorchJob.
        since: since when pods are missing; what is older was about others.
    """
    warnings = [
        event
        for event in events
        if _is_warning(event)
        and last_time(event) >= since - CLOCKS
        and not str(event.get("message") or "").startswith("Error pod ")
    ]
    refused = [each for each in warnings if str(each.get("reason")).startswith("FailedCreate")]
    newest = max(refused or warnings, key=last_time, default=None)
    return None if newest is None else _said(newest)


def last_time(event: Object) -> datetime.datetime:
    """When an event was last said, by whichever field its recorder has written."""
    series = (event.get("series") or {}).get("lastObservedTime")
    said = [time for time in (series, event.get("lastTimestamp"), event.get("eventTime")) if time]
    return max(time_of(time) for time in said or [event["metadata"]["creationTimestamp"]])


def _overcomes(good: Object, warning: Object) -> bool:
    reached = _LEADS_TO.get(str(good.get("reason")), SCHEDULING)
    held_up = _FAILS_IN.get(str(warning.get("reason")), MOUNTING)
    # many times are whole seconds
    return reached > held_up and last_time(good).replace(microsecond=0) > last_time(warning)


def _is_warning(event: Object) -> bool:
    return bool(event.get("type") == "Warning")


def _said(event: Object) -> Said:
    message = str(event.get("message") or "").removeprefix(COMBINED)
    return Said(event.get("reason") or "", message, _is_warning(event))
