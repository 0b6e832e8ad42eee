"""What a container of a pod becomes on this machine: its command line and its environment.

Pure: reads a Pod dict and the surroundings, touches no file and starts nothing. A container has a
root file system, host names and ports of its own; a process of this machine has not. So mount
paths become folders, service names become loopback addresses and ports become free ones, wherever
they stand in an argument or in the environment. Called by local_container only.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osft_operator import process_tree

TERMINATION_LOG = "/dev/termination-log"
"""Kubernetes' default for a container's `terminationMessagePath`."""

INHERITED = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TZ")
"""What a pod's processes take from the caller's environment: no token, no proxy, no PYTHONPATH."""

_HOST_VARIABLES = ("MASTER_ADDR", "PET_MASTER_ADDR")
_PORT_VARIABLES = ("MASTER_PORT", "PET_MASTER_PORT")
_ENDPOINT_VARIABLES = ("PET_RDZV_ENDPOINT",)

# `$$` is an escaped dollar; an unknown name stays as it is written
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")
_FIELD_OF_MAP = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")


def image_environment() -> dict[str, str]:
    """The environment of the "image": this machine's interpreter first, gloo on loopback."""
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    interpreter = str(Path(sys.executable).parent)
    return environment | {
        "PATH": os.pathsep.join([interpreter, "/usr/local/bin", "/usr/bin", "/bin"]),
        "LANG": "C.UTF-8",
        "GLOO_SOCKET_IFNAME": "lo",
        "TP_SOCKET_IFNAME": "lo",
    }


def _localhost(name: str) -> str:
    return "127.0.0.1"


def _same_port(port: int) -> int:
    return port


def _nothing(kind: str, name: str) -> Mapping[str, str] | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What stands in for the node, the network and the storage of one pod."""

    work_dir: Path
    """Logs, termination messages, home and working folder of this pod. Keep its path short:
    sockets in a temporary folder below it may have 107 bytes."""
    mark: str
    """The pod's name in the process tree, `<session>/<pod uid>`."""
    pod_ip: str = "127.0.0.1"
    """`status.podIP`, an address in 127.0.0.0/8."""
    volumes: Mapping[str, Path] = field(default_factory=dict)
    """A folder for each of the pod's volumes, by the volume's name."""
    host: Callable[[str], str] = _localhost
    """The address of a service name, as it stands in MASTER_ADDR."""
    port: Callable[[int], int] = _same_port
    """The port to use instead of a rendezvous port. It must be the same for all pods of a job and
    another one for every job: torch's store listens on all addresses of the machine."""
    environment: Mapping[str, str] = field(default_factory=image_environment)
    """The environment that the image would bring."""
    references: Callable[[str, str], Mapping[str, str] | None] = _nothing
    """The data of a `Secret` or `ConfigMap` by kind and name; None when there is none."""


def command(pod: Mapping[str, Any], container: Mapping[str, Any], at: Surroundings) -> list[str]:
    """The container's command and arguments, with references and paths resolved.

    Raises:
        ValueError: the container has no command: which one its image has is not known here.
    """
    if not container.get("command"):
        raise ValueError(
            f"container {container['name']!r} has no command; without its image "
            "nothing says what to run: set command"
        )
    known = environment(pod, container, at)
    # references first: a variable's value is rewritten already and starts with no mount path
    words = [*container["command"], *(container.get("args") or [])]
    return [_expand(rewrite_path(word, pod, container, at), known) for word in words]


def environment(
    pod: Mapping[str, Any], container: Mapping[str, Any], at: Surroundings
) -> dict[str, str]:
    """The container's whole environment; of two entries of one name the last wins.

    Raises:
        ValueError: a Secret, ConfigMap or key is missing, or a `valueFrom` has no meaning here.
    """
    values = dict(at.environment)
    values["HOSTNAME"] = pod["metadata"]["name"]
    values.setdefault("HOME", str(at.work_dir / "home"))
    for source in container.get("envFrom") or []:
        values |= _from_source(source, at)
    for entry in container.get("env") or []:
        value = _value(entry, pod, at, values)
        if value is not None:
            values[entry["name"]] = rewrite_path(value, pod, container, at)
    _use_this_machine(values, at)
    values[process_tree.VARIABLE] = f"{at.mark}/{container['name']}"
    return values


