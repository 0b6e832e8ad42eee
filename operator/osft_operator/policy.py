"""What an OSFTJob may not ask for, although its form is right.

Called by decide before anything is made, and by `osft validate`. Pure. The author of an OSFTJob
needs only the right to create OSFTJobs, while pods are made with the operators' rights; so nothing
may pass here that Pod Security `restricted` would refuse, and nothing that breaks the rendezvous.
The namespace's Pod Security admission stays the second line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from osft_operator import names
from osft_operator.pod_merge import APPENDED, KEYS
from osft_operator.policy_security import Denial, security
from osft_operator.spec import OSFTJob

__all__ = ["Denial", "denials"]

Object = dict[str, Any]


def denials(job: OSFTJob) -> list[Denial]:
    """Everything that is refused; empty if nothing is."""
    template = job.spec.pod_template
    if wrong := list(_shapes(template.spec, "spec.podTemplate.spec")):
        return wrong
    return [
        *_environment(job),
        *_queue(job),
        *_metadata(template.metadata),
        *_pod_spec(template.spec),
        *_volumes(template.spec),
        *_containers(template.spec),
    ]


def _environment(job: OSFTJob) -> Iterator[Denial]:
    own = {
        "HF_TOKEN": job.spec.secrets.hf_token and "secrets.hfToken",
        "WANDB_API_KEY": job.spec.secrets.wandb_api_key and "secrets.wandbApiKey",
    }
    seen: set[str] = set()
    for index, variable in enumerate(job.spec.env):
        where = f"spec.env[{index}].name"
        if variable.name in seen:
            yield Denial("RepeatedVariable", where, f"{variable.name} is given twice: keep one")
        if own.get(variable.name):
            yield Denial(
                "RepeatedVariable",
                where,
                f"{variable.name} is set by spec.{own[variable.name]}: keep one of them",
            )
        seen.add(variable.name)


def _queue(job: OSFTJob) -> Iterator[Denial]:
    pairs = (
        ("queueName", job.spec.queue_name, names.QUEUE_LABEL),
        (
            "workloadPriorityClassName",
            job.spec.workload_priority_class_name,
            names.WORKLOAD_PRIORITY_LABEL,
        ),
    )
    for field, value, label in pairs:
        given = job.metadata.labels.get(label)
        if value is not None and given is not None and given != value:
            yield Denial(
                "TwoQueues", f"spec.{field}", f"is {value}, but label {label} is {given}: keep one"
            )


def _metadata(metadata: Object) -> Iterator[Denial]:
    for key in metadata:
        if key not in ("labels", "annotations"):
            yield Denial(
                "UnknownField",
                f"spec.podTemplate.metadata.{key}",
                "only labels and annotations can be given: remove it",
            )
    for kind in ("labels", "annotations"):
        entries = metadata.get(kind, {})
        where = f"spec.podTemplate.metadata.{kind}"
        if not isinstance(entries, dict):
            yield Denial("WrongType", where, "must be a map of texts")
            continue
        for name, value in entries.items():
            if not isinstance(value, str):
                yield Denial("WrongType", f"{where}[{name}]", "must be a text: put it in quotes")
            elif name.startswith(names.RESERVED_LABEL_PREFIXES):
                yield Denial(
                    "ReservedLabel", f"{where}[{name}]", "belongs to the operators: remove it"
                )
            elif "apparmor.security.beta" in name or "seccomp.security.alpha" in name:
                yield Denial("Isolation", f"{where}[{name}]", "weakens the pod: remove it")


def _shapes(part: Object, where: str) -> Iterator[Denial]:
    """Lists that are merged must be lists of objects, so that merging cannot fail."""
    for key in (*KEYS, *APPENDED):
        entries = part.get(key)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield Denial("WrongType", f"{where}.{key}", "must be a list of objects")
        elif key in ("containers", "initContainers"):
            for index, entry in enumerate(entries):
                yield from _shapes(entry, f"{where}.{key}[{index}]")
        elif key == "volumes":
            for index, entry in enumerate(entries):
                yield from _projected_shape(entry, f"{where}.{key}[{index}]")


def _projected_shape(volume: Object, where: str) -> Iterator[Denial]:
    projected = volume.get("projected")
    if projected is None:
        return
    sources = projected.get("sources", []) if isinstance(projected, dict) else None
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        yield Denial("WrongType", f"{where}.projected.sources", "must be a list of objects")


HAS_FIELD = {
    "imagePullSecrets": "spec.imagePullSecrets",
    "terminationGracePeriodSeconds": "spec.terminationGracePeriodSeconds",
    "priorityClassName": "spec.priorityClassName",
    "schedulerName": "spec.schedulerName",
    "activeDeadlineSeconds": "spec.activeDeadlineSeconds",
}
"""Fields of a PodSpec that are fields of an OSFTJob."""

FORBIDDEN = {
    "hostNetwork": "shares the node's network",
    "hostPID": "shares the node's processes",
    "hostIPC": "shares the node's memory",
    "hostUsers": "is not supported",
    "serviceAccountName": "gives the pod the rights of a service account",
    "serviceAccount": "gives the pod the rights of a service account",
    "automountServiceAccountToken": "gives the pod a token of the API server",
    "nodeName": "passes by the scheduler; use nodeSelector",
    "restartPolicy": "is the operator's: see spec.maxRestarts",
    "hostname": "is how the pods find each other",
    "subdomain": "is how the pods find each other",
    "setHostnameAsFQDN": "is how the pods find each other",
    "ephemeralContainers": "cannot be given at creation",
}
"""Fields of a PodSpec that are refused, and why."""


def _pod_spec(spec: Object) -> Iterator[Denial]:
    for key in spec:
        where = f"spec.podTemplate.spec.{key}"
        if key in HAS_FIELD:
            yield Denial("HasOwnField", where, f"has a field of its own: use {HAS_FIELD[key]}")
        elif key in FORBIDDEN:
            yield Denial("Forbidden", where, f"{FORBIDDEN[key]}: remove it")
    yield from security(spec.get("securityContext"), "spec.podTemplate.spec.securityContext")


ALLOWED_VOLUMES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
"""Volume types of Pod Security `restricted`."""
CREDENTIALS = {"serviceAccountToken", "podCertificate"}
"""Sources of a projected volume by which the pod could speak for its service account."""


def _volumes(spec: Object) -> Iterator[Denial]:
    for where, volume in _entries(spec, "volumes", "spec.podTemplate.spec"):
        name = volume.get("name")
        if name in names.RESERVED_VOLUMES:
            yield Denial("ReservedVolume", where, f"{name} is the operator's own: rename it")
        for kind in volume:
            if kind != "name" and kind not in ALLOWED_VOLUMES:
                yield Denial(
                    "VolumeType",
                    f"{where}.{kind}",
                    f"is refused; allowed are {', '.join(ALLOWED_VOLUMES)}",
                )
        sources = (volume.get("projected") or {}).get("sources", [])
        if any(source.keys() & CREDENTIALS for source in sources):
            yield Denial("Forbidden", f"{where}.projected", "gives the pod a credential: remove it")


TRAINER_FIELDS = {
    "image": "spec.image",
    "imagePullPolicy": "spec.imagePullPolicy",
    "env": "spec.env",
    "envFrom": "spec.envFrom",
    "resources": "spec.resources",
    "command": "spec.training",
    "args": "spec.training",
    "terminationMessagePath": "the operator's own",
    "terminationMessagePolicy": "the operator's own",
}
"""Fields of the trainer's container that are fields of an OSFTJob."""


