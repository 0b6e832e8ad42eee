"""The user's way to a cluster: OSFTJobs, their pods and logs, with the rights of a kubeconfig.

Called by `osft watch` and `osft logs` only; the operator's own client is in cluster. Reads and
never writes. What goes wrong is a RemoteError in words for people; what may pass by itself is an
Unreachable.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import urllib3
from kubernetes import client, config

from osft_operator import names
from osft_operator.observed import Object

TIMEOUT_SECONDS = 10.0
"""Longest wait for an answer."""
SILENCE_SECONDS = 600.0
"""A log that is followed and silent for so long is asked for anew: its connection may be dead."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
"""Where a pod finds its own namespace."""


class RemoteError(ValueError):
    """The cluster does not give what was asked for."""


class Unreachable(RemoteError):
    """No answer: it may come with another try."""


class Remote:
    """One namespace of one cluster."""

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        configuration.retries = False
        self.namespace = namespace
        self._client = client.ApiClient(configuration)
        self._jobs = client.CustomObjectsApi(self._client)
        self._core = client.CoreV1Api(self._client)

    @classmethod
    def connect(cls, namespace: str | None = None, context: str | None = None) -> Self:
        """The cluster of KUBECONFIG or ~/.kube/config, or the one that this pod runs in.

        Raises:
            RemoteError: there is neither, or no such context.
        """
        configuration = client.Configuration()
        try:
            config.load_kube_config(context=context, client_configuration=configuration)
        except config.ConfigException as error:
            try:
                config.load_incluster_config(client_configuration=configuration)
            except config.ConfigException:
                raise RemoteError(f"no way to a cluster: {error}; set KUBECONFIG") from None
            own = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
            return cls(configuration, namespace or own)
        contexts, active = config.list_kube_config_contexts()
        chosen = next((each for each in contexts if each["name"] == context), active)
        return cls(configuration, namespace or chosen["context"].get("namespace") or "default")

    def job(self, name: str) -> Object:
        """An OSFTJob.

        Raises:
            RemoteError: there is none, or the cluster does not let us see it.
        """
        try:
            found: Object = self._jobs.get_namespaced_custom_object(
                names.GROUP,
                names.VERSION,
                self.namespace,
                names.PLURAL,
                name,
                _request_timeout=TIMEOUT_SECONDS,
            )
        except (client.ApiException, urllib3.exceptions.HTTPError) as error:
            if getattr(error, "status", 0) == 404:
                raise RemoteError(
                    f"there is no OSFTJob {name} in namespace {self.namespace}: see `kubectl get "
                    "osftjobs -A`, and give the namespace with -n"
                ) from None
            raise _words(error) from None
        except RecursionError:
            raise RemoteError(
                f"OSFTJob {name} is too deep to be read here, and the operator refuses it: see its "
                "condition Accepted with kubectl describe"
            ) from None
        return found

    def pods(self, name: str, attempt: int) -> list[Object]:
        """The pods of an attempt of an OSFTJob."""
        labels = f"{names.JOB_LABEL}={name},{names.ATTEMPT_LABEL}={attempt}"
        try:
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=labels, _request_timeout=TIMEOUT_SECONDS
            )
        except (client.ApiException, urllib3.exceptions.HTTPError) as error:
            raise _words(error) from None
        items: list[Object] = self._client.sanitize_for_serialization(found.items)
        return items

    def log(self, pod: str, **options: Any) -> Iterator[bytes]:
        """The log of a pod's trainer, in pieces as they come.

        Args:
            pod: its name.
            options: follow, previous, tail_lines, since_seconds, as the API server takes them.

        Raises:
            RemoteError: the container has no log (yet), or the stream broke.
        """
        follow = options.get("follow", False)
        timeout = (TIMEOUT_SECONDS, SILENCE_SECONDS if follow else TIMEOUT_SECONDS)
        try:
            answer = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=names.CONTAINER,
                _preload_content=False,
                _request_timeout=timeout,
                **{name: value for name, value in options.items() if value is not None},
            )
            yield from answer.stream(2**14, decode_content=True)
        except (client.ApiException, urllib3.exceptions.HTTPError) as error:
            # 404 is also a kubelet's answer before it has taken up a pod that is bound to it.
            if getattr(error, "status", 0) in (400, 404):
                raise Unreachable(f"pod {pod} has no log yet: {_body(error)}") from None
            raise _words(error) from None


def _words(error: Exception) -> RemoteError:
    status = int(getattr(error, "status", 0) or 0)
    if not isinstance(error, client.ApiException) or status in (0, 429) or status >= 500:
        return Unreachable(f"the cluster does not answer: {getattr(error, 'reason', error)}")
    return RemoteError(f"the cluster refuses ({status}): {_body(error) or error.reason}")


def _body(error: Exception) -> str:
    """The server's own words."""
    body = getattr(error, "body", None) or ""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text
