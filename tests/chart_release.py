"""The chart as a release on a test's API server, for every test that needs the operator's rights.

Called by the tests. The server that Debian's packages give is older than the chart allows, and
takes custom resource definitions elsewhere; `for_server` says what is left out there, and nothing
else may be.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helm_python

from cluster.control_plane import ControlPlane

CHART = Path(__file__).parents[1] / "charts" / "osft-operator"
ACCOUNT = "osft-operator"
"""The operator's ServiceAccount in a release made here."""

Values = dict[str, Any]


def for_server(plane: ControlPlane, folder: Path) -> tuple[Path, Values]:
    """The chart and the values that this server can take.

    Args:
        plane: the server; a modern one gets the chart as it is shipped.
        folder: an empty folder for a copy.
    """
    if not plane.binaries.joined:
        return CHART, {}
    copy = folder / CHART.name
    shutil.copytree(CHART, copy)
    about = copy / "Chart.yaml"
    about.write_text(re.sub(r"(?m)^kubeVersion:.*\n", "", about.read_text()))
    # Kubernetes 1.20 has no policy/v1
    return copy, {"podDisruptionBudget": {"enabled": False}}


@contextmanager
def installed(
    plane: ControlPlane, namespace: str, folder: Path, values: Values | None = None
) -> Iterator[helm_python.Config]:
    """The chart installed in a namespace, uninstalled at the end.

    Cluster-wide names carry the namespace, so that two releases can stand side by side; the server
    has the OSFTJob's definition already. Nothing is waited for: no node runs the operator's pod.
    Its account is ACCOUNT.

    Yields:
        Helm's view of the server; the release is called like the namespace.
    """
    chart, needed = for_server(plane, folder)
    given = {
        "fullnameOverride": f"osft-{namespace}",
        "serviceAccount": {"name": ACCOUNT},
        "crds": {"enabled": False},
        **needed,
        **(values or {}),
    }
    config = helm_python.Config(kubeconfig_path=plane.kubeconfig, namespace=namespace)
    config.install(chart, namespace, given, namespace=namespace)
    try:
        yield config
    finally:
        config.uninstall(namespace, ignore_not_found=True)
        config.close()
