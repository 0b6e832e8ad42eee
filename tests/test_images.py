"""The two images, without a container engine: their Dockerfiles read, their build steps run.

The RUN lines of the build stage run as they stand, with the folders of the image below a temporary
one and a fresh virtual environment for the base image's Python; what the last stage copies is then
started by its ENTRYPOINT with nothing but its ENV. Not run: the last stage's own RUN lines, which
need root; and bytecode is not compiled, to save time. Takes some minutes, most of it the trainer's
packages: nothing is shared with this environment on purpose.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

# A cold download and two cores that others use too.
pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[1]
BASE = "python:3.11-slim-bookworm"
FOLDERS = re.compile(r"(?<![\w./-])/(source|wheels|opt/osft)\b")
DOCKERFILES = {
    "operator": ROOT / "operator" / "Dockerfile",
    "trainer": ROOT / "trainer_image" / "Dockerfile",
}
DEVELOPMENT = {"pip", "wheel", "hatchling", "pytest", "ruff", "mypy", "hypothesis", "trl", "peft"}


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its lines joined."""

    word: str
    text: str


@dataclass(frozen=True)
class Image:
    """What the last stage of a Dockerfile would hold, below a folder."""

    name: str
    root: Path
    last_stage: list[Instruction]

    @property
    def packages(self) -> dict[str, str]:
        """Version of every installed distribution."""
        found = {}
        for info in self.root.glob("opt/osft/lib/python*/site-packages/*.dist-info"):
            name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
            found[re.sub(r"[-_.]+", "-", name).lower()] = version
        return found

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the image's environment and no other."""
        environment = {}
        for instruction in self.last_stage:
            if instruction.word == "ENV":
                pairs = (pair.partition("=") for pair in shlex.split(instruction.text))
                environment |= {key: self.inside(value) for key, _, value in pairs}
        return subprocess.run(
            [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]],
            env={**environment, "HOME": "/nonexistent", **variables},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def entrypoint(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Start the image as a container would be."""
        return self.run(*json.loads(one(self.last_stage, "ENTRYPOINT")), *arguments, **variables)

    def inside(self, text: str) -> str:
        """Paths of the image as paths of this machine."""
        return FOLDERS.sub(lambda match: f"{self.root}/{match[1]}", text)


def stages(dockerfile: Path) -> list[list[Instruction]]:
    """The stages of a Dockerfile, each with its FROM first."""
    kept = "".join(
        line
        for line in dockerfile.read_text().splitlines(keepends=True)
        if not line.startswith("#")
    )
    found: list[list[Instruction]] = []
    for line in kept.replace("\\\n", " ").splitlines():
        if line.strip():
            word, text = line.split(maxsplit=1)
            if word == "FROM":
                found.append([])
            found[-1].append(Instruction(word, text))
    return found


def one(stage: list[Instruction], word: str) -> str:
    """The text of the stage's one instruction of a kind."""
    (text,) = (each.text for each in stage if each.word == word)
    return text


def pins() -> dict[str, str]:
    """constraints.txt as versions by name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def copy_in(instruction: Instruction, folder: Path) -> None:
    """A COPY from the build's context."""
    *sources, target = instruction.text.split()
    for source in sources:
        goal = folder / (source if target == "./" else target)
        if (ROOT / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / source, goal, ignore=ignored)
        else:
            shutil.copy(ROOT / source, goal)


@pytest.fixture(scope="module", params=DOCKERFILES)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image, built."""
    root = tmp_path_factory.mktemp(request.param)
    build, last = stages(DOCKERFILES[request.param])
    built = Image(request.param, root, last)
    venv.create(root / "base", with_pip=True)
    source = root / "source"
    source.mkdir()
    for instruction in build[2:]:
        if instruction.word == "COPY":
            copy_in(instruction, source)
        else:
            assert instruction.word == "RUN"
            done = subprocess.run(
                ["bash", "-euc", built.inside(instruction.text)],
                cwd=source,
                capture_output=True,
                text=True,
                timeout=1500,
                check=False,
                env={**os.environ, "PATH": f"{root}/base/bin:/usr/bin:/bin", "PIP_COMPILE": "0"},
            )
            assert done.returncode == 0, f"{instruction.text}\n{done.stderr[-4000:]}"
    return built


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_is_pinned_and_not_root(name: str) -> None:
    build, last = stages(DOCKERFILES[name])
    assert [build[0].text, last[0].text] == [f"{BASE} AS build", BASE]
    assert build[1] == Instruction("WORKDIR", "/source")
    user, group = one(last, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    copied = [each.text for each in last if each.word == "COPY"]
    assert copied == ["--from=build /opt/osft /opt/osft"], "more than the packages goes in"
    order = [each.word for each in last]
    assert order.index("USER") > max(at for at, word in enumerate(order) if word == "RUN")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_last_stage_installs_no_python_packages_and_removes_pip(name: str) -> None:
    runs = [each.text for each in stages(DOCKERFILES[name])[-1] if each.word == "RUN"]
    assert not [text for text in runs if "pip install" in text]
    assert [text for text in runs if "pip uninstall --yes" in text and "ensurepip" in text]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_copied_path_is_there_and_sent_to_the_builder(name: str) -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in sent
    for instruction in stages(DOCKERFILES[name])[0]:
        if instruction.word == "COPY":
            for source in instruction.text.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in sent


def test_commands_are_what_pods_run() -> None:
    commands = {
        name: json.loads(one(stages(path)[-1], "ENTRYPOINT")) for name, path in DOCKERFILES.items()
    }
    assert commands == {
        "operator": ["python", "-m", "osft_operator"],
        "trainer": ["python", "-m", "osft_trainer.launch"],
    }


def test_image_holds_what_it_needs_and_nothing_more(
    image: Image, record_property: pytest.RecordProperty
) -> None:
    needed, foreign = {
        "operator": ({"kopf", "kubernetes", "prometheus-client"}, {"torch", "numpy"}),
        "trainer": (
            {"torch", "transformers", "wandb", "pyarrow"},
            {"kopf", "kubernetes", "aiohttp"},
        ),
    }[image.name]
    installed = image.packages
    assert needed <= installed.keys()
    assert not (foreign | DEVELOPMENT) & installed.keys()
    files = (path for path in (image.root / "opt/osft").rglob("*") if path.is_file())
    size = sum(path.lstat().st_size for path in files)
    record_property("megabytes", size // 10**6)
    print(f"{image.name}: {len(installed)} packages, {size / 1e6:.0f} MB")


def test_every_package_is_pinned(image: Image) -> None:
    pinned = pins()
    for name, version in image.packages.items():
        # torch's CUDA wheel pins its libraries itself
        if name != "osft" and not name.startswith(("nvidia-", "cuda-")):
            assert pinned[name] == version.partition("+")[0], name


def test_entrypoint_starts(image: Image) -> None:
    if image.name == "trainer":
        done = image.entrypoint("--help")
        assert done.returncode == 0, done.stderr
        assert "--learning-rate" in done.stdout
    else:
        done = image.entrypoint(OSFT_WORKERS="many")
        assert done.returncode == 2, done.stderr
        assert "OSFT_WORKERS" in done.stderr + done.stdout


def test_every_module_of_the_image_can_be_imported(image: Image) -> None:
    package = {"operator": "osft_operator", "trainer": "osft_trainer"}[image.name]
    program = f"""
import importlib, pkgutil, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not module.name.endswith(".__main__"):
        importlib.import_module(module.name)
"""
    done = image.run("python", "-c", program)
    assert done.returncode == 0, done.stderr


def test_trainer_has_a_compiler_exactly_if_triton_needs_one(image: Image) -> None:
    if image.name == "operator":
        needs = False
    else:
        (driver,) = image.root.glob("opt/osft/lib/*/site-packages/triton/backends/nvidia/driver.py")
        needs = "compile_module_from_src" in driver.read_text()
    runs = [each.text for each in image.last_stage if each.word == "RUN"]
    assert any("apt-get install" in text and " gcc " in text for text in runs) == needs
