"""The template of a training pod.

Called by render. Pure. The pod is one that Pod Security `restricted` admits: no root, no
capabilities, no token of the API server; nothing in it goes through a shell.
"""

from __future__ import annotations

from typing import Any

from osft_operator import names
from osft_operator.pod_merge import merge
from osft_operator.resolved import Resolved
from osft_operator.spec import OSFTJob
from osft_operator.spec_pod import SecretKey
from osft_operator.volumes import cache_variables, volume_mounts, volumes
from osft_trainer.arguments import DEFAULTS_ENV, TrainerArguments
from osft_trainer.config import LaunchParameters, RunParameters
from osft_trainer.report import METRICS_PORT, POD_IP_ENV, TERMINATION_LOG_ENV

Object = dict[str, Any]

SHUTDOWN_RESERVE_SECONDS = 30
"""Part of the grace period that torchrun keeps for itself after its processes saved."""
OWN_CODE_ONLY = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
"""No module comes from the working folder, nor from packages in HOME, which is a user's volume."""
NO_ISTIO = {"sidecar.istio.io/inject": "false"}
NO_LINKERD = {"linkerd.io/inject": "disabled"}
RESTRICTED_CONTAINER: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
}


def template(job: OSFTJob, resolved: Resolved, attempt: int, rank: list[Object]) -> Object:
    """PodTemplateSpec of all pods of an attempt.

    Args:
        job: the OSFTJob.
        resolved: what was settled before the first attempt.
        attempt: number of the attempt, from 1.
        rank: further variables by which a pod finds its place, if the shape needs them.
    """
    base: Object = {
        "metadata": {
            # a proxy between the ranks breaks the rendezvous, and does not end when the trainer
            # does; old Istio reads the annotation
            "labels": {**labels(job, attempt), **NO_ISTIO},
            "annotations": {**NO_ISTIO, **NO_LINKERD},
        },
        "spec": _spec(job, resolved, attempt, rank),
    }
    given = job.spec.pod_template
    merged = merge(base, {"metadata": given.metadata, "spec": given.spec})
    for kind in ("containers", "initContainers"):
        for container in merged["spec"].get(kind) or []:
            own = container.get("securityContext") or {}
            container["securityContext"] = merge(RESTRICTED_CONTAINER, own)
    return merged


def labels(job: OSFTJob, attempt: int) -> dict[str, str]:
    """Labels of everything that an attempt is made of."""
    return {
        "app.kubernetes.io/name": "osft-trainer",
        "app.kubernetes.io/instance": job.metadata.name,
        "app.kubernetes.io/managed-by": "osft-operator",
        names.JOB_LABEL: job.metadata.name,
        names.ATTEMPT_LABEL: str(attempt),
    }


def _spec(job: OSFTJob, resolved: Resolved, attempt: int, rank: list[Object]) -> Object:
    spec = job.spec
    optional: Object = {
        "priorityClassName": spec.priority_class_name,
        "schedulerName": spec.scheduler_name,
        "imagePullSecrets": [{"name": secret.name} for secret in spec.image_pull_secrets],
    }
    return {
        "automountServiceAccountToken": False,
        # variables of all services of the namespace are noise, and may be thousands
        "enableServiceLinks": False,
        "securityContext": _security(resolved),
        "terminationGracePeriodSeconds": spec.termination_grace_period_seconds,
        "containers": [_container(job, resolved, attempt, rank)],
        "volumes": volumes(spec, resolved),
        **{name: value for name, value in optional.items() if value},
    }


def _security(resolved: Resolved) -> Object:
    context: Object = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if resolved.run_as_user is not None:
        context["runAsUser"] = resolved.run_as_user
    if resolved.run_as_group is not None:
        context["runAsGroup"] = resolved.run_as_group
    if resolved.fs_group is not None:
        context["fsGroup"] = resolved.fs_group
        # a volume with millions of files is not walked at every start
        context["fsGroupChangePolicy"] = "OnRootMismatch"
    return context


def _container(job: OSFTJob, resolved: Resolved, attempt: int, rank: list[Object]) -> Object:
    spec = job.spec
    args, defaults = arguments(job, resolved, attempt)
    container: Object = {
        "name": names.CONTAINER,
        "image": resolved.image,
        "imagePullPolicy": resolved.image_pull_policy,
        "command": ["python", "-m", "osft_trainer.launch"],
        "args": args,
        "env": _environment(job, resolved, rank, defaults),
        "ports": [
            {"name": names.RENDEZVOUS_PORT_NAME, "containerPort": spec.rendezvous.port},
            {"name": names.METRICS_PORT_NAME, "containerPort": METRICS_PORT},
        ],
        "volumeMounts": volume_mounts(spec),
        "terminationMessagePath": names.TERMINATION_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if spec.env_from:
        container["envFrom"] = [_dump(source) for source in spec.env_from]
    resources = {"limits": dict(spec.resources.limits), "requests": dict(spec.resources.requests)}
    if any(resources.values()):
        container["resources"] = {name: value for name, value in resources.items() if value}
    return container


def arguments(job: OSFTJob, resolved: Resolved, attempt: int) -> tuple[list[str], str]:
    """The trainer's arguments, and the parameters that are at their default (DEFAULTS_ENV)."""
    run = RunParameters(
        run_id=job.metadata.uid or None,
        attempt=attempt,
        on_existing_run=job.spec.on_existing_run,
    )
    launch = LaunchParameters(metrics_port=METRICS_PORT)
    # where the first attempt wrote, whatever the default is by now
    training = job.spec.training.model_copy(update={"ckpt_output_dir": resolved.checkpoint_dir})
    argv, defaults = TrainerArguments(training, run, launch).for_any_version()
    return [_literal(text) for text in argv], _literal(defaults)


def _literal(argument: str) -> str:
    """Keep Kubernetes from reading `$(NAME)` or `$$` in an argument as something else."""
    return argument.replace("$", "$$") if "$(" in argument or "$$" in argument else argument


def _environment(
    job: OSFTJob, resolved: Resolved, rank: list[Object], at_default: str
) -> list[Object]:
    """Defaults that the user may replace, the user's variables, then the operator's."""
    spec = job.spec
    defaults = {**OWN_CODE_ONLY, **cache_variables(spec)}
    if resolved.omp_num_threads is not None:
        defaults["OMP_NUM_THREADS"] = str(resolved.omp_num_threads)
    merged = {name: _variable(name, value) for name, value in defaults.items()}
    merged |= {variable.name: _dump(variable) for variable in spec.env}
    if spec.secrets.hf_token is not None:
        merged["HF_TOKEN"] = _secret("HF_TOKEN", spec.secrets.hf_token)
    if spec.secrets.wandb_api_key is not None:
        merged["WANDB_API_KEY"] = _secret("WANDB_API_KEY", spec.secrets.wandb_api_key)
    shutdown = spec.termination_grace_period_seconds - SHUTDOWN_RESERVE_SECONDS
    return [
        *merged.values(),
        {"name": POD_IP_ENV, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        _variable(TERMINATION_LOG_ENV, names.TERMINATION_PATH),
        _variable(DEFAULTS_ENV, at_default),
        # else torchrun kills its processes 30 s after SIGTERM, in the middle of a save
        _variable("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(shutdown)),
        *rank,
    ]


def _variable(name: str, value: str) -> Object:
    return {"name": name, "value": value}


def _secret(name: str, key: SecretKey) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": key.name, "key": key.key}}}


def _dump(part: Any) -> Object:
    written: Object = part.model_dump(by_alias=True, exclude_none=True)
    return written
