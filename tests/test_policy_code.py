"""With other people's code forbidden, a job runs only what images bring; and it still trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from job_samples import job
from osft_operator.policy import Allowed, denials
from osft_operator.render import RenderSettings, pytorch_job, resolve
from osft_operator.spec import OSFTJob

POD = "spec.podTemplate.spec"
FORBIDDEN = Allowed(allow_remote_code=False)
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))


def _denied(changes: dict[str, Any], allowed: Allowed) -> list[str]:
    return [str(denial) for denial in denials(OSFTJob.model_validate(job(changes)), allowed)]


def _container(kind: str = "containers", name: str = "sidecar", **fields: Any) -> dict[str, Any]:
    return {f"{POD}.{kind}": [{"name": name, **fields}]}


def _mount(path: str) -> dict[str, Any]:
    return {"spec.storage.mounts": [{"name": "m", "configMapName": "c", "mountPath": path}]}


LOADING = [
    "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONSAFEPATH",
    "PYTHONPYCACHEPREFIX", "PYTHONWARNINGS", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PATH",
    "CC", "TRITON_PTXAS_PATH", "TORCHINDUCTOR_CACHE_DIR", "NCCL_NET_PLUGIN", "OPENSSL_CONF",
    "HOME", "CUDA_INJECTION64_PATH", "BASH_ENV",
]  # fmt: skip
HARMLESS = ["NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "HF_TOKEN", "WANDB_MODE", "HTTPS_PROXY", "TZ"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"spec.training.trustRemoteCode": True}, "spec.training.trustRemoteCode"),
        *(({"spec.env": [{"name": name, "value": "/x"}]}, "spec.env[0].name") for name in LOADING),
        ({"spec.envFrom": [{"configMapRef": {"name": "c"}}]}, "spec.envFrom[0]"),
        ({"spec.envFrom": [{"prefix": "LD", "secretRef": {"name": "c"}}]}, "spec.envFrom[0]"),
        ({"spec.envFrom": [{"prefix": "LD_X", "secretRef": {"name": "c"}}]}, "spec.envFrom[0]"),
        (_mount("/usr/local/lib/python3.11/site-packages"), "spec.storage.mounts[0].mountPath"),
        (_mount("/opt/osft"), "spec.storage.mounts[0].mountPath"),
        (_mount("/etc"), "spec.storage.mounts[0].mountPath"),
        ({"spec.storage.cache": {"mountPath": "/opt"}}, "spec.storage.cache.mountPath"),
        (_container(name="pytorch", workingDir="/data"), f"{POD}.containers[0].workingDir"),
        (
            _container(name="pytorch", lifecycle={"postStart": {"exec": {"command": ["x"]}}}),
            f"{POD}.containers[0].lifecycle",
        ),
        (
            _container(name="pytorch", livenessProbe={"exec": {"command": ["x"]}}),
            f"{POD}.containers[0].livenessProbe.exec",
        ),
        (
            _container(
                name="pytorch", volumeMounts=[{"name": "v", "mountPath": "usr//bin/../lib"}]
            ),
            f"{POD}.containers[0].volumeMounts[0].mountPath",
        ),
        (_container(command=["sh", "-c", "x"]), f"{POD}.containers[0].command"),
        (_container("initContainers", args=["x"]), f"{POD}.initContainers[0].args"),
        (_container(env=[{"name": "LD_PRELOAD"}]), f"{POD}.containers[0].env[0].name"),
        (_container(envFrom=[{"secretRef": {"name": "s"}}]), f"{POD}.containers[0].envFrom[0]"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_code_that_no_image_brings_can_be_forbidden(changes: dict[str, Any], field: str) -> None:
    (line,) = _denied(changes, FORBIDDEN)
    assert line.startswith(f"{field}: ")
    assert line.endswith("(rule RemoteCode)")
    assert _denied(changes, Allowed()) == [], "where it is not forbidden, authors may"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spec.env": [{"name": name, "value": "x"} for name in HARMLESS]},
        {"spec.envFrom": [{"prefix": "MINE_", "secretRef": {"name": "s"}}]},
        _mount("/mnt/usr"),
        _mount("/data"),
        _mount("/optional"),
        _container(env=[{"name": "A"}], livenessProbe={"httpGet": {"port": 1}}),
        _container("initContainers", volumeMounts=[{"name": "v", "mountPath": "/data"}]),
    ],
    ids=lambda value: str(value)[:70],
)
def test_what_brings_no_code_is_left_alone(changes: dict[str, Any]) -> None:
    assert _denied(changes, FORBIDDEN) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_need_no_other_code(path: Path) -> None:
    for body in yaml.safe_load_all(path.read_text()):
        if body["kind"] == "OSFTJob":
            assert denials(OSFTJob.model_validate(body), FORBIDDEN) == []


def test_python_looks_for_modules_in_the_image_alone(tmp_path: Path) -> None:
    body = OSFTJob.model_validate(job())
    manifest = pytorch_job(body, resolve(body, RenderSettings(trainer_image="t")))
    pod = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    container = pod["containers"][0]
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    # the working folder and HOME/.local are volumes that users write
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / ".local" / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "usercustomize.py").write_text("print('from HOME')")
    (tmp_path / "osft_trainer.py").write_text("print('from the working folder')")

    def said(environment: dict[str, str]) -> str:
        # the machine's interpreter: the tests' own environment has no packages of the user
        command = [sys._base_executable, "-c", "import osft_trainer"]
        variables = {**environment, "HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        return done.stdout

    assert said({}) == "from HOME\nfrom the working folder\n", "the danger is real"
    assert said(given) == ""
