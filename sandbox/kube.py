"""A Kubernetes API server: etcd and kube-apiserver on loopback, RBAC on, its state in one directory.

    with KubeApi(directory) as kube:
        kube.kubectl("apply", "-k", "crds/")

Nothing else of Kubernetes runs: no controllers, no scheduler, no kubelet (sandbox.node has them). Ready about 2 s after
the start.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from sandbox import binaries
from sandbox.certificates import Authority, new_key
from sandbox.processes import Program, SandboxError

_LOOPBACK = "127.0.0.1"


class KubectlError(SandboxError):
    """kubectl failed; `stderr` has its messages."""

    def __init__(self, arguments: Sequence[str], stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(arguments)}: {stderr.strip()}")
        self.stderr = stderr


class KubeApi:
    """An API server. A context manager; or `start` and `stop`, with `detached=True` also from different processes.

    `kubeconfig` is the file of an administrator, `url` the server's address, `authority` signs certificates; they are
    valid once started, and stay the same in a directory that is used again. It listens on `address` (an IP of this
    machine) and `port` (0: one that is free).
    """

    authority: Authority

    def __init__(self, directory: Path, *, detached: bool = False, address: str = _LOOPBACK, port: int = 0) -> None:
        self.directory = directory
        self.kubeconfig = directory / "admin.kubeconfig"
        self._detached = detached
        self._address, self._port = address, port
        self._ports_file = directory / "ports.json"
        self.etcd = Program("etcd", directory)
        self.apiserver = Program("kube-apiserver", directory)

    def __enter__(self) -> KubeApi:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"https://{self._address}:{self._ports['apiserver']}"

    def start(self) -> None:
        """Start etcd and the API server if they do not run; return when the server is ready. Raises SandboxError."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self._ports_file.exists():
            etcd, apiserver = _free_ports(2)
            self._ports_file.write_text(json.dumps({"etcd": etcd, "apiserver": self._port or apiserver}))
        self.authority = Authority(self.directory / "pki")
        self._admin = self.authority.issue("admin", user="sandbox-admin", groups=["system:masters"])
        self._server = self.authority.issue(
            "server",
            user="sandbox",
            addresses=[f"IP:{_LOOPBACK}", f"IP:{self._address}", "DNS:localhost", "DNS:kubernetes.default.svc"],
        )
        self.start_etcd()
        self.start_apiserver()
        self.kubeconfig_for("sandbox-admin", groups=["system:masters"], name="admin")

    def stop(self) -> None:
        """Stop both; their data stays in the directory."""
        self.apiserver.stop(seconds=5)  # it waits for open watches for up to a minute; its state is etcd's
        self.etcd.stop(seconds=5)

    def start_etcd(self) -> None:
        url = f"https://{_LOOPBACK}:{self._ports['etcd']}"
        certificate, key = self._server
        self.etcd.start(
            [
                binaries.path("etcd"),
                f"--data-dir={self.directory / 'etcd'}",
                f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}",
                f"--listen-peer-urls=http://{_LOOPBACK}:0",
                f"--cert-file={certificate}",
                f"--key-file={key}",
                f"--trusted-ca-file={self.authority.certificate}",
                "--client-cert-auth",
                "--log-level=warn",
                "--logger=zap",
            ],
            detached=self._detached,
        )

    def start_apiserver(self) -> None:
        """Start the API server only and wait until it is ready; `apiserver.stop()` stops it only."""
        keys = self.directory / "pki"
        certificate, key = self._server
        admin_certificate, admin_key = self._admin
        service_accounts = keys / "service-accounts.key"
        if not service_accounts.exists():
            new_key(service_accounts)
        self.apiserver.start(
            [
                binaries.path("kube-apiserver"),
                f"--bind-address={self._address}",
                f"--advertise-address={self._address}",
                "--endpoint-reconciler-type=none",  # loopback may not be an endpoint
                f"--secure-port={self._ports['apiserver']}",
                f"--etcd-servers=https://{_LOOPBACK}:{self._ports['etcd']}",
                f"--etcd-cafile={self.authority.certificate}",
                f"--etcd-certfile={certificate}",
                f"--etcd-keyfile={key}",
                f"--tls-cert-file={certificate}",
                f"--tls-private-key-file={key}",
                f"--client-ca-file={self.authority.certificate}",
                f"--service-account-key-file={service_accounts}",
                f"--service-account-signing-key-file={service_accounts}",
                f"--service-account-issuer={self.url}",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                f"--kubelet-client-certificate={admin_certificate}",
                f"--kubelet-client-key={admin_key}",
                f"--kubelet-certificate-authority={self.authority.certificate}",
                "--kubelet-preferred-address-types=InternalIP",
                "--allow-privileged=true",
                "--profiling=false",
            ],
            detached=self._detached,
        )
        self.apiserver.wait_until(self._ready, seconds=60)

    def kubeconfig_for(self, user: str, *, groups: Sequence[str] = (), name: str = "") -> Path:
        """A kubeconfig for `user`, who may do only what RBAC grants to them or to `groups`."""
        name = name or user.replace(":", "-").replace("/", "-")
        certificate, key = self.authority.issue(name, user=user, groups=groups)
        return self._write_kubeconfig(name, {"client-certificate": str(certificate), "client-key": str(key)})

    def kubeconfig_of(self, token: str, *, name: str) -> Path:
        """A kubeconfig for the owner of a bearer token, such as a service account."""
        return self._write_kubeconfig(name, {"token": token})

    def _write_kubeconfig(self, name: str, user: dict[str, str]) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "sandbox",
            "contexts": [{"name": "sandbox", "context": {"cluster": "sandbox", "user": name, "namespace": "default"}}],
            "clusters": [
                {
                    "name": "sandbox",
                    "cluster": {"server": self.url, "certificate-authority": str(self.authority.certificate)},
                }
            ],
            "users": [{"name": name, "user": user}],
        }
        path = self.directory / f"{name}.kubeconfig"
        path.write_text(json.dumps(config, indent=2))  # JSON is YAML
        path.chmod(0o600)
        return path

    def seen_by(self, user: str, *, groups: Sequence[str] = ()) -> KubeApi:
        """This server as `user` sees it: their kubectl."""
        theirs = copy.copy(self)
        theirs.kubeconfig = self.kubeconfig_for(user, groups=groups)
        return theirs

    def kubectl(self, *arguments: str | Path, stdin: str = "", kubeconfig: Path | None = None) -> str:
        """Run kubectl (by our kubeconfig, unless another is given); its output. Raises KubectlError."""
        words = [str(argument) for argument in arguments]
        done = subprocess.run(
            [
                binaries.path("kubectl"),
                f"--kubeconfig={kubeconfig or self.kubeconfig}",
                f"--cache-dir={self.directory / 'kubectl-cache'}",
                *words,
            ],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise KubectlError(words, done.stderr)
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get … -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, *objects: dict[str, Any]) -> None:
        """`kubectl apply` of objects given as dictionaries. Raises KubectlError."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def apply_crds(self, directory: Path) -> None:
        """Apply every CRD in `directory`, and return once the server serves them."""
        files = [f"--filename={file}" for file in directory.glob("vmbackup*.yaml")]  # not its kustomization
        self.kubectl("apply", *files)
        self.kubectl("wait", "--for=condition=Established", "--timeout=30s", *files)

    @property
    def _ports(self) -> dict[str, int]:
        return json.loads(self._ports_file.read_text())

    def _ready(self) -> bool:
        """The server is ready, and has created the namespace `default`, which takes a moment longer."""
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(*map(str, self._admin))
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            for path in ("/readyz", "/api/v1/namespaces/default"):
                direct.open(self.url + path, timeout=5).close()
        except (urllib.error.URLError, OSError):
            return False
        return True


def _free_ports(count: int) -> list[int]:
    """Free ports, below those that the kernel gives to outgoing connections (32768 and up)."""
    free: list[int] = []
    for port in random.sample(range(20000, 32768), 1000):
        with contextlib.suppress(OSError), socket.socket() as one:
            one.bind((_LOOPBACK, port))
            free.append(port)
        if len(free) == count:
            return free
    raise SandboxError("no free ports on loopback")
