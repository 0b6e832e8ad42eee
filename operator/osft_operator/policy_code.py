"""Whose code may run in a job's pods: rule RemoteCode, where the administrator forbids others'.

Called by policy. Pure. With `allow_remote_code` off, every container of a job runs the program that
its image starts and nothing that the author brings: no code of a model, no command, no variable
that makes a program load something else, no mount over a folder that programs lie in. Which images
that are is for the list of allowed images to say; with `*` in it, this fence has a door. It cannot
know every variable of every library, so it is no sandbox; the chart's README says what it leaves.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

from osft_operator import names
from osft_operator.policy_security import Denial, Rule
from osft_operator.spec import OSFTJob
from osft_operator.spec_pod import VariableSource
from osft_operator.spec_storage import Storage

Object = dict[str, Any]

LOADING_PREFIXES = (
    "LD_",
    "PYTHON",
    "TRITON_",
    "TORCHINDUCTOR_",
    "TORCH_EXTENSIONS_",
    "OPENSSL_",
    "CUDA_INJECTION",
)
"""Variables that begin so tell the loader, Python or a compiler where code lies."""
LOADING = (
    "PATH",
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "HF_MODULES_CACHE",
    "BASH_ENV",
    "ENV",
    "CC",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "MPLBACKEND",
    "NCCL_CONF_FILE",
    "NCCL_ENV_PLUGIN",
    "NCCL_GIN_PLUGIN",
    "NCCL_NET_PLUGIN",
    "NCCL_PROFILER_PLUGIN",
    "NCCL_TUNER_PLUGIN",
    "FI_PROVIDER_PATH",
    "OMP_TOOL_LIBRARIES",
    "RDMAV_DRIVERS",
    "UCC_COMPONENT_PATH",
    "UCX_MODULE_DIR",
)
"""Further variables that do, by their whole name."""
PROGRAM_FOLDERS = (
    "/bin",
    "/etc",
    "/home",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/opt",
    "/root",
    "/sbin",
    "/usr",
)
"""Where images keep programs, and what tells the loader of them."""
STARTS = ("command", "args", "workingDir", "lifecycle")
"""Fields of a container that say what runs in it, or where."""
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def denials(job: OSFTJob) -> Iterator[Denial]:
    """Everything by which a job would run code that no image brings; shapes are right by now."""
    if job.spec.training.trust_remote_code:
        text = "code that comes with a model may not run here: remove it, or use another model"
        yield Denial(Rule.REMOTE_CODE, "spec.training.trustRemoteCode", text)
    yield from _names([variable.name for variable in job.spec.env], "spec.env")
    yield from _sources(job.spec.env_from, "spec.envFrom")
    yield from _storage(job.spec.storage)
    template = job.spec.pod_template.spec
    for kind in ("containers", "initContainers"):
        for index, container in enumerate(template.get(kind) or []):
            yield from _container(container, f"spec.podTemplate.spec.{kind}[{index}]")


def loads_code(variable: str) -> bool:
    """Whether an environment variable can make a program run what its image does not bring."""
    return variable in LOADING or variable.startswith(LOADING_PREFIXES)


def _names(variables: Sequence[str], where: str) -> Iterator[Denial]:
    for index, name in enumerate(variables):
        if loads_code(name):
            text = f"{name} can make a program load other code than its image's: remove it"
            yield Denial(Rule.REMOTE_CODE, f"{where}[{index}].name", text)


def _sources(sources: Sequence[VariableSource], where: str) -> Iterator[Denial]:
    for index, source in enumerate(sources):
        if _may_load_code(source.prefix or ""):
            yield _unread(f"{where}[{index}]")


def _unread(where: str) -> Denial:
    """The keys are in an object that the operator does not read."""
    text = "its keys may be variables that load code: name each key you need in spec.env"
    return Denial(Rule.REMOTE_CODE, where, text)


def _may_load_code(prefix: str) -> bool:
    """Whether a name that begins so can be a variable that loads code."""
    begins = (*LOADING, *LOADING_PREFIXES)
    return loads_code(prefix) or any(name.startswith(prefix) for name in begins)


def _storage(storage: Storage) -> Iterator[Denial]:
    where = "spec.storage"
    paths = {
        f"{where}.checkpoints.mountPath": storage.checkpoints.mount_path,
        f"{where}.cache.mountPath": storage.cache.mount_path,
        **{
            f"{where}.mounts[{index}].mountPath": mount.mount_path
            for index, mount in enumerate(storage.mounts)
        },
    }
    for field, path in paths.items():
        yield from _path(path, field)


def _path(path: str, field: str) -> Iterator[Denial]:
    plain = posixpath.normpath("/" + path.lstrip("/"))
    if plain == "/" or any(f"{plain}/".startswith(f"{folder}/") for folder in PROGRAM_FOLDERS):
        text = f"{plain} is where images keep programs: mount it elsewhere, for instance at /mnt"
        yield Denial(Rule.REMOTE_CODE, field, text)


def _container(container: Object, where: str) -> Iterator[Denial]:
    is_trainer = container.get("name") == names.CONTAINER
    for key in STARTS:
        # the trainer's command is the operator's, whoever is trusted
        if key in container and not (is_trainer and key in ("command", "args")):
            yield Denial(Rule.REMOTE_CODE, f"{where}.{key}", "only the image says so: remove it")
    for key in PROBES:
        probe = container.get(key)
        if isinstance(probe, dict) and "exec" in probe:
            yield Denial(Rule.REMOTE_CODE, f"{where}.{key}.exec", "runs a command: remove it")
    if not is_trainer:
        given = [str(entry.get("name")) for entry in _list(container, "env")]
        yield from _names(given, f"{where}.env")
        for index, source in enumerate(_list(container, "envFrom")):
            if _may_load_code(str(source.get("prefix") or "")):
                yield _unread(f"{where}.envFrom[{index}]")
    for index, mount in enumerate(_list(container, "volumeMounts")):
        yield from _path(str(mount.get("mountPath")), f"{where}.volumeMounts[{index}].mountPath")


def _list(container: Object, key: str) -> list[Object]:
    entries = container.get(key)
    return [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