def rewrite_path(
    text: str, pod: Mapping[str, Any], container: Mapping[str, Any], at: Surroundings
) -> str:
    """Put the folder of this machine in the place of a mount path, in `/path` or `--flag=/path`."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    for path, folder in _places(pod, container, at):
        if value == path or value.startswith(path.rstrip("/") + "/"):
            return flag + equals + str(folder) + value[len(path.rstrip("/")) :]
    return text


def termination_log(container: Mapping[str, Any], at: Surroundings) -> Path:
    """The file that the container sees as its `terminationMessagePath`."""
    return at.work_dir / str(container["name"]) / "termination-log"


def mounts(container: Mapping[str, Any], at: Surroundings) -> list[tuple[str, Path]]:
    """The container's mount paths and their folders.

    /dev/shm is left out: the machine has its own, and it is memory there too.

    Raises:
        ValueError: a mount names a volume without a folder.
    """
    found = []
    for mount in container.get("volumeMounts") or []:
        if mount["mountPath"] == "/dev/shm":
            continue
        if mount["name"] not in at.volumes:
            raise ValueError(
                f"container {container['name']!r} mounts volume {mount['name']!r}, "
                f"which has no folder; there are {sorted(at.volumes)}"
            )
        folder = at.volumes[mount["name"]]
        found.append((mount["mountPath"], folder / mount.get("subPath", "")))
    return found


def _places(
    pod: Mapping[str, Any], container: Mapping[str, Any], at: Surroundings
) -> list[tuple[str, Path]]:
    message = str(container.get("terminationMessagePath", TERMINATION_LOG))
    places = [*mounts(container, at), (message, termination_log(container, at))]
    # the longest first: /checkpoints/a may be a mount inside /checkpoints
    return sorted(places, key=lambda place: -len(place[0]))


def _expand(text: str, known: Mapping[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        return "$" if name is None else known.get(name, match.group())

    return _REFERENCE.sub(replace, text)


def _from_source(source: Mapping[str, Any], at: Surroundings) -> dict[str, str]:
    kind = "Secret" if "secretRef" in source else "ConfigMap"
    reference = source["secretRef" if kind == "Secret" else "configMapRef"]
    data = at.references(kind, reference["name"])
    if data is None and not reference.get("optional"):
        raise ValueError(f"envFrom: there is no {kind} {reference['name']!r}")
    return {source.get("prefix", "") + key: value for key, value in (data or {}).items()}


def _value(
    entry: Mapping[str, Any], pod: Mapping[str, Any], at: Surroundings, known: Mapping[str, str]
) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return _expand(entry.get("value", ""), known)
    if "fieldRef" in source:
        return _field(source["fieldRef"]["fieldPath"], pod, at)
    for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
        if key in source:
            reference = source[key]
            data = at.references(kind, reference["name"]) or {}
            if reference["key"] not in data and not reference.get("optional"):
                raise ValueError(
                    f"env {entry['name']}: there is no key {reference['key']!r} "
                    f"in a {kind} {reference['name']!r}"
                )
            return data.get(reference["key"])
    raise ValueError(f"env {entry['name']}: {', '.join(source)} has no meaning on one machine")


def _field(path: str, pod: Mapping[str, Any], at: Surroundings) -> str:
    metadata = pod["metadata"]
    if match := _FIELD_OF_MAP.fullmatch(path):
        return str((metadata.get(match.group(1)) or {}).get(match.group(2), ""))
    known = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata.get("namespace", "default"),
        "metadata.uid": metadata.get("uid", ""),
        "spec.nodeName": pod["spec"].get("nodeName", ""),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName", "default"),
        "status.podIP": at.pod_ip,
        "status.hostIP": "127.0.0.1",
    }
    if path not in known:
        raise ValueError(f"fieldRef {path!r} is not known; there are {sorted(known)}")
    return str(known[path])


def _use_this_machine(values: dict[str, str], at: Surroundings) -> None:
    for name in _HOST_VARIABLES:
        if name in values:
            values[name] = at.host(values[name])
    for name in _PORT_VARIABLES:
        if name in values:
            values[name] = str(at.port(int(values[name])))
    for name in _ENDPOINT_VARIABLES:
        if name in values:
            host, _, port = values[name].rpartition(":")
            values[name] = f"{at.host(host)}:{at.port(int(port))}"
