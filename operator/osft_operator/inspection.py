"""`osft plan`, `osft spectrum` and `osft export`: the trainer's own looks, in its own process.

The operator package has no torch, so what needs the model is done by `osft_trainer.inspect`, which
is started with this interpreter. Called by `cli` only. Must never import torch or the trainer
beyond its contract.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from osft_operator import local_command, local_pods, local_volumes, render, resources
from osft_operator.local import SETTINGS
from osft_operator.local_command import Surroundings
from osft_operator.resolved import Resolved, resolve
from osft_operator.spec import OSFTJob

MODULE = "osft_trainer.inspect"
NEEDED = ("torch", "transformers")
"""What the trainer extra brings and its modules cannot do without."""


def plan(body: Mapping[str, Any], volumes: Path, options: Sequence[str]) -> int:
    """Print what the run of an OSFTJob would do; the exit code.

    The arguments, paths and variables are those of the pod that `osft run` would start.

    Args:
        body: the OSFTJob, valid.
        volumes: holds a folder per claim, as for `osft run`.
        options: further arguments of the trainer's `plan`; --memory-gib among them stands for the
            job's own memory limit, too, where the run is on the CPU.

    Raises:
        ValueError: the trainer is not installed, or a Secret that the pod needs is missing.
    """
    _check_trainer("plan")
    metadata = {"namespace": "local", "generation": 1, **body["metadata"], "uid": str(uuid.uuid4())}
    job = OSFTJob.model_validate({**body, "metadata": metadata})
    resolved = resolve(job, SETTINGS)
    pod = local_pods.pods(render.pytorch_job(job, resolved))[0]
    container = next(
        part for part in pod["spec"]["containers"] if part["name"] == local_pods.CONTAINER
    )
    device = "cuda" if resources.gpus({**job.spec.resources.limits}) else "cpu"
    with tempfile.TemporaryDirectory(prefix="osft-plan-") as work_dir:
        at = Surroundings(
            work_dir=Path(work_dir),
            mark=f"osft-plan-{uuid.uuid4().hex[:12]}",
            volumes=local_volumes.folders(pod, volumes, Path(work_dir)),
            references=partial(local_volumes.reference, volumes),
        )
        words = local_command.command(pod, container, at)
        arguments = words[len(container["command"]) :]
        told = [f"--processes={resolved.world_size}", f"--device={device}"]
        told += [*_host_memory(job, resolved, device, options), *options]
        environment = _lasting(local_command.environment(pod, container, at), work_dir)
        return run(["plan", *told, "--", *arguments], environment)


def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Start `python -m osft_trainer.inspect`; its exit code.

    Raises:
        ValueError: the trainer is not installed beside this package.
    """
    _check_trainer(arguments[0])
    command = [sys.executable, "-m", MODULE, *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def _host_memory(
    job: OSFTJob, resolved: Resolved, device: str, options: Sequence[str]
) -> list[str]:
    """The memory limit of a pod as an argument, shared out over its processes."""
    limit = job.spec.resources.limits.get("memory")
    told = device == "cpu" and any(option.startswith("--memory-gib") for option in options)
    if limit is None or told:
        return []
    gib = float(resources.quantity(limit) / resolved.nproc_per_node / 2**30)
    return [f"--host-memory-gib={gib}"]


def _check_trainer(command: str) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"`osft {command}` needs the trainer, and {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed here: "
            "pip install 'osft[trainer]', or run it in the trainer image"
        )


def _lasting(environment: Mapping[str, str], work_dir: str) -> dict[str, str]:
    """Downloads go to the caller's cache where the job has an emptyDir, which would be gone."""
    found = dict(environment)
    for name in ("HOME", "HF_HOME"):
        if found.get(name, "").startswith(work_dir):
            found.pop(name)
            found |= {name: os.environ[name]} if name in os.environ else {}
    return found
