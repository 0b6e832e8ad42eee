"""Merges a user's part of a pod template into the rendered one.

Called by pod. Pure. Lists of named things are merged by name (volumeMounts by mountPath),
tolerations are appended, maps are merged, everything else is replaced. It decides nothing about
what is allowed: that is policy's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "name",
    "volumeMounts": "mountPath",
    "hostAliases": "ip",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "readinessGates": "conditionType",
}
"""By which key the entries of a list are the same."""
APPENDED = ("tolerations", "topologySpreadConstraints")
"""Lists whose entries have no identity."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The base with everything that `over` says; both stay as they are."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        if value is None:  # as in Kubernetes: absent
            continue
        result[key] = _merged(key, result.get(key), copy.deepcopy(value))
    return result


def _merged(key: str, old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return merge(old, new)
    if isinstance(old, list) and isinstance(new, list):
        if key in APPENDED:
            return old + [entry for entry in new if entry not in old]
        if key in KEYS:
            return _by_key(KEYS[key], old, new)
    return new


def _by_key(key: str, old: list[Any], new: list[Any]) -> list[Any]:
    result = list(old)
    places = {entry.get(key): place for place, entry in enumerate(result)}
    for entry in new:
        place = places.get(entry.get(key))
        if place is None:
            result.append(entry)
        else:
            result[place] = merge(result[place], entry)
    return result
