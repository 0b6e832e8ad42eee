"""Starts etcd and the API servers, and makes them one endpoint.

Called by the fixtures. With binaries that build.sh made there are two servers: A (Kubernetes 1.20)
serves the core API, B (1.36) serves custom resources, and A's aggregation layer sends requests for
them on. With KUBEBUILDER_ASSETS one modern server does everything. Either way there is one
kubeconfig. Everything runs on loopback, in one temporary folder, and ends with this process.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import urllib3
import yaml

from cluster import certificates
from cluster.api import Api, ApiError, wait_for
from cluster.binaries import Binaries
from osft_operator import process_tree
from osft_operator.local_pods import Object
from osft_operator.local_runner import free_port

TOKEN = "the-tests-own-admin"
CONTROLLERS = (
    "garbagecollector,namespace,serviceaccount,serviceaccount-token,root-ca-cert-publisher,"
    "pvc-protection,pv-protection"
)
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
APISERVICE_PATH = "/apis/apiregistration.k8s.io/v1/apiservices"
READY_SECONDS = 90


class ControlPlane:
    """A running API server with admin access; `start` before use, `stop` at the end."""

    def __init__(self, binaries: Binaries, folder: Path, mark: str) -> None:
        self.binaries = binaries
        self.folder = folder
        self.kubeconfig = folder / "admin.kubeconfig"
        self.mark = f"{mark}/control-plane"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._etcd = f"http://127.0.0.1:{free_port()}"
        self._port = free_port()
        self.url = f"https://127.0.0.1:{self._port}"
        self._certificates = folder / "certificates"
        self._crd_api: Api | None = None
        self._crd_port = 0

    @property
    def ca(self) -> Path:
        """The certificate by which the API server is trusted."""
        return self._certificates / "apiserver.crt"

    @property
    def api(self) -> Api:
        """A client with all rights."""
        return Api(self.url, TOKEN, self.ca)

    def start(self, crds: Iterable[Object] = ()) -> None:
        """Start everything and wait until it serves, about 10 s.

        Args:
            crds: installed before the controllers start: their garbage collector looks for new
                kinds every 30 s only.
        """
        self._certificates.mkdir(parents=True)
        self._prepare()
        self._start_etcd()
        self._start_core()
        self._write_kubeconfig(self.kubeconfig, TOKEN)
        if self.binaries.joined:
            self._start_custom_resources()
        for crd in crds:
            self.install_crd(crd)
        self._start_controllers()
        self._wait_for_default_namespace()

    def stop(self) -> None:
        """End every process; the logs stay in the folder."""
        process_tree.kill(self.mark)
        for process in self._processes:
            process.wait()

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
        """
        definition: Object = yaml.safe_load(crd) if isinstance(crd, str) else crd
        server = self._crd_api or self.api
        name = definition["metadata"]["name"]
        try:
            server.post(CRD_PATH, definition)
        except ApiError as error:
            if error.code != 409:
                raise
            current = server.get(f"{CRD_PATH}/{name}")
            version = {"resourceVersion": current["metadata"]["resourceVersion"]}
            server.put(
                f"{CRD_PATH}/{name}",
                {**definition, "metadata": {**definition["metadata"], **version}},
            )
        group, plural = definition["spec"]["group"], definition["spec"]["names"]["plural"]
        for version in [each["name"] for each in definition["spec"]["versions"]]:
            if self._crd_api:
                self._aggregate(group, version)
            path = f"/apis/{group}/{version}/{plural}"
            wait_for(f"{path} served", lambda path=path: self._serves(path))

    def remove_crd(self, name: str, versions: Iterable[str]) -> None:
        """Remove a CustomResourceDefinition, with its objects, and wait until it is gone."""
        server = self._crd_api or self.api
        server.delete(f"{CRD_PATH}/{name}")
        plural, _, group = name.partition(".")
        for version in versions:
            path = f"/apis/{group}/{version}/{plural}"
            if self._crd_api:
                self.api.delete(f"{APISERVICE_PATH}/{version}.{group}")
            wait_for(f"{path} gone", lambda path=path: not self._serves(path))

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

    def _run(self, name: str, *arguments: object) -> None:
        program = self.binaries.path(name)
        assert program is not None, name
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [program, *(str(each) for each in arguments)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    "HOME": str(self.folder),
                    "PATH": "/usr/bin:/bin",
                    process_tree.VARIABLE: self.mark,
                },
            )
        self._processes.append(process)

    def _wait_until_ready(self, name: str, url: str, certificate: Path) -> None:
        end = time.monotonic() + READY_SECONDS
        while True:
            if self._processes[-1].poll() is not None or time.monotonic() > end:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"{name} does not serve; its last words:\n{log[-4000:]}")
            try:
                if certificate.exists() and Api(url, TOKEN, certificate).get("/readyz"):
                    return
            except (ApiError, urllib3.exceptions.HTTPError):
                pass
            time.sleep(0.2)

    def _start_etcd(self) -> None:
        peer = f"http://127.0.0.1:{free_port()}"
        self._run(
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
        self._run("kube-apiserver", *arguments)
        self._wait_until_ready("kube-apiserver", self.url, self.ca)

    def _proxy_trust(self) -> list[str]:
        return [
            f"--requestheader-client-ca-file={self._proxy_ca.certificate}",
            "--requestheader-allowed-names=front-proxy-client",
        ]

    def _start_custom_resources(self) -> None:
        self._crd_port = free_port()
        folder = self._certificates / "custom-resources"
        folder.mkdir()
        self._run(
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
            # these ask A for kinds that 1.20 does not have
            "--disable-admission-plugins=NamespaceLifecycle,ValidatingAdmissionPolicy,"
            "MutatingAdmissionPolicy,ValidatingAdmissionWebhook,MutatingAdmissionWebhook",
        )
        url = f"https://127.0.0.1:{self._crd_port}"
        self._wait_until_ready("apiextensions-apiserver", url, folder / "apiserver.crt")
        self._crd_api = Api(url, TOKEN, folder / "apiserver.crt")
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "custom-resources", "namespace": "default"},
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        }
        self.api.post("/api/v1/namespaces/default/services", service)

    def _aggregate(self, group: str, version: str) -> None:
        service = {"namespace": "default", "name": "custom-resources", "port": self._crd_port}
        body = {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"{version}.{group}"},
            "spec": {
                "group": group,
                "version": version,
                "service": service,
                "insecureSkipTLSVerify": True,
                "groupPriorityMinimum": 1000,
                "versionPriority": 15,
            },
        }
        try:
            self.api.post(APISERVICE_PATH, body)
        except ApiError as error:
            if error.code != 409:
                raise

    def _serves(self, path: str) -> bool:
        try:
            self.api.get(path)
        except ApiError as error:
            if error.code in (404, 503):
                return False
            raise
        return True

    def _start_controllers(self) -> None:
        if not (program := self.binaries.path("kube-controller-manager")):
            return
        told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        match = re.search(r"v1\.(\d+)", told.stdout)
        assert match, told.stdout
        # the insecure port went with 1.24, and its flag
        insecure = ["--port=0"] if int(match.group(1)) < 24 else []
        self._run(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            "--leader-elect=false",
            "--secure-port=0",
            *insecure,
            f"--controllers={self._controllers(int(match.group(1)))}",
            f"--service-account-private-key-file={self._account_key}",
            f"--root-ca-file={self.ca}",
        )

    @staticmethod
    def _controllers(minor: int) -> str:
        if minor < 29:
            return CONTROLLERS
        # renamed in 1.29; the old names are still known as aliases
        return CONTROLLERS.replace("serviceaccount-token", "serviceaccount-token-controller")

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

    def _wait_for_default_namespace(self) -> None:
        self._wait_for_account("default")

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
