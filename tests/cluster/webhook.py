"""The validating webhook of Kubeflow's training-operator (v1.9) for PyTorchJobs, as a stand-in.

Started by the fixtures beside the control plane. The definition of a PyTorchJob leaves these rules
to the webhook, so what breaks them is refused with 403, and nothing can be made or changed while it
is away (500). Rules and words are those of the real one; nothing is repaired.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster import certificates
from cluster.api import Api, ApiError, wait_for
from osft_operator.local_pods import CONTAINER, Object

NAME = "validator.pytorchjob.training-operator.kubeflow.org"
PATH = "/validate-kubeflow-org-v1-pytorchjob"
CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
MANAGERS = ("kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?\Z")


def refusals(job: Object) -> list[str]:
    """What the webhook has against a PyTorchJob; empty when it takes it."""
    spec, found = job["spec"], []
    name = job["metadata"].get("name", "")
    if not _DNS_1035.match(name):
        words = "should match: a DNS-1035 label must consist of lower case alphanumeric characters"
        found.append(f'metadata.name: Invalid value: "{name}": {words}')
    manager = (spec.get("runPolicy") or {}).get("managedBy")
    if manager is not None and manager not in MANAGERS:
        where = "spec.runPolicy.managedBy"
        found.append(f'{where}: Invalid value: "{manager}": must be one of {", ".join(MANAGERS)}')
    elastic, replicas = spec.get("elasticPolicy"), spec.get("pytorchReplicaSpecs") or {}
    if elastic is not None and "Worker" not in replicas:
        words = "must be configured if elastic policy is used"
        found.append(f"spec.pytorchReplicaSpecs[Worker]: Required value: {words}")
    if (elastic or {}).get("nProcPerNode") is not None and spec.get("nprocPerNode") is not None:
        words = "must not be used with spec.nprocPerNode"
        found.append(f"spec.elasticPolicy.nProcPerNode: Forbidden: {words}")
    return found + [each for kind in replicas for each in _of_replicas(kind, replicas[kind])]


def _of_replicas(kind: str, replica: Object) -> list[str]:
    path, found = f"spec.pytorchReplicaSpecs[{kind}]", []
    if kind not in ("Master", "Worker"):
        words = f'Unsupported value: "{kind}": supported values: "Master", "Worker"'
        found.append(f"{path}: {words}")
    containers = (replica["template"].get("spec") or {}).get("containers") or []
    inner, number = f"{path}.template.spec.containers", replica.get("replicas")
    if not containers:
        found.append(f"{inner}: Required value: must be specified")
    for index, container in enumerate(containers):
        if not container.get("image"):
            found.append(f"{inner}[{index}].image: Required value: must be required")
    if not any(container.get("name") == CONTAINER for container in containers):
        words = f"must have at least one container with name {CONTAINER}"
        found.append(f"{inner}: Required value: {words}")
    if kind == "Master" and number != 1:
        found.append(f"{path}.replicas: Forbidden: must be 1")
    elif kind != "Master" and number is not None and number < 1:
        found.append(f"{path}.replicas: Forbidden: must be at least 1")
    return found


class Webhook:
    """Serves between `start` and `stop`; `away` ends it while its configuration stays."""

    def __init__(self, api: Api, folder: Path) -> None:
        self._api = api
        self._pair = certificates.signed(folder, "webhook")
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    def start(self) -> None:
        """Serve, and wait until the API server asks."""
        self.serve()
        self._api.post(CONFIGURATIONS, self._configuration())
        bad = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "probe"}}
        bad["spec"] = {"pytorchReplicaSpecs": {}, "elasticPolicy": {}}

        def asks() -> bool:
            try:
                path = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs?dryRun=All"
                self._api.post(path, bad)
            except ApiError as error:
                return NAME in error.message
            return False

        wait_for("the webhook of PyTorchJobs", asks)

    def serve(self) -> None:
        """Answer, at the same address as before."""
        server = ThreadingHTTPServer(("127.0.0.1", self._port), _Answer)
        server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._pair.certificate, self._pair.key)
        # the handshake belongs to the connection's own thread
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        self._port, self._server = server.server_address[1], server
        threading.Thread(target=server.serve_forever, daemon=True, name="webhook").start()

    def away(self) -> None:
        """Answer nobody any more."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    stop = away

    def _configuration(self) -> Object:
        bundle = base64.b64encode(self._pair.certificate.read_bytes()).decode()
        rule = {
            "apiGroups": ["kubeflow.org"],
            "apiVersions": ["v1"],
            "operations": ["CREATE", "UPDATE"],
            "resources": ["pytorchjobs"],
        }
        webhook = {
            "name": NAME,
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "clientConfig": {"url": f"https://127.0.0.1:{self._port}{PATH}", "caBundle": bundle},
            "rules": [rule],
        }
        return {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "validator.training-operator.kubeflow.org"},
            "webhooks": [webhook],
        }


class _Answer(BaseHTTPRequestHandler):
    """One admission review; HTTP/1.0, so that a connection never outlives the server."""

    timeout = 30

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = review["request"]
        found = refusals(request["object"])
        answer: dict[str, Any] = {"uid": request["uid"], "allowed": not found}
        if found:
            text = found[0] if len(found) == 1 else f"[{', '.join(found)}]"
            answer["status"] = {"code": 403, "reason": "Forbidden", "message": text}
        kinds = {"apiVersion": review["apiVersion"], "kind": review["kind"]}
        body = json.dumps({**kinds, "response": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: the API server's own log has it."""
