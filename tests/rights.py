"""What the operator's account has asked of the API server, and what the chart's roles allow it.

The first is read from the server's audit log, so nothing between the code and the server can hide
a call. Called by the tests of the chart's rights and by the end-to-end tests.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from chart_release import ACCOUNT
from cluster.control_plane import ControlPlane


class Right(NamedTuple):
    """A verb on a resource."""

    group: str
    resource: str
    """With its subresource: osftjobs/status."""
    verb: str


def asked(plane: ControlPlane, home: str) -> set[Right]:
    """Every right that the operator installed in a namespace has made use of, or tried to."""
    return {_right(entry) for entry in _entries(plane, home)}


def refused(plane: ControlPlane, home: str) -> list[str]:
    """What the server did not allow it, each with the server's words."""
    return [
        f"{_right(entry)}: {entry['responseStatus'].get('message', '')}"
        for entry in _entries(plane, home)
        if entry["responseStatus"].get("code") == 403
        # an admission plugin's refusal, as a quota's, is no missing right
        and entry.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid"
    ]


def granted(roles: list[dict[str, Any]]) -> set[Right]:
    """Every right of some Roles or ClusterRoles."""
    return {
        Right(group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def _entries(plane: ControlPlane, home: str) -> list[dict[str, Any]]:
    user = f"system:serviceaccount:{home}:{ACCOUNT}"
    lines = plane.audit_log.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if user in line]
    # Without an object it is a question which kinds there are, which everybody may ask.
    return [each for each in found if each["user"]["username"] == user and "objectRef" in each]


def _right(entry: dict[str, Any]) -> Right:
    about = entry["objectRef"]
    part = f"/{about['subresource']}" if about.get("subresource") else ""
    return Right(about.get("apiGroup", ""), about.get("resource", "") + part, entry["verb"])
