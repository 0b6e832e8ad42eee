"""A kubelet for one fake node: runs pods as processes of this machine (osft_operator.local_runner).

It is also the scheduler (binds every pending pod to its node); kubelet_storage is the provisioner.
It runs init containers except `init-pytorch`, whose wait for the master's DNS name has no sense
here: that one is reported as completed. Not here: resource limits, security contexts, probes,
read-only mounts, service networking. A pod sees its own address in 127.0.0.0/8.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import urllib3

from cluster.api import MERGE_PATCH, Api, ApiError, Informer
from cluster.kubelet_logs import LogServer
from cluster.kubelet_storage import NotReady, Storage
from osft_operator.local_pods import JOB_NAME_LABEL, Object
from osft_operator.local_runner import (
    BackOff,
    PodProcess,
    Surroundings,
    free_port,
    image_environment,
)

log = logging.getLogger(__name__)
NODE = "this-machine"
POLL_SECONDS = 0.1


class Kubelet:
    """Runs in a thread of its own between `start` and `stop`."""

    def __init__(
        self,
        api: Api,
        folder: Path,
        mark: str,
        *,
        back_off: BackOff | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Make a kubelet.

        Args:
            api: a client with a kubelet's rights and more.
            folder: logs and volumes; a short path, see Surroundings.
            mark: the session in the process tree; the caller holds a Watchdog on it.
            back_off: between a container's restarts; absent, short ones.
            environment: added to that of the "image".
        """
        self.folder = folder
        # Pods share this machine, and two ranks may not share a GPU.
        ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.environment = {**image_environment(), **ours, **(environment or {})}
        self.back_off = back_off or BackOff(first_seconds=0.5, cap_seconds=2)
        self._api, self._mark = api, f"{mark}/pods"
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._pods = Informer(api, "/api/v1/pods", self._changed)
        self._storage = Storage(api, folder, self._changed)
        self._thread = threading.Thread(target=self._run, daemon=True, name="kubelet")
        self._runners: dict[str, PodProcess] = {}
        self._complaints: dict[str, str] = {}
        self._unreported: set[str] = set()
        self._addresses: dict[tuple[str, str], str] = {}
        self._ports: dict[tuple[str, str, int], int] = {}
        self._numbers = itertools.count()
        self._server = LogServer(folder, self.runner)

    def start(self) -> None:
        """Register the node and begin to run pods."""
        self._server.start()
        self._register()
        for each in (self._pods, self._storage.claims, self._thread):
            each.start()

    def stop(self) -> None:
        """End everything that runs; the logs stay in the folder."""
        self._pods.stop()
        self._storage.claims.stop()
        self._stopped.set()
        self._changed.set()
        self._thread.join()
        for runner in self._runners.values():
            runner.kill()
            runner.poll()
        self._server.stop()

    def runner(self, namespace: str, name: str) -> PodProcess:
        """The processes of a pod.

        Raises:
            KeyError: no such pod runs or has run and still exists.
        """
        for runner in list(self._runners.values()):
            metadata = runner.pod["metadata"]
            if (metadata["namespace"], metadata["name"]) == (namespace, name):
                return runner
        raise KeyError(f"{namespace}/{name}")

    def claim_folder(self, namespace: str, name: str) -> Path:
        """The folder behind a PersistentVolumeClaim."""
        return self._storage.claim_folder(namespace, name)

    def _run(self) -> None:
        self._pods.synced.wait()
        self._storage.claims.synced.wait()
        while not self._stopped.is_set():
            busy = any(not each.finished for each in self._runners.values())
            self._changed.wait(POLL_SECONDS if busy else 1.0)
            self._changed.clear()
            try:
                self._look()
            except (ApiError, urllib3.exceptions.HTTPError) as error:
                log.info("the API server refused or is away: %s", error)
                self._stopped.wait(0.2)
                self._changed.set()

    def _look(self) -> None:
        self._storage.provision()
        pods = {pod["metadata"]["uid"]: pod for pod in self._pods.items()}
        for uid in [each for each in self._runners if each not in pods]:
            self._forget(uid)
        for uid, runner in self._runners.items():
            if runner.poll():
                self._unreported.add(uid)
        for uid, pod in pods.items():
            if uid in self._unreported:
                self._report(pod, self._runners[uid].status())
                self._unreported.discard(uid)
            self._sync(pod)

    def _sync(self, pod: Object) -> None:
        metadata, uid = pod["metadata"], pod["metadata"]["uid"]
        runner = self._runners.get(uid)
        going = "deletionTimestamp" in metadata
        node = pod["spec"].get("nodeName")
        if not node and not going:
            if pod["spec"].get("schedulerName", "default-scheduler") == "default-scheduler":
                self._bind(pod)
        elif node == NODE and going:
            if runner and not runner.finished:
                runner.stop(metadata.get("deletionGracePeriodSeconds", 30))
            else:
                self._api.attempt("DELETE", _path(pod), {"gracePeriodSeconds": 0})
        elif node == NODE and not runner and pod["status"].get("phase") == "Pending":
            self._start(pod)

    def _start(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        try:
            at = self._surroundings(pod)
        except NotReady as error:
            if self._complaints.get(uid) != str(error):
                self._complaints[uid] = str(error)
                self._event(pod, "FailedMount", str(error))
            return
        runner = PodProcess(pod, at, back_off=self.back_off)
        runner.start()
        self._runners[uid] = runner
        self._report(pod, runner.status())

    def _surroundings(self, pod: Object) -> Surroundings:
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        number = next(self._numbers)
        job = (pod["metadata"].get("labels") or {}).get(JOB_NAME_LABEL, name)

        def port(wanted: int) -> int:
            return self._ports.setdefault((namespace, job, wanted), free_port())

        return Surroundings(
            work_dir=self.folder / "pods" / f"{number}-{name}",
            mark=f"{self._mark}/{pod['metadata']['uid']}",
            pod_ip=self.address(namespace, name),
            volumes={
                volume["name"]: self._storage.volume(namespace, volume, self._scratch(number))
                for volume in pod["spec"].get("volumes") or []
            },
            host=lambda host: self.address(namespace, host.split(".")[0]),
            port=port,
            environment=self.environment,
            references=lambda kind, reference: self._storage.data(namespace, kind, reference),
        )

    def _scratch(self, number: int | str) -> Path:
        return self.folder / "v" / str(number)

    def address(self, namespace: str, name: str) -> str:
        """The address of a pod, and of the service of its name."""
        number = len(self._addresses)
        new = f"127.1.{number // 250}.{number % 250 + 1}"
        return self._addresses.setdefault((namespace, name), new)

    def _bind(self, pod: Object) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": NODE},
        }
        self._api.attempt("POST", f"{_path(pod)}/binding", body)

    def _report(self, pod: Object, status: Object) -> None:
        self._api.attempt("PATCH", f"{_path(pod)}/status", {"status": status}, MERGE_PATCH)

    def _forget(self, uid: str) -> None:
        """The pod was deleted by force, or its deletion is complete."""
        runner = self._runners.pop(uid)
        self._unreported.discard(uid)
        runner.kill()
        runner.poll()
        # scratch volumes go with the pod, its logs stay for whoever reads a failed test
        number = runner.at.work_dir.name.split("-")[0]
        shutil.rmtree(self._scratch(number), ignore_errors=True)

    def _event(self, pod: Object, reason: str, message: str) -> None:
        metadata = pod["metadata"]
        keys = ("name", "namespace", "uid")
        body = {
            "metadata": {"generateName": f"{metadata['name']}."},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod"}
            | {key: metadata[key] for key in keys},
            "reason": reason,
            "message": message,
            "type": "Warning",
            "source": {"component": "kubelet"},
        }
        self._api.attempt("POST", f"/api/v1/namespaces/{metadata['namespace']}/events", body)

    def _register(self) -> None:
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.port}},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "capacity": {"cpu": "64", "memory": "256Gi", "pods": "500"},
            "allocatable": {"cpu": "64", "memory": "256Gi", "pods": "500"},
        }
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
        self._api.attempt("POST", "/api/v1/nodes", node)
        # on its creation the server marks a node as not ready
        self._api.attempt("PATCH", f"/api/v1/nodes/{NODE}", {"spec": {"taints": None}}, MERGE_PATCH)
        self._api.attempt("PATCH", f"/api/v1/nodes/{NODE}/status", {"status": status}, MERGE_PATCH)


def _path(pod: Object) -> str:
    metadata = pod["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
