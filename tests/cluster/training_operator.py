"""A stand-in for Kubeflow's training-operator (v1.9), for PyTorchJobs only.

Watches PyTorchJobs and their pods, makes pods and services (by osft_operator.local_pods), keeps the
status, and does what restart policy, backoffLimit, deadline, cleanPodPolicy, TTL and suspend say:
with the real one's weaknesses, which is why an object is looked at only when something has changed
(so activeDeadlineSeconds fires late, as it does there). The rules of its webhook are CEL rules of
pytorchjob_crd.yaml. Its HPA, PodGroups and gang scheduling are not here.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import urllib3

from cluster.api import Api, ApiError, Informer
from cluster.training_pass import Pass, ttl_is_over
from osft_operator.local_pods import JOB_NAME_LABEL, Object

log = logging.getLogger(__name__)
JOBS = "/apis/kubeflow.org/v1/pytorchjobs"
RETRY_SECONDS = 0.5


class TrainingOperator:
    """Runs in a thread of its own between `start` and `stop`."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._jobs = Informer(api, JOBS, self._changed)
        self._pods = Informer(api, f"/api/v1/pods?labelSelector={JOB_NAME_LABEL}", self._changed)
        self._thread = threading.Thread(target=self._run, daemon=True, name="training-operator")
        self._seen: dict[str, Any] = {}

    def start(self) -> None:
        self._jobs.start()
        self._pods.start()
        self._thread.start()

    def stop(self) -> None:
        for each in (self._jobs, self._pods):
            each.stop()
        self._stopped.set()
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        self._pods.synced.wait()
        while not self._stopped.is_set():
            self._changed.wait(RETRY_SECONDS)
            self._changed.clear()
            for job in self._jobs.items():
                if self._stopped.is_set():
                    return
                self._look(job)

    def _look(self, job: Object) -> None:
        uid = job["metadata"]["uid"]
        pods = [each for each in self._pods.items() if _owner(each) == uid]
        versions = [each["metadata"]["resourceVersion"] for each in [job, *pods]]
        if self._seen.get(uid) == versions and not ttl_is_over(job):
            return
        try:
            Pass(self._api, job, pods).run()
            self._seen[uid] = versions
        except ApiError as error:
            # a conflict or a name still taken: look again soon
            log.info("%s: %s", job["metadata"]["name"], error)
        except urllib3.exceptions.HTTPError as error:
            log.info("the API server is away: %s", error)


def _owner(pod: Object) -> str | None:
    for reference in pod["metadata"].get("ownerReferences") or []:
        if reference.get("controller"):
            return str(reference["uid"])
    return None
