"""Installs CustomResourceDefinitions, on one server or on the joined two.

Called by control_plane. Joined, a definition lives on server B only; server A gets an APIService
for each of its versions and sends requests on. So through A everything works but `kubectl explain`
and the definition itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.api import Api, ApiError, wait_for
from osft_operator.local_pods import Object

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
API_SERVICES = "/apis/apiregistration.k8s.io/v1/apiservices"
SERVICE = "custom-resources"


class Definitions:
    """Installs and removes CustomResourceDefinitions, and waits for what follows."""

    def __init__(self, api: Api, server: Api | None = None, port: int = 0) -> None:
        """Take one server, or two.

        Args:
            api: the endpoint that everybody uses.
            server: the one that holds the definitions, when it is another.
            port: that one's port on this machine.
        """
        self._api, self._server, self._port = api, server or api, port
        self._joined = server is not None
        if self._joined:
            body = {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": SERVICE, "namespace": "default"},
                "spec": {"type": "ExternalName", "externalName": "localhost"},
            }
            self._api.post("/api/v1/namespaces/default/services", body)

    def install(self, crd: Object) -> None:
        """Create or replace, and wait until every version is served.

        Raises:
            ApiError: the server refuses it.
        """
        path = f"{CRDS}/{crd['metadata']['name']}"
        try:
            self._server.post(CRDS, crd)
        except ApiError as error:
            if error.code != 409:
                raise
            version = self._server.get(path)["metadata"]["resourceVersion"]
            metadata = {**crd["metadata"], "resourceVersion": version}
            self._server.put(path, {**crd, "metadata": metadata})
        group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
        for version in crd["spec"]["versions"]:
            if self._joined:
                self._aggregate(group, version["name"])
            self._wait(f"/apis/{group}/{version['name']}/{plural}", served=True)

    def remove(self, name: str, versions: Iterable[str]) -> None:
        """Delete a definition with its objects, and wait until it is not served any more."""
        self._server.delete(f"{CRDS}/{name}")
        plural, _, group = name.partition(".")
        for version in versions:
            if self._joined:
                self._api.delete(f"{API_SERVICES}/{version}.{group}")
            self._wait(f"/apis/{group}/{version}/{plural}", served=False)

    def _aggregate(self, group: str, version: str) -> None:
        body = {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"{version}.{group}"},
            "spec": {
                "group": group,
                "version": version,
                "service": {"namespace": "default", "name": SERVICE, "port": self._port},
                "insecureSkipTLSVerify": True,
                "groupPriorityMinimum": 1000,
                "versionPriority": 15,
            },
        }
        self._api.attempt("POST", API_SERVICES, body)

    def _wait(self, path: str, *, served: bool) -> None:
        def reached() -> bool:
            try:
                self._api.get(path)
            except ApiError as error:
                if error.code not in (404, 503):
                    raise
                return not served
            return served

        wait_for(f"{path} {'served' if served else 'gone'}", reached)
