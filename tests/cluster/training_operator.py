"""A stand-in for Kubeflow's training-operator (v1.9), for PyTorchJobs only.

Watches PyTorchJobs and their pods, makes pods and services (by osft_operator.local_pods), keeps the
status, and does what restart policy, backoffLimit, deadline, cleanPodPolicy, TTL and suspend say:
with the real one's weaknesses, which is why an object is looked at only when something has changed
(so activeDeadlineSeconds fires late, as it does there). What fails is tried again ever more rarely,
a hundred times as fast as there. The rules of its webhook are in webhook.py. Its HPA, PodGroups and
gang scheduling are not here.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import urllib3

from cluster.api import Api, ApiError, Informer
from cluster.training_events import Recorder
from cluster.training_pass import Pass, ttl_is_over
from osft_operator.local_pods import JOB_NAME_LABEL, Object

log = logging.getLogger(__name__)
JOBS = "/apis/kubeflow.org/v1/pytorchjobs"
LOOK_SECONDS = 0.5
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.005, 10.0
"""Waits after passes that fail, doubled each time; the last is 1,000 s in the original."""


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
        self._failures: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._events = Recorder(api)

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
            due = min(self._due.values(), default=float("inf")) - time.monotonic()
            self._changed.wait(max(0.0, min(due, LOOK_SECONDS)))
            self._changed.clear()
            jobs = self._jobs.items()
            there = {job["metadata"]["uid"] for job in jobs}
            self._due = {uid: due for uid, due in self._due.items() if uid in there}
            for job in jobs:
                if self._stopped.is_set():
                    return
                self._look(job)

    def _look(self, job: Object) -> None:
        uid = job["metadata"]["uid"]
        pods = [each for each in self._pods.items() if _owner(each) == uid]
        versions = [each["metadata"]["resourceVersion"] for each in [job, *pods]]
        is_due = self._due.get(uid, float("inf")) <= time.monotonic()
        if self._seen.get(uid) == versions and not is_due and not ttl_is_over(job):
            return
        self._seen[uid] = versions
        self._due.pop(uid, None)
        try:
            Pass(self._api, self._events, job, pods).run()
            self._failures.pop(uid, None)
        except ApiError as error:
            # a refusal, a conflict, a name still taken
            log.info("%s: %s", job["metadata"]["name"], error)
            self._try_again(uid)
        except urllib3.exceptions.HTTPError as error:
            log.info("the API server is away: %s", error)
            self._try_again(uid)

    def _try_again(self, uid: str) -> None:
        failures = self._failures[uid] = self._failures.get(uid, 0) + 1
        wait = min(FIRST_RETRY_SECONDS * 2 ** min(failures, 32), LAST_RETRY_SECONDS)
        self._due[uid] = time.monotonic() + wait


def _owner(pod: Object) -> str | None:
    for reference in pod["metadata"].get("ownerReferences") or []:
        if reference.get("controller"):
            return str(reference["uid"])
    return None
