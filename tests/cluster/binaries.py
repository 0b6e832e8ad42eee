"""Finds the control plane's binaries, or builds them.

`python tests/cluster/binaries.py` prints their folder; `.ci/run` and `make test` call it first so
that a build shows its progress. Three sources, the first that is there wins: the folder named by
KUBEBUILDER_ASSETS, the cache, a build by build.sh on Debian 12. It never downloads a binary.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RECIPE = "1"
"""Raise it whenever build.sh would make other binaries: the cache has one folder per recipe."""

NEEDED = ("etcd", "kube-apiserver")
JOINED = ("kube-controller-manager", "kubectl", "apiextensions-apiserver")
WORK_BYTES = 6 * 2**30

HELP = """\
The tests that need a Kubernetes API server cannot run: {reason}

Get the binaries in one of two ways:
  - anywhere:     setup-envtest use -p path, then
                  export KUBEBUILDER_ASSETS=<the folder it prints> (with etcd and kube-apiserver)
  - on Debian 12: python tests/cluster/binaries.py
                  builds them from Debian's own packages, about 7 minutes and 6 GB once
"""


class Missing(RuntimeError):
    """There are no binaries, and here is what to do."""


@dataclass(frozen=True)
class Binaries:
    """The control plane's programs."""

    folder: Path

    @property
    def joined(self) -> bool:
        """Whether custom resources have a server of their own, joined to the core one."""
        return (self.folder / "apiextensions-apiserver").exists()

    def path(self, name: str) -> Path | None:
        """The program of that name, if the folder has it."""
        path = self.folder / name
        return path if path.exists() else None

    def kubectl(self) -> Path:
        """The folder's kubectl, else the machine's.

        Raises:
            Missing: there is neither.
        """
        found = self.path("kubectl") or shutil.which("kubectl")
        if not found:
            raise Missing(HELP.format(reason="there is no kubectl"))
        return Path(found)


def cache_home() -> Path:
    """Where what tests make once stays between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "osft"


def cache() -> Path:
    """Where built binaries stay between runs."""
    return cache_home() / "control-plane" / RECIPE


def find() -> Binaries | None:
    """The binaries that are there now; None when something has to be built first.

    Raises:
        Missing: KUBEBUILDER_ASSETS names a folder without them.
    """
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        absent = [name for name in NEEDED if not (Path(assets) / name).exists()]
        if absent:
            reason = f"KUBEBUILDER_ASSETS={assets} has no {' and no '.join(absent)}."
            raise Missing(HELP.format(reason=reason))
        return Binaries(Path(assets))
    complete = all((cache() / name).exists() for name in NEEDED + JOINED)
    return Binaries(cache()) if complete else None


def ensure() -> Binaries:
    """The binaries, built when they are not there.

    Raises:
        Missing: they are not there and cannot be built on this machine.
    """
    if found := find():
        return found
    _check_machine()
    with _lock():
        # another run may have built them while this one waited
        return find() or _build()


def _check_machine() -> None:
    release = Path("/etc/os-release")
    system = (
        dict(line.split("=", 1) for line in release.read_text().splitlines() if "=" in line)
        if release.exists()
        else {}
    )
    name = system.get("PRETTY_NAME", sys.platform).strip('"')
    if system.get("ID") != "debian" or system.get("VERSION_ID", "").strip('"') != "12":
        raise Missing(
            HELP.format(reason=f"there is no {cache()}, and this is {name}, not Debian 12.")
        )
    absent = [tool for tool in ("apt-get", "dpkg-deb", "gcc", "tar") if not shutil.which(tool)]
    if absent:
        raise Missing(HELP.format(reason=f"to build them, {', '.join(absent)} is missing."))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < WORK_BYTES:
        reason = (
            f"to build them, {tempfile.gettempdir()} needs 6 GB and has {free / 2**30:.1f}; "
            "set TMPDIR to a larger folder."
        )
        raise Missing(HELP.format(reason=reason))


@contextmanager
def _lock() -> Iterator[None]:
    cache().parent.mkdir(parents=True, exist_ok=True)
    with (cache().parent / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("control plane: another run is building it; waiting", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build() -> Binaries:
    script = Path(__file__).with_name("build.sh")
    unfinished = cache().with_name(f"{RECIPE}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    work = tempfile.mkdtemp(prefix="osft-control-plane-")
    try:
        result = subprocess.run([script, work, unfinished], check=False)
    finally:
        # Go's caches are read-only folders
        subprocess.run(["chmod", "-R", "u+w", work], check=False)
        shutil.rmtree(work, ignore_errors=True)
    if result.returncode:
        raise Missing(HELP.format(reason="the build failed, see the lines above."))
    shutil.rmtree(cache(), ignore_errors=True)
    unfinished.rename(cache())
    return Binaries(cache())


def main() -> int:
    """Print the folder of the binaries."""
    try:
        print(ensure().folder)
    except Missing as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
