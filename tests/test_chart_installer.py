"""Who may install the chart: what the page says of a namespace's admin is what the server does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python
import pytest

import operators_page
from chart_release import for_server
from chart_rendering import MATRIX
from cluster.control_plane import ControlPlane

pytestmark = pytest.mark.cluster
RBAC = "rbac.authorization.k8s.io"
EVERY_DAY = ["get", "list", "watch", "create", "update", "patch", "delete"]


def _admin(plane: ControlPlane, namespace: str) -> Path:
    """The kubeconfig of somebody who may do there what `admin` and editors of jobs may."""
    home, roles = f"/api/v1/namespaces/{namespace}", f"/apis/{RBAC}/v1/namespaces/{namespace}"
    groups = ["", "apps", "policy", "networking.k8s.io", RBAC, "coordination.k8s.io"]
    rules = [
        # `escalate` and `bind` would let him give what he does not hold; no `admin` has them.
        {"apiGroups": [*groups, "kubeflow.org"], "resources": ["*"], "verbs": EVERY_DAY},
        {"apiGroups": ["osft.dev"], "resources": ["osftjobs"], "verbs": ["*"]},
    ]
    named = {"metadata": {"name": "installer"}}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", **named}
    plane.api.post(f"{home}/serviceaccounts", account)
    plane.api.post(
        f"{roles}/roles", {"apiVersion": f"{RBAC}/v1", "kind": "Role", "rules": rules, **named}
    )
    binding = {
        "apiVersion": f"{RBAC}/v1",
        "kind": "RoleBinding",
        "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": "installer"},
        "subjects": [{"kind": "ServiceAccount", "name": "installer", "namespace": namespace}],
        **named,
    }
    plane.api.post(f"{roles}/rolebindings", binding)
    return plane.service_account_kubeconfig(namespace, "installer")


def test_a_namespaces_admin_installs_with_the_roles_made_by_somebody_else(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    chart, needed = for_server(control_plane, tmp_path / "chart")
    values: dict[str, Any] = {
        **MATRIX["namespaces only"],
        "watch": {"namespaces": [namespace]},
        **needed,
    }
    kubeconfig = _admin(control_plane, namespace)
    config = helm_python.Config(kubeconfig_path=kubeconfig, namespace=namespace)
    try:
        with pytest.raises(helm_python.HelmError, match="attempting to grant RBAC") as refused:
            config.install(chart, namespace, values, namespace=namespace)
        for resource, verb in (("osftjobs/status", "patch"), ("osftjobs/finalizers", "update")):
            assert resource in str(refused.value)
            assert f"`{resource}: {verb}`" in operators_page.PAGE.read_text(encoding="utf-8")
        config.uninstall(namespace, ignore_not_found=True)
        without = {**values, "rbac": {"create": False, "userRoles": {"create": False}}}
        config.install(chart, namespace, without, namespace=namespace)
        config.uninstall(namespace, ignore_not_found=True)
    finally:
        config.close()
