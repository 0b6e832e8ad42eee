"""The two images, without a container engine: their Dockerfiles read, their build steps run.

The RUN lines of the build stages run as they stand, with the folders of the image below others and
a fresh virtual environment for the base image's Python; what the last stage copies is then started
by its ENTRYPOINT with nothing but its ENV. Not run: the last stage's own RUN lines, which need
root; and bytecode is not compiled, to save time. The stage with others' packages takes minutes and
is kept, as an image builder keeps it, until one of its lines or files changes; nothing is shared
with this environment on purpose.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import binaries

# A cold download and two cores that others use too.
pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[1]
BASE = "python:3.11-slim-bookworm"
FOLDERS = re.compile(r"(?<![\w./-])/(source|wheels|ours|opt/osft)\b")
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
        return placed(text, {}, self.root)


def placed(text: str, folders: Mapping[str, Path], root: Path) -> str:
    """Paths of an image as paths of this machine: of these folders, else below the root."""
    return FOLDERS.sub(lambda match: str(folders.get(match[1], root / match[1])), text)


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


@dataclass(frozen=True)
class Places:
    """Where the stages of a build lie on this machine."""

    stages: Mapping[str, Path]
    """Roots, by name."""
    base: Path
    """A virtual environment in the place of the base image's Python."""
    packages: Path
    """The root whose /opt/osft the stages mean."""


def build(stage: list[Instruction], root: Path, at: Places) -> None:
    """Run a stage; what it copies and makes is in /source of its root."""
    source = root / "source"
    parent = stage[0].text.split()[0]
    if parent in at.stages:
        shutil.copytree(at.stages[parent] / "source", source)
    else:
        source.mkdir(parents=True)
    for instruction in stage[1:]:
        if instruction.text.startswith("--from="):
            name, made, _ = instruction.text.removeprefix("--from=").split()
            shutil.copy(at.stages[name] / made.lstrip("/"), source)
        elif instruction.word == "COPY":
            copy_in(instruction, source)
        elif instruction.word == "RUN":
            command = placed(instruction.text, {"opt/osft": at.packages / "opt/osft"}, root)
            done = subprocess.run(
                ["bash", "-euc", command],
                cwd=source,
                capture_output=True,
                text=True,
                timeout=1500,
                check=False,
                env={
                    **os.environ,
                    "PATH": f"{at.base}/bin:/usr/bin:/bin",
                    "PIP_COMPILE": "0",
                },
            )
            assert done.returncode == 0, f"{instruction.text}\n{done.stderr[-4000:]}"
        else:
            assert instruction == Instruction("WORKDIR", "/source")


def kept_packages(stage: list[Instruction], needed: Path) -> Path:
    """The stage with others' packages, built where it stays until what it is made of changes.

    Args:
        stage: its instructions.
        needed: root of the stage that says which packages.
    """
    text = "\n".join(f"{each.word} {each.text}" for each in stage)
    files = [ROOT / "constraints.txt", needed / "source" / "needed.txt"]
    told = [text.encode(), sys.version.encode(), sys.base_prefix.encode()]
    told += [file.read_bytes() for file in files]
    digest = hashlib.sha256(b"\0".join(told)).hexdigest()[:16]
    kept = binaries.cache_home() / "images" / digest
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Its paths are written into it: it cannot be made elsewhere and moved.
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (kept / "COMPLETE").exists():
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            venv.create(kept / "base", with_pip=True)
            build(stage, kept, Places({"needed": needed}, kept / "base", kept))
        (kept / "COMPLETE").touch()
    forget_unused(kept.parent)
    return kept


def forget_unused(folder: Path) -> None:
    """Remove what no test has used for a fortnight: a trainer's packages are 2 GB."""
    for mark in folder.glob("*/COMPLETE"):
        if time.time() - mark.stat().st_mtime > 14 * 24 * 3600:
            shutil.rmtree(mark.parent, ignore_errors=True)


def link(source: str, target: str) -> None:
    """Like a copy, without the time and the room, where both are on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(scope="module", params=DOCKERFILES)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image, built."""
    root = tmp_path_factory.mktemp(request.param)
    first, packages, ours, last = stages(DOCKERFILES[request.param])
    # Its Python is used as it is: what it prints is not of the image.
    build(first, root / "needed", Places({}, Path(sys.prefix), root))
    kept = kept_packages(packages, root / "needed")
    layers = {"packages": kept, "build": root / "build"}
    build(ours, layers["build"], Places(layers, kept / "base", kept))
    built = Image(request.param, root, last)
    for instruction in last:
        if instruction.word == "COPY":
            stage, source, target = instruction.text.removeprefix("--from=").split()
            shutil.copytree(
                layers[stage] / source.lstrip("/"), root / target.lstrip("/"),
                symlinks=True, copy_function=link, dirs_exist_ok=True,
            )  # fmt: skip
    return built


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_is_pinned_and_not_root(name: str) -> None:
    first, packages, ours, last = stages(DOCKERFILES[name])
    froms = [stage[0].text for stage in (first, packages, ours, last)]
    assert froms == [f"{BASE} AS needed", f"{BASE} AS packages", "packages AS build", BASE]
    user, group = one(last, "USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    copied = [each.text for each in last if each.word == "COPY"]
    layers = ["--from=packages /opt/osft /opt/osft", "--from=build /ours /opt/osft"]
    assert copied == layers, "more than the packages goes in"
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
    *built, _ = stages(DOCKERFILES[name])
    for instruction in [each for stage in built for each in stage]:
        if instruction.word == "COPY" and not instruction.text.startswith("--from="):
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


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_layer_of_others_packages_is_made_of_what_seldom_changes(name: str) -> None:
    """A builder makes it anew when any of this changes; pyproject.toml has our version."""
    _, packages, _, _ = stages(DOCKERFILES[name])
    copied = [each.text for each in packages if each.word == "COPY"]
    assert copied == ["constraints.txt ./", "--from=needed /source/needed.txt ./"]


def test_our_layer_is_small(image: Image) -> None:
    """A new version of ours leaves the gigabytes of others where they are."""
    ours = image.root / "build" / "ours"
    names = {path.name for path in ours.glob("lib/python*/site-packages/*")}
    assert names
    assert all(name.startswith("osft") for name in names), names
    files = [path for path in ours.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000


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
