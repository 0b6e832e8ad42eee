"""What `spec.podTemplate.spec` may not say: the part of the policy that reads a PodSpec.

Called by policy. Pure. It judges what the user gives, before pod merges it; what pod renders by
itself needs no judgement.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from typing import Any

from osft_operator import names
from osft_operator.pod_merge import APPENDED, KEYS
from osft_operator.policy_allowed import Allowed, matches, may_run, refused_labels, words
from osft_operator.policy_security import Denial, Rule, security
from osft_operator.spec import JobSpec, OSFTJob

Object = dict[str, Any]

WHERE = "spec.podTemplate.spec"

HAS_FIELD = {
    "imagePullSecrets": "spec.imagePullSecrets",
    "terminationGracePeriodSeconds": "spec.terminationGracePeriodSeconds",
    "priorityClassName": "spec.priorityClassName",
    "priority": "spec.priorityClassName",
    "schedulerName": "spec.schedulerName",
    "activeDeadlineSeconds": "spec.activeDeadlineSeconds",
}
"""Fields of a PodSpec that are fields of an OSFTJob."""

REFUSED = {
    "hostNetwork": (Rule.HOST_ACCESS, "shares the node's network"),
    "hostPID": (Rule.HOST_ACCESS, "shares the node's processes"),
    "hostIPC": (Rule.HOST_ACCESS, "shares the node's memory"),
    "hostUsers": (Rule.ISOLATION, "is not supported"),
    "serviceAccount": (Rule.SERVICE_ACCOUNT, "is the old name of serviceAccountName"),
    "automountServiceAccountToken": (
        Rule.SERVICE_ACCOUNT,
        "gives the pod a token of the API server",
    ),
    "nodeName": (Rule.NODE_SELECTOR, "passes by the scheduler; use nodeSelector"),
    "restartPolicy": (Rule.OPERATORS_OWN, "is the operator's: see spec.maxRestarts"),
    "hostname": (Rule.OPERATORS_OWN, "is how the pods find each other"),
    "subdomain": (Rule.OPERATORS_OWN, "is how the pods find each other"),
    "setHostnameAsFQDN": (Rule.OPERATORS_OWN, "is how the pods find each other"),
    "ephemeralContainers": (Rule.OPERATORS_OWN, "cannot be given at creation"),
}
"""Fields of a PodSpec that are refused: by which rule, and why."""

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
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
HOOKS = ("postStart", "preStop")


def shapes(part: Object, where: str) -> Iterator[Denial]:
    """Lists that are merged must be lists of objects with names, so that merging cannot fail."""
    for key in (*KEYS, *APPENDED):
        entries = part.get(key)
        if entries is None:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            yield Denial(Rule.WRONG_TYPE, f"{where}.{key}", "must be a list of objects")
            continue
        for index, entry in enumerate(entries):
            yield from _entry_shape(key, entry, f"{where}.{key}[{index}]")


def _entry_shape(key: str, entry: Object, where: str) -> Iterator[Denial]:
    name = KEYS.get(key)
    if name is not None and not isinstance(entry.get(name), str | None):
        yield Denial(Rule.WRONG_TYPE, f"{where}.{name}", "must be a string")
    if key in ("containers", "initContainers"):
        yield from shapes(entry, where)
    elif key == "volumes":
        yield from _projected_shape(entry, where)


def _projected_shape(volume: Object, where: str) -> Iterator[Denial]:
    projected = volume.get("projected")
    if projected is None:
        return
    sources = projected.get("sources", []) if isinstance(projected, dict) else None
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        yield Denial(Rule.WRONG_TYPE, f"{where}.projected.sources", "must be a list of objects")


def denials(job: OSFTJob, allowed: Allowed) -> Iterator[Denial]:
    """Everything that is refused in a template whose shapes are right, and in its images."""
    spec = job.spec.pod_template.spec
    yield from _image(job.spec.image, "spec.image", allowed)
    yield from _pod(spec, allowed)
    yield from _volumes(job.spec)
    for kind in ("containers", "initContainers"):
        for where, container in _entries(spec, kind, WHERE):
            yield from _container(container, where, allowed)
            if container.get("name") == names.CONTAINER:
                yield from _trainer(container, where, kind, job.spec)


def _image(image: Any, where: str, allowed: Allowed) -> Iterator[Denial]:
    if image is not None and not may_run(str(image), allowed):
        text = f"{image} is not allowed here; allowed are: {words(allowed.allowed_images)}"
        yield Denial(Rule.IMAGE, where, text)


def _pod(spec: Object, allowed: Allowed) -> Iterator[Denial]:
    for key in spec:
        where = f"{WHERE}.{key}"
        if key in HAS_FIELD:
            text = f"has a field of its own: use {HAS_FIELD[key]}"
            yield Denial(Rule.HAS_OWN_FIELD, where, text)
        elif key in REFUSED:
            rule, why = REFUSED[key]
            yield Denial(rule, where, f"{why}: remove it")
    account = spec.get("serviceAccountName")
    if account is not None and not matches(str(account), allowed.allowed_service_accounts):
        listed = words(allowed.allowed_service_accounts)
        text = f"{account} is not allowed here; allowed are: {listed}"
        yield Denial(Rule.SERVICE_ACCOUNT, f"{WHERE}.serviceAccountName", text)
    for where, label in refused_labels(spec, allowed.allowed_node_selectors):
        listed = words(allowed.allowed_node_selectors)
        text = f"{label} is not allowed here; allowed are: {listed}"
        yield Denial(Rule.NODE_SELECTOR, f"{WHERE}.{where}", text)
    yield from security(spec.get("securityContext"), f"{WHERE}.securityContext", allowed)


def _volumes(spec: JobSpec) -> Iterator[Denial]:
    taken = {mount.name for mount in spec.storage.mounts}
    for where, volume in _entries(spec.pod_template.spec, "volumes", WHERE):
        name = volume.get("name")
        if name in names.RESERVED_VOLUMES:
            text = f"{name} is the operator's own: rename it"
            yield Denial(Rule.RESERVED_VOLUME, where, text)
        elif name in taken:
            text = f"{name} is a volume of spec.storage.mounts: rename it"
            yield Denial(Rule.RESERVED_VOLUME, where, text)
        for kind in volume:
            if kind != "name" and kind not in ALLOWED_VOLUMES:
                text = f"is refused; allowed are {', '.join(ALLOWED_VOLUMES)}"
                yield Denial(Rule.VOLUME_TYPE, f"{where}.{kind}", text)
        sources = (volume.get("projected") or {}).get("sources", [])
        if any(source.keys() & CREDENTIALS for source in sources):
            text = "gives the pod a credential: remove it"
            yield Denial(Rule.SERVICE_ACCOUNT, f"{where}.projected", text)


def _container(container: Object, where: str, allowed: Allowed) -> Iterator[Denial]:
    if container.get("name") != names.CONTAINER:
        yield from _image(container.get("image"), f"{where}.image", allowed)
    yield from security(container.get("securityContext"), f"{where}.securityContext", allowed)
    for here, port in _entries(container, "ports", where):
        if port.get("hostPort"):
            yield Denial(Rule.HOST_ACCESS, f"{here}.hostPort", "opens the node's port: remove it")
        if not port.get("name"):
            text = "the pods' services need a name for each port"
            yield Denial(Rule.UNNAMED_PORT, here, text)
    for here, mount in _entries(container, "volumeMounts", where):
        if mount.get("mountPropagation") not in (None, "None"):
            text = "reaches the node: remove it"
            yield Denial(Rule.HOST_ACCESS, f"{here}.mountPropagation", text)
    yield from _asked_by_kubelet(container, where)


def _asked_by_kubelet(container: Object, where: str) -> Iterator[Denial]:
    """Probes and hooks that would make the kubelet, outside every policy, ask another host."""
    hooks = container.get("lifecycle")
    found = [(key, container.get(key)) for key in PROBES]
    found += [(f"lifecycle.{key}", hooks.get(key)) for key in HOOKS if isinstance(hooks, dict)]
    for key, probe in found:
        for kind in ("httpGet", "tcpSocket"):
            action = probe.get(kind) if isinstance(probe, dict) else None
            if isinstance(action, dict) and action.get("host"):
                text = "makes the node ask another host: remove it"
                yield Denial(Rule.HOST_ACCESS, f"{where}.{key}.{kind}.host", text)


def _trainer(container: Object, where: str, kind: str, spec: JobSpec) -> Iterator[Denial]:
    """The trainer's own container: its fields and mounts are the OSFTJob's and the operator's."""
    if kind == "initContainers":
        text = "the name pytorch is the trainer's: rename it"
        yield Denial(Rule.RESERVED_NAME, where, text)
    for key in container:
        if key in TRAINER_FIELDS:
            text = f"is refused here: use {TRAINER_FIELDS[key]}"
            yield Denial(Rule.HAS_OWN_FIELD, f"{where}.{key}", text)
    for here, port in _entries(container, "ports", where):
        if port.get("name") in names.RESERVED_PORTS:
            text = f"{port['name']} is the name of a port of the trainer: rename it"
            yield Denial(Rule.RESERVED_NAME, here, text)
    for here, mount in _entries(container, "volumeMounts", where):
        path = posixpath.normpath(f"/{mount.get('mountPath')}".replace("//", "/"))
        for own, cure in _own_paths(spec).items():
            if _hides(path, own, is_run_folder=own == spec.storage.checkpoints.mount_path):
                text = f"{path} would hide {own} of the trainer: use {cure}, or another path"
                yield Denial(Rule.RESERVED_MOUNT, f"{here}.mountPath", text)


def _own_paths(spec: JobSpec) -> dict[str, str]:
    """What is mounted into the trainer without podTemplate, and the field that says so."""
    return {
        names.TEMPORARY_PATH: "spec.storage",
        names.SHARED_MEMORY_PATH: "spec.sharedMemory",
        names.TERMINATION_PATH: "spec.storage",
        spec.storage.cache.mount_path: "spec.storage.cache",
        **{mount.mount_path: "spec.storage.mounts" for mount in spec.storage.mounts},
        spec.storage.checkpoints.mount_path: "spec.storage.checkpoints",
    }


def _hides(path: str, own: str, *, is_run_folder: bool) -> bool:
    """Whether a mount at `path` is in the way of `own`; below it counts for the run's folder."""
    below = path.startswith(own.rstrip("/") + "/")
    return path == own or own.startswith(path.rstrip("/") + "/") or (is_run_folder and below)


def _entries(parent: Object, key: str, where: str) -> Iterator[tuple[str, Object]]:
    """The entries of a list with their paths."""
    for index, entry in enumerate(parent.get(key) or []):
        yield f"{where}.{key}[{index}]", entry
