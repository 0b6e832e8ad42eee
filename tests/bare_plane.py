"""An API server that has never heard of PyTorchJobs, for the tests of what happens without them.

Called by tests; those that only need an API server share the session's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.binaries import Binaries
from cluster.control_plane import ControlPlane
from cluster.fixtures import own_crds

NAMESPACE = "test"
"""The namespace it has."""


@contextmanager
def running(binaries: Binaries, folder: Path, mark: str) -> Iterator[ControlPlane]:
    """A control plane of the test's own, with the repository's definitions only."""
    plane = ControlPlane(binaries, folder, f"{mark}/bare")
    try:
        plane.start(own_crds())
        plane.create_namespace(NAMESPACE)
        yield plane
    finally:
        plane.stop()
