"""What Kueue says about a PyTorchJob that waits in a queue, from its Workload.

Called by steps with the Workload that the observer found. Pure. Only words: Kueue's decisions are
respected, whatever they are.
"""

from __future__ import annotations

from osft_operator.failure import clean
from osft_operator.observed import Object, find_condition


def words(queue: str | None, workload: Object | None) -> str:
    """Why a suspended PyTorchJob does not run yet, in Kueue's words where there are any."""
    place = f"waits in queue {queue}" if queue else "waits for whoever suspended the PyTorchJob"
    if workload is None:
        return place
    status = workload.get("status") or {}
    if (workload.get("spec") or {}).get("active") is False:
        return f"{place}: its Workload {workload['metadata']['name']} is not active"
    reserved = find_condition(status, "QuotaReserved")
    evicted = find_condition(status, "Evicted")
    admitted = find_condition(status, "Admitted")
    parts = [
        _part(condition)
        for condition, wanted in ((evicted, "True"), (reserved, "False"), (admitted, "False"))
        if condition.get("status") == wanted
    ]
    return f"{place}: {'; '.join(parts)}" if parts else place


def waits_for(queue: str | None, workload: Object | None, job: Object) -> tuple[str, str]:
    """Kind and name of the object that a suspended PyTorchJob waits for."""
    if workload is not None:
        return "Workload", str(workload["metadata"]["name"])
    return ("LocalQueue", queue) if queue else ("PyTorchJob", str(job["metadata"]["name"]))


def _part(condition: Object) -> str:
    reason, message = clean(condition.get("reason"), 64), clean(condition.get("message"), 1024)
    return f"{reason}: {message}" if message else reason
