"""What every test may ask for: the cluster's fixtures, and how tests share two workers."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

import drawn
from soak_record import SoakRecord

# Ranks of one machine share its cores. Before torch is loaded: results differ by rounding with the
# number of threads, and ranks in this process are compared with such in others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["cluster.fixtures", "end_to_end_fixtures"]

END_TO_END, CLUSTER, REST = "end-to-end", "cluster", "rest"
"""The crowds that tests come in. All tests of one of the first two run on one worker, in order."""
_USES_THE_PLANE = "mark.cluster"
"""Stands in every file with a test that asks for the control plane."""


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a family of `model_families`, made once and shared: only to be read."""
    # torch takes seconds to load, and most tests have no need of it
    import model_families

    root = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = model_families.save_family(root / name, name)
        return made[name]

    return folder_of


def pytest_configure(config: pytest.Config) -> None:
    """Let started programs hear Ctrl-C, and write down what long tests measure."""
    # a shell's background job hands down that Ctrl-C is ignored
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    drawn.load_profile()
    if drawn.SOAK and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SoakRecord())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the crowds: the end-to-end tests, the others of the control plane, the rest.

    Each worker starts a control plane of its own when it needs one. The operator of the end-to-end
    tests works in every namespace, so no other test may share its control plane: they come first
    where another worker takes the other tests of the control plane, and last where none does.
    Tests of the API server alone come before those of the whole cluster: once the stand-ins for
    training-operator and node run, every PyTorchJob gets pods.
    """
    for item in items:
        if "control_plane" in getattr(item, "fixturenames", ()):
            assert _crowd(item.path) != REST, f"{item.path} lacks a `pytest.{_USES_THE_PLANE}`"
    several = getattr(config, "workerinput", {}).get("workercount", 1) > 1
    order = [END_TO_END, CLUSTER, REST] if several else [REST, CLUSTER, END_TO_END]
    items.sort(
        key=lambda item: (
            order.index(_crowd(item.path)),
            "cluster" in getattr(item, "fixturenames", ()),
        )
    )


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Give each crowd of the control plane to one worker, and share the rest by file."""
    return _ByCrowd(config, log)


class _ByCrowd(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        path = self.config.rootpath / nodeid.partition("::")[0]
        crowd = _crowd(path)
        return path.stem if crowd == REST else crowd


@functools.cache
def _crowd(path: Path) -> str:
    if path.stem.startswith("test_end_to_end"):
        return END_TO_END
    return CLUSTER if _USES_THE_PLANE in path.read_text(encoding="utf-8") else REST
