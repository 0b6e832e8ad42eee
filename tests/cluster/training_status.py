"""The status of a PyTorchJob, as the training-operator keeps it. Pure.

Called by training_operator. Conditions are ordered by their last change; a job that has Succeeded
or Failed never changes again.
"""

from __future__ import annotations

from osft_operator.local_container import timestamp
from osft_operator.local_pods import CONTAINER, Object

NO_EXIT_CODE = 0xBEEF
"""What the controller takes for the exit code of a pod whose trainer never ended; it is above 127,
so it counts as worth a retry."""


def condition(status: Object, kind: str) -> Object | None:
    """The condition of that type, if it was ever set."""
    return next((each for each in status.get("conditions", []) if each["type"] == kind), None)


def is_true(status: Object, kind: str) -> bool:
    found = condition(status, kind)
    return found is not None and found["status"] == "True"


def is_finished(status: Object) -> bool:
    return is_true(status, "Succeeded") or is_true(status, "Failed")


def set_condition(
    status: Object, kind: str, message: str, now: float, *, value: bool = True, reason: str = ""
) -> None:
    """Set one condition and what follows from it for the others."""
    if is_finished(status):
        return
    new = {
        "type": kind,
        "status": str(value),
        "reason": reason or f"PyTorchJob{kind}",
        "message": message,
        "lastUpdateTime": timestamp(now),
        "lastTransitionTime": timestamp(now),
    }
    old = condition(status, kind)
    if old and (old["status"], old["reason"]) == (new["status"], new["reason"]):
        return
    if old and old["status"] == new["status"]:
        new["lastTransitionTime"] = old["lastTransitionTime"]
    excluded = {"Running": "Restarting", "Restarting": "Running"}.get(kind)
    kept = [each for each in status.get("conditions", []) if each["type"] not in (kind, excluded)]
    if value and kind in ("Succeeded", "Failed", "Suspended"):
        for each in kept:
            if each["type"] == "Running" and each["status"] == "True":
                each["status"], each["lastTransitionTime"] = "False", timestamp(now)
                each["reason"] = new["reason"] if kind == "Suspended" else each["reason"]
    status["conditions"] = [*kept, new]


def count(pods: list[Object]) -> Object:
    """Active, succeeded and failed pods; pending ones count nowhere."""
    counts = {"active": 0, "succeeded": 0, "failed": 0}
    for pod in pods:
        phase = pod.get("status", {}).get("phase")
        if phase == "Running":
            going = "deletionTimestamp" in pod["metadata"]
            counts["failed" if going else "active"] += 1
        elif phase == "Succeeded":
            counts["succeeded"] += 1
        elif phase == "Failed":
            counts["failed"] += 1
    return counts


def exit_code(pod: Object) -> int:
    """The trainer's exit code in this pod."""
    for each in pod.get("status", {}).get("containerStatuses", []):
        if each["name"] == CONTAINER and "terminated" in each.get("state", {}):
            return int(each["state"]["terminated"]["exitCode"])
    return NO_EXIT_CODE


def restarts(pods: list[Object]) -> int:
    """Restarts that count against backoffLimit: of all containers of the running pods."""
    return sum(
        each["restartCount"]
        for pod in pods
        if pod.get("status", {}).get("phase") == "Running"
        for kind in ("initContainerStatuses", "containerStatuses")
        for each in pod["status"].get(kind, [])
    )


def judge(job: Object, status: Object, now: float) -> None:
    """Set the conditions that follow from the counts in `replicaStatuses`."""
    specs = job["spec"]["pytorchReplicaSpecs"]
    where = f"{job['metadata']['namespace']}/{job['metadata']['name']}"
    for kind in [each for each in ("Master", "Worker") if each in specs]:
        counts = status["replicaStatuses"][kind]
        wanted = specs[kind].get("replicas", 1)
        if kind == "Master" or "Master" not in specs:
            one_is_enough = kind == "Worker" and "elasticPolicy" in job["spec"]
            if counts["succeeded"] >= wanted or (one_is_enough and counts["succeeded"]):
                message = f"PyTorchJob {where} successfully completed."
                set_condition(status, "Succeeded", message, now)
                status.setdefault("completionTime", timestamp(now))
                return
            if counts["active"]:
                set_condition(status, "Running", f"PyTorchJob {where} is running.", now)
        if counts["failed"]:
            if specs[kind].get("restartPolicy", "OnFailure") == "Never":
                number = counts["failed"]
                message = f"PyTorchJob {where} is failed because {number} {kind} replica(s) failed."
                set_condition(status, "Failed", message, now)
                status.setdefault("completionTime", timestamp(now))
                return
            message = f"PyTorchJob {where} is restarting because {kind} replica(s) failed."
            set_condition(status, "Restarting", message, now)
