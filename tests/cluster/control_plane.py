"""Starts etcd and the API servers, and makes them one endpoint.

Called by the fixtures. With binaries that build.sh made there are two servers: A (Kubernetes 1.20)
serves the core API, B (1.36) serves custom resources, and A's aggregation layer sends requests for
them on. With KUBEBUILDER_ASSETS one modern server does everything. Either way there is one
kubeconfig. Everything runs on loopback, in one temporary folder, and ends with this process.
"""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path

import yaml

from cluster import certificates
from cluster.api import Api, ApiError, wait_for
from cluster.binaries import Binaries
from cluster.definitions import Definitions
from cluster.programs import Programs
from osft_operator.local_pods import Object
from osft_operator.local_runner import free_port

TOKEN = "the-tests-own-admin"
CONTROLLERS = (
    "garbagecollector,namespace,serviceaccount,serviceaccount-token,root-ca-cert-publisher,"
    "pvc-protection,pv-protection"
)


AUDITED = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    userGroups: [system:serviceaccounts]
  - level: None
"""
"""What the audit log holds: what service accounts do; the administrator is the tests."""


class ControlPlane:
    """A running API server with admin access; `start` before use, `stop` at the end."""

    def __init__(self, binaries: Binaries, folder: Path, mark: str) -> None:
        self.binaries = binaries
        self.folder = folder
        self.kubeconfig = folder / "admin.kubeconfig"
        self.mark = f"{mark}/control-plane"
        self._programs = Programs(binaries, folder, self.mark)
        self._etcd = f"http://127.0.0.1:{free_port()}"
        self._port = free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self._certificates = folder / "certificates"
        self.refused: dict[str, str] = {}
        """The server's words on each CustomResourceDefinition that it refused at the start."""
        self._definitions: Definitions | None = None
        self._crd_port = 0

    @property
    def ca(self) -> Path:
        """The certificate by which the API server is trusted."""
        return self._certificates / "apiserver.crt"

    @property
    def audit_log(self) -> Path:
        """One JSON object for each request of a service account."""
        return self.folder / "audit.log"

    @property
    def api(self) -> Api:
        """A client with all rights."""
        return Api(self.url, TOKEN, self.ca)

    def start(self, crds: Iterable[Object] = ()) -> None:
        """Start everything and wait until it serves, about 10 s.

        Args:
            crds: installed before the controllers start: their garbage collector looks for new
                kinds every 30 s only. One that the server refuses goes into `refused`, and the
                tests that need no such object still run.
        """
        self._certificates.mkdir(parents=True)
        self._prepare()
        self._start_etcd()
        self._start_core()
        self._write_kubeconfig(self.kubeconfig, TOKEN)
        if self.binaries.joined:
            self._start_custom_resources()
        else:
            self._definitions = Definitions(self.api)
        for crd in crds:
            try:
                self.install_crd(crd)
            except ApiError as error:
                self.refused[crd["metadata"]["name"]] = error.message
        self._start_controllers()
        self._wait_for_account("default")

    def stop(self) -> None:
        """End every process; the logs stay in the folder."""
        self._programs.stop()

    def restart_servers(self) -> None:
        """Kill every API server and start it anew; until it is ready nobody gets an answer."""
        self._programs.restart("kube-apiserver")
        self._programs.wait_until_ready(self.api, self.ca)
        if self.binaries.joined:
            self._programs.restart("apiextensions-apiserver")
            certificate = self._certificates / "custom-resources" / "apiserver.crt"
            url = f"https://127.0.0.1:{self._crd_port}"
            self._programs.wait_until_ready(Api(url, TOKEN, certificate), certificate)

    def pause_etcd(self, paused: bool) -> None:
        """Let etcd stand still, or go on: the API servers wait for it."""
        self._programs.signal("etcd", signal.SIGSTOP if paused else signal.SIGCONT)

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002
        """Run kubectl as administrator and return what it printed.

        Raises:
            RuntimeError: it failed and `check` is set; with its words.
        """
        result = subprocess.run(
            [self.binaries.kubectl(), "--kubeconfig", self.kubeconfig, *arguments],
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            # a cache of its own: this server's kinds are not another's
            env={"HOME": str(self.folder), "PATH": "/usr/bin:/bin"},
        )
        if check and result.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {result.stderr or result.stdout}")
        return result.stdout if check else result.stdout + result.stderr

    def install_crd(self, crd: Object | str) -> None:
        """Install or replace a CustomResourceDefinition and wait until it is served.

        Args:
            crd: the object, or YAML text of one.

        Raises:
            ApiError: the server refuses it.
        """
        assert self._definitions is not None, "started"
        self._definitions.install(yaml.safe_load(crd) if isinstance(crd, str) else crd)

    def remove_crd(self, name: str, versions: Iterable[str]) -> None:
        """Remove a CustomResourceDefinition, with its objects, and wait until it is gone."""
        assert self._definitions is not None, "started"
        self._definitions.remove(name, versions)

    def create_namespace(self, name: str) -> None:
        """Create a namespace and wait until pods may be created in it."""
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        self.api.post("/api/v1/namespaces", body)
        self._wait_for_account(name)

    def delete_namespace(self, name: str) -> None:
        """Delete a namespace; what is in it goes in the background."""
        self.api.delete(f"/api/v1/namespaces/{name}")

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig that speaks as that ServiceAccount, with its rights only."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 6 * 3600},
        }
        token = self.api.post(path, request)["status"]["token"]
        kubeconfig = self.folder / f"{namespace}-{name}.kubeconfig"
        self._write_kubeconfig(kubeconfig, token, namespace)
        return kubeconfig

    def _prepare(self) -> None:
        self._proxy_ca = certificates.authority(self._certificates, "proxy-ca")
        self._client_ca = certificates.authority(self._certificates, "client-ca")
        self._proxy = certificates.signed(self._certificates, "front-proxy-client", self._proxy_ca)
        self._account_key = self._certificates / "service-account.key"
        certificates.new_key(self._account_key)
        (self.folder / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        (self.folder / "audit.yaml").write_text(AUDITED)

    def _start_etcd(self) -> None:
        peer = f"http://127.0.0.1:{free_port()}"
        self._programs.run(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
        )

    def _start_core(self) -> None:
        arguments = [
            f"--etcd-servers={self._etcd}",
            f"--secure-port={self._port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--cert-dir={self._certificates}",
            f"--service-account-key-file={self._account_key}",
            f"--service-account-signing-key-file={self._account_key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true",
            f"--audit-policy-file={self.folder / 'audit.yaml'}",
            f"--audit-log-path={self.audit_log}",
        ]
        if self.binaries.joined:
            arguments += [
                f"--client-ca-file={self._client_ca.certificate}",
                *self._proxy_trust(),
                "--requestheader-username-headers=X-Remote-User",
                "--requestheader-group-headers=X-Remote-Group",
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
                f"--proxy-client-cert-file={self._proxy.certificate}",
                f"--proxy-client-key-file={self._proxy.key}",
            ]
        if not self.binaries.path("kube-controller-manager"):
            # nothing would make the account that this plugin waits for
            arguments.append("--disable-admission-plugins=ServiceAccount")
        self._programs.run("kube-apiserver", *arguments)
        self._programs.wait_until_ready(Api(self.url, TOKEN, self.ca), self.ca)

    def _proxy_trust(self) -> list[str]:
        return [
            f"--requestheader-client-ca-file={self._proxy_ca.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
        ]

    def _start_custom_resources(self) -> None:
        self._crd_port = free_port()
        folder = self._certificates / "custom-resources"
        folder.mkdir()
        self._programs.run(
            "apiextensions-apiserver",
            f"--etcd-servers={self._etcd}",
            "--etcd-prefix=/crdserver",
            f"--secure-port={self._crd_port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={folder}",
            f"--authentication-kubeconfig={self.kubeconfig}",
            f"--authorization-kubeconfig={self.kubeconfig}",
            f"--kubeconfig={self.kubeconfig}",
            "--enable-priority-and-fairness=false",
            *self._proxy_trust(),
            # these ask A for kinds that 1.20 does not have; validating webhooks it has
            "--disable-admission-plugins=NamespaceLifecycle,ValidatingAdmissionPolicy,"
            "MutatingAdmissionPolicy,MutatingAdmissionWebhook",
        )
        url = f"https://127.0.0.1:{self._crd_port}"
        certificate = folder / "apiserver.crt"
        self._programs.wait_until_ready(Api(url, TOKEN, certificate), certificate)
        self._definitions = Definitions(self.api, Api(url, TOKEN, certificate), self._crd_port)

    def _start_controllers(self) -> None:
        if not (program := self.binaries.path("kube-controller-manager")):
            return
        told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        match = re.search(r"v1\.(\d+)", told.stdout)
        assert match, told.stdout
        # the insecure port went with 1.24, and its flag
        insecure = ["--port=0"] if int(match.group(1)) < 24 else []
        self._programs.run(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            "--leader-elect=false",
            "--secure-port=0",
            *insecure,
            # modern ones were renamed and know these names as aliases
            f"--controllers={CONTROLLERS}",
            f"--service-account-private-key-file={self._account_key}",
            f"--root-ca-file={self.ca}",
        )

    def _wait_for_account(self, namespace: str) -> None:
        if not self.binaries.path("kube-controller-manager"):
            return
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts"

        def ready() -> bool:
            accounts = self.api.get(path)["items"]
            # up to 1.23 a pod needs the account's secret as well
            return any(
                each["metadata"]["name"] == "default"
                and (each.get("secrets") or not self.binaries.joined)
                for each in accounts
            )

        wait_for(f"service account in namespace {namespace}", ready)

    def _write_kubeconfig(self, path: Path, token: str, namespace: str = "default") -> None:
        cluster = {"server": self.url, "certificate-authority": str(self.ca)}
        context = {"cluster": "tests", "user": "user", "namespace": namespace}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": cluster}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "tests", "context": context}],
        }
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(document))
