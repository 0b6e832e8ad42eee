"""One look of the stand-in training-operator at one PyTorchJob, and what it does about it.

Called by training_operator for every change. Literal to the real controller, weaknesses included.
"""

from __future__ import annotations

import copy
import random
import time
from datetime import datetime

from cluster import training_status
from cluster.api import Api, ApiError
from cluster.training_events import Recorder
from osft_operator import local_pods
from osft_operator.local_container import timestamp
from osft_operator.local_pods import JOB_NAME_LABEL, REPLICA_INDEX_LABEL, REPLICA_TYPE_LABEL, Object


class Pass:
    """One reconciliation of one job."""

    def __init__(self, api: Api, events: Recorder, job: Object, pods: list[Object]) -> None:
        self.api, self._events, self.job, self.pods = api, events, job, pods
        self.spec = job["spec"]
        self.policy: Object = self.spec.get("runPolicy") or {}
        self.status = copy.deepcopy(job.get("status") or {})
        self.now = time.time()
        self.namespace: str = job["metadata"]["namespace"]
        self.name: str = job["metadata"]["name"]

    def run(self) -> None:
        if self.policy.get("managedBy", "kubeflow.org/training-operator") != (
            "kubeflow.org/training-operator"
        ):
            return
        if "deletionTimestamp" in self.job["metadata"]:
            return
        if not training_status.condition(self.status, "Created"):
            message = f"PyTorchJob {self.name} is created."
            training_status.set_condition(self.status, "Created", message, self.now)
        if training_status.is_finished(self.status):
            self._clean_up()
        elif self.policy.get("suspend"):
            self._suspend()
        else:
            self._resume()
            if reason := self._limit_reached():
                self._fail(reason)
                self._clean_up()
            else:
                self._reconcile_replicas()
        self._write_status()

    def _clean_up(self) -> None:
        """Delete pods by cleanPodPolicy, the job itself after its TTL."""
        wanted = self.policy.get("cleanPodPolicy") or "None"
        for pod in self.pods:
            phase = pod.get("status", {}).get("phase")
            if wanted == "All" or (wanted == "Running" and phase in ("Running", "Pending")):
                self._delete_pod(pod)
        for counts in (self.status.get("replicaStatuses") or {}).values():
            if training_status.is_true(self.status, "Succeeded"):
                counts["succeeded"] = counts.get("succeeded", 0) + counts.get("active", 0)
            counts["active"] = 0
        if ttl_is_over(self.job):
            self.api.attempt(
                "DELETE",
                f"/apis/kubeflow.org/v1/namespaces/{self.namespace}/pytorchjobs/{self.name}",
            )

    def _suspend(self) -> None:
        for pod in self.pods:
            self._delete_pod(pod)
        for service in local_pods.services(self.job):
            self._delete("services", service["metadata"]["name"])
        for counts in (self.status.get("replicaStatuses") or {}).values():
            counts["active"] = 0
        message = f"PyTorchJob {self.name} is suspended."
        self._event("PyTorchJobSuspended", message)
        training_status.set_condition(self.status, "Suspended", message, self.now)

    def _resume(self) -> None:
        if training_status.is_true(self.status, "Suspended"):
            message = f"PyTorchJob {self.name} is resumed."
            # said again with every pass that fails, since such a pass writes no status
            self._event("PyTorchJobResumed", message)
            training_status.set_condition(
                self.status,
                "Suspended",
                message,
                self.now,
                value=False,
                reason="PyTorchJobResumed",
            )
            self.status["startTime"] = timestamp(self.now)
        self.status.setdefault("startTime", timestamp(self.now))

    def _limit_reached(self) -> str | None:
        limit = self.policy.get("backoffLimit")
        counted = [
            pod
            for pod in self.pods
            if self._restart_policy(_replica_type(pod)) in ("OnFailure", "Always", "ExitCode")
        ]
        if limit is not None:
            restarts = training_status.restarts(counted)
            if restarts > 0 if limit == 0 else restarts >= limit:
                return (
                    f"Job {self.name} has failed because it has reached the specified backoff limit"
                )
        deadline = self.policy.get("activeDeadlineSeconds")
        if deadline is not None and self.now - _seconds(self.status["startTime"]) >= deadline:
            return (
                f"Job {self.name} has failed because it was active longer than specified deadline"
            )
        return None

    def _fail(self, message: str) -> None:
        self.status["completionTime"] = timestamp(self.now)
        training_status.set_condition(self.status, "Failed", message, self.now)

    def _reconcile_replicas(self) -> None:
        pods, services = local_pods.pods(self.job), local_pods.services(self.job)
        here = {pod["metadata"]["name"]: pod for pod in self.pods}
        statuses = self.status.setdefault("replicaStatuses", {})
        permanent = False
        for pod in self.pods:
            self._tell_abnormal(pod)
        # the original goes through a map
        kinds = random.sample(kinds := list(self.spec["pytorchReplicaSpecs"]), len(kinds))
        for kind in kinds:
            mine = [pod for pod in self.pods if _replica_type(pod) == kind]
            statuses[kind] = training_status.count(mine)
            statuses[kind]["selector"] = (
                f"{JOB_NAME_LABEL}={self.name},{REPLICA_TYPE_LABEL}={kind.lower()}"
            )
            for wanted in [pod for pod in pods if _replica_type(pod) == kind]:
                name = wanted["metadata"]["name"]
                if name in here:
                    permanent |= self._judge_pod(here[name], kind)
                else:
                    self._create_pod(wanted)
            for wanted in [each for each in services if _replica_type(each) == kind]:
                self._create("services", wanted)
            self._delete_surplus(mine, kind)
        if not permanent:
            training_status.judge(self.job, self.status, self.now)

    def _judge_pod(self, pod: Object, kind: str) -> bool:
        """Delete a failed pod that may be tried again; True when the job failed for good."""
        policy, code = self._restart_policy(kind), training_status.exit_code(pod)
        if code != training_status.NO_EXIT_CODE:
            where = f"{self.namespace}.{pod['metadata']['name']}"
            self._event("ExitedWithCode", f"Pod: {where} exited with code {code}")
        if pod.get("status", {}).get("phase") != "Failed" or policy == "Never":
            return False
        if policy == "ExitCode" and code <= 127:
            message = f'job "{self.name}" is failing because "{kind}" replica(s) failed.'
            self._event("PyTorchJobFailed", message, "Warning")
            # no completionTime on this path: as in the original
            training_status.set_condition(self.status, "Failed", message, self.now)
            return True
        message = f"job {self.name} is restarting because {kind} replica(s) failed."
        self._event("PyTorchJobRestarting", message, "Warning")
        self._delete_pod(pod)
        return False

    def _tell_abnormal(self, pod: Object) -> None:
        """Warn of what the containers of a pod that has not ended wait for, or ended with."""
        status = pod.get("status") or {}
        if status.get("phase") in ("Succeeded", "Failed") or "deletionTimestamp" in pod["metadata"]:
            return
        statuses = status.get("containerStatuses") or status.get("initContainerStatuses") or []
        for each in statuses:
            where = f"Error pod {pod['metadata']['name']} container {each['name']}"
            ended = (each.get("state") or {}).get("terminated") or {}
            waiting = (each.get("state") or {}).get("waiting") or {}
            if ended.get("exitCode"):
                words = f"exitCode: {ended['exitCode']} terminated message: {ended.get('message')}"
                self._event(ended["reason"], f"{where} {words}", "Warning")
            if waiting.get("message"):
                words = f"waiting message: {waiting['message']}"
                self._event(waiting["reason"], f"{where} {words}", "Warning")

    def _delete_surplus(self, pods: list[Object], kind: str) -> None:
        replicas = self.spec["pytorchReplicaSpecs"][kind].get("replicas", 1)
        for pod in pods:
            if int(pod["metadata"]["labels"][REPLICA_INDEX_LABEL]) >= replicas:
                self._delete_pod(pod)
                self._delete("services", pod["metadata"]["name"])

    def _restart_policy(self, kind: str) -> str:
        return str(self.spec["pytorchReplicaSpecs"][kind].get("restartPolicy", "OnFailure"))

    def _create_pod(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        try:
            self.api.post(f"/api/v1/namespaces/{self.namespace}/pods", pod)
        except ApiError as error:
            # already there: our own, not seen yet, or another job's whose pods are still going
            if error.code != 409:
                self._event("FailedCreatePod", f"Error creating: {error.message}", "Warning")
            raise
        self._event("SuccessfulCreatePod", f"Created pod: {name}")

    def _create(self, plural: str, body: Object) -> None:
        self.api.attempt("POST", f"/api/v1/namespaces/{self.namespace}/{plural}", body)

    def _delete_pod(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            self._delete("pods", pod["metadata"]["name"])
            # a pod's service goes with it
            self._delete("services", pod["metadata"]["name"])

    def _delete(self, plural: str, name: str) -> None:
        self.api.attempt("DELETE", f"/api/v1/namespaces/{self.namespace}/{plural}/{name}")

    def _event(self, reason: str, message: str, kind: str = "Normal") -> None:
        self._events.say(self.job, reason, message, kind)

    def _write_status(self) -> None:
        if self.status == (self.job.get("status") or {}):
            return
        path = f"/apis/kubeflow.org/v1/namespaces/{self.namespace}/pytorchjobs/{self.name}/status"
        # with the resourceVersion that was read: whoever saw less must not overwrite
        try:
            self.api.put(path, {**self.job, "status": self.status})
        except ApiError as error:
            if error.code != 404:
                raise


def _replica_type(thing: Object) -> str:
    return str(thing["metadata"]["labels"][REPLICA_TYPE_LABEL]).capitalize()


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).timestamp()


def ttl_is_over(job: Object) -> bool:
    status = job.get("status") or {}
    seconds = (job["spec"].get("runPolicy") or {}).get("ttlSecondsAfterFinished")
    if seconds is None or not training_status.is_finished(status):
        return False
    # without a completionTime the original only logs an error, for ever
    ended = status.get("completionTime")
    return ended is not None and time.time() - _seconds(ended) >= seconds
