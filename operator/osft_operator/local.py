"""Runs an OSFTJob on this machine, without a cluster.

A cluster of one job in memory: it hands what is there to the same `decide` that the operator uses,
and carries out its decisions with processes instead of pods and folders instead of claims. So
restarts, failures and the status have one meaning in both places. Called by `cli`. It never talks
to an API server and writes nothing outside its folders and the job's volumes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from osft_operator import decide as brain
from osft_operator import local_pods, local_volumes
from osft_operator.local_runner import BackOff, PodProcess, Surroundings, free_port
from osft_operator.observed import Observed
from osft_operator.process_tree import Watchdog
from osft_operator.resolved import RenderSettings
from osft_operator.spec import OSFTJob
from osft_trainer.report import Progress, RunFolder, read_document

Object = dict[str, Any]

POLL_SECONDS = 0.1
"""How often processes are looked at."""
DECIDE_SECONDS = 0.5
"""How often, at least, the state is looked at as a whole."""
BACK_OFF = BackOff(first_seconds=1, cap_seconds=30)
"""Pause before a failed pod's container is started again; a machine of one's own may hurry."""

SETTINGS = RenderSettings(trainer_image="this-machine")
"""No image is pulled here: the trainer is the one installed beside this package."""


class LocalJob:
    """One OSFTJob on this machine; `status` is the CR's status.

    A context manager: when it is left, or this process dies, no process of the job is left.
    """

    def __init__(self, body: Mapping[str, Any], volumes: Path, work_dir: Path) -> None:
        """Prepare the run.

        Args:
            body: the OSFTJob, valid.
            volumes: holds a folder per claim, and `secrets/NAME`, `configmaps/NAME`: a file a key.
            work_dir: takes logs and emptyDirs, and may go.

        Raises:
            ValueError: the job is suspended.
        """
        metadata = {"namespace": "local", "generation": 1, **body["metadata"]}
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": _now().isoformat()}
        self.body: Object = {**body, "metadata": metadata, "status": {}}
        self.job = OSFTJob.model_validate(self.body)
        if self.job.spec.suspend:
            raise ValueError("spec.suspend: true starts nothing: remove it to run the job here")
        self.volumes = volumes
        self.work_dir = work_dir
        self.mark = f"osft-run-{uuid.uuid4().hex[:12]}"
        self.pytorch_job: Object | None = None
        self.pods: list[PodProcess] = []
        own = self.job.spec.storage.checkpoints.claim_name  # a folder, so it is always there
        self.claim: Object | None = None if own is None else {"metadata": {"name": own}}
        self.events: list[tuple[str, str]] = []
        self._watchdog = Watchdog(self.mark)
        self._due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog.close()

    @property
    def status(self) -> Object:
        """The status so far, as `kubectl get osftjob -o yaml` would show it."""
        status: Object = self.body["status"]
        return status

    @property
    def finished(self) -> bool:
        """Whether the job has succeeded or failed and no process is left."""
        ended = self.status.get("phase") in ("Succeeded", "Failed")
        return ended and all(pod.finished for pod in self.pods)

    @property
    def run_folder(self) -> RunFolder:
        """Where the run writes, as a folder of this machine."""
        checkpoints = self.job.spec.storage.checkpoints
        inside = Path(self.job.spec.training.ckpt_output_dir).relative_to(checkpoints.mount_path)
        claim = self.volumes / (self.status.get("resolved", {}).get("checkpointClaim") or "")
        return RunFolder(claim / (checkpoints.sub_path or "") / inside)

    def run(self, on_change: Callable[[LocalJob], None]) -> Object:
        """Run to the end; KeyboardInterrupt passes through, see `stop`. Returns the status."""
        while not self.finished:
            if self.poll():
                on_change(self)
            time.sleep(POLL_SECONDS)
        return self.status

    def poll(self) -> bool:
        """Look at every process and decide; True when the status has changed."""
        # a list: every pod gets its look
        changed = any([pod.poll() for pod in self.pods])
        if not changed and time.monotonic() < self._due:
            return False
        self._due = time.monotonic() + DECIDE_SECONDS
        return self._pass()

    def stop(self) -> None:
        """End every process: SIGTERM, so that a checkpoint is saved, then wait."""
        for pod in self.pods:
            pod.stop()
        while not all(pod.finished for pod in self.pods):
            for pod in self.pods:
                pod.poll()
            time.sleep(POLL_SECONDS)

    def log_paths(self) -> list[tuple[str, Path]]:
        """The newest log of each pod's trainer."""
        found = [(pod.pod["metadata"]["name"], pod.log_path()) for pod in self.pods]
        return [(name, path) for name, path in found if path is not None]

    def _pass(self) -> bool:
        """Observe, decide, act, record."""
        decision = brain.decide(self._observe(), _now())
        for action in decision.actions:
            self._act(action)
        self.events += [(event.reason, event.message) for event in decision.events]
        changed = decision.status != self.status
        self.body["status"] = decision.status
        if decision.requeue_after is not None:
            self._due = min(self._due, time.monotonic() + decision.requeue_after)
        return changed

    def _observe(self) -> Observed:
        progress = read_document(self.run_folder.progress, Progress)
        if progress is not None and progress.run_id != self.body["metadata"]["uid"]:
            progress = None
        return Observed(
            body=self.body,
            settings=SETTINGS,
            pytorch_jobs=() if self.pytorch_job is None else (self._pytorch_job_seen(),),
            pods=tuple({**pod.pod, "status": pod.status()} for pod in self.pods),
            claim=self.claim,
            progress=progress,
        )

    def _pytorch_job_seen(self) -> Object:
        """The PyTorchJob with the conditions that the training-operator would report."""
        assert self.pytorch_job is not None
        phases = [pod.phase for pod in self.pods]
        master = "Master" in self.pytorch_job["spec"]["pytorchReplicaSpecs"]
        decisive = phases[:1] if master else phases
        kinds = {
            "Created": True,
            "Running": "Running" in phases,
            "Succeeded": all(phase == "Succeeded" for phase in decisive),
            "Failed": "Failed" in phases,
        }
        conditions = [
            {"type": kind, "status": "True", "reason": f"PyTorchJob{kind}", "message": ""}
            for kind, holds in kinds.items()
            if holds
        ]
        return {**self.pytorch_job, "status": {"conditions": conditions}}

    def _act(self, action: brain.Action) -> None:
        if isinstance(action, brain.CreateClaim):
            self.claim = {**action.manifest, "status": {"phase": "Bound"}}
        elif isinstance(action, brain.CreatePyTorchJob):
            self._start(action.manifest)
        elif isinstance(action, brain.DeletePyTorchJob):
            self.stop()
            # the pods stay known: their logs are asked for at the end
            self.pytorch_job = None

    def _start(self, manifest: Object) -> None:
        metadata = {**manifest["metadata"], "uid": str(uuid.uuid4())}
        self.pytorch_job, self.pods = {**manifest, "metadata": metadata}, []
        pods = local_pods.pods(self.pytorch_job)
        addresses = {
            pod["metadata"]["name"]: f"127.0.0.{number}" for number, pod in enumerate(pods, 2)
        }
        ports: dict[int, int] = {}
        for pod in pods:
            name = pod["metadata"]["name"]
            pod["metadata"]["uid"] = str(uuid.uuid4())
            at = Surroundings(
                work_dir=self.work_dir / name,
                mark=f"{self.mark}/{name}",
                pod_ip=addresses[name],
                volumes=local_volumes.folders(pod, self.volumes, self.work_dir),
                host=lambda host: addresses.get(host, "127.0.0.1"),
                port=lambda port: ports.setdefault(port, free_port()),
                references=partial(local_volumes.reference, self.volumes),
            )
            self.pods.append(PodProcess(pod, at, back_off=BACK_OFF))
        for process in self.pods:
            process.start()


def _now() -> datetime:
    return datetime.now(UTC)