def _containers(spec: Object) -> Iterator[Denial]:
    for kind in ("containers", "initContainers"):
        for where, container in _entries(spec, kind, "spec.podTemplate.spec"):
            yield from _container(container, where)
            if container.get("name") != names.CONTAINER:
                continue
            if kind == "initContainers":
                yield Denial("ReservedName", where, "the name pytorch is the trainer's: rename it")
            for key in container:
                if key in TRAINER_FIELDS:
                    cure = TRAINER_FIELDS[key]
                    yield Denial("HasOwnField", f"{where}.{key}", f"is refused here: use {cure}")


def _container(container: Object, where: str) -> Iterator[Denial]:
    yield from security(container.get("securityContext"), f"{where}.securityContext")
    for here, port in _entries(container, "ports", where):
        if port.get("hostPort"):
            yield Denial("Forbidden", f"{here}.hostPort", "opens a port of the node: remove it")
        if not port.get("name"):
            yield Denial("UnnamedPort", here, "the pods' services need a name for each port")
    for here, mount in _entries(container, "volumeMounts", where):
        if mount.get("mountPropagation") not in (None, "None"):
            yield Denial("Forbidden", f"{here}.mountPropagation", "reaches the node: remove it")


def _entries(parent: Object, key: str, where: str) -> Iterator[tuple[str, Object]]:
    """The entries of a list with their paths."""
    for index, entry in enumerate(parent.get(key) or []):
        yield f"{where}.{key}[{index}]", entry
