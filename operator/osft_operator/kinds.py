"""The kinds of objects that the operator reads and writes, and their paths on the API server.

Called by every module of the shell; knows no client. A kind's place is said here once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from osft_operator import names

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A resource of the API server."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """As written in a manifest."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def root(self) -> str:
        """Path of the group and version."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"

    def path(self, namespace: str | None, name: str | None = None, sub: str | None = None) -> str:
        """Path of a collection, an object or a subresource."""
        parts = [self.root]
        parts += ["namespaces", quote(namespace, safe="")] if namespace else []
        parts += [self.plural]
        parts += [quote(name, safe="")] if name else []
        parts += [sub] if sub else []
        return "/".join(parts)


OSFTJOBS = Kind(names.GROUP, names.VERSION, names.PLURAL, names.KIND)
PYTORCHJOBS = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
PODS = Kind("", "v1", "pods", "Pod")
CLAIMS = Kind("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
EVENTS = Kind("", "v1", "events", "Event")
LEASES = Kind("coordination.k8s.io", "v1", "leases", "Lease")
WORKLOADS = (
    Kind("kueue.x-k8s.io", "v1beta2", "workloads", "Workload"),
    Kind("kueue.x-k8s.io", "v1beta1", "workloads", "Workload"),
)
"""Kueue's, in the versions that it has served; they say the same where we read them."""
