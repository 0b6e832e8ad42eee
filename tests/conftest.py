"""What every test may ask for: the cluster's fixtures, and how tests share two workers."""

from __future__ import annotations

import signal

import pytest

pytest_plugins = ["cluster.fixtures", "end_to_end_fixtures"]


def pytest_configure() -> None:
    """Let started programs hear Ctrl-C: a shell's background job hands down that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of the control plane on one worker, so that it starts once; the others by file.

    Tests of the API server alone come first: once the stand-ins for training-operator and node
    run, every PyTorchJob gets pods. The end-to-end tests come last: their operator works in every
    namespace.
    """
    items.sort(key=_crowd)
    for item in items:
        needs_plane = "control_plane" in getattr(item, "fixturenames", ())
        group = "cluster" if needs_plane else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def _crowd(item: pytest.Item) -> int:
    """How much is at work in the cluster once this test has started it."""
    if item.path.stem.startswith("test_end_to_end"):
        return 2
    return 1 if "cluster" in getattr(item, "fixturenames", ()) else 0
