"""A Kubernetes node on this machine, beside the API server: containerd, kubelet, controller-manager and scheduler.

Works only inside sandbox.isolated: it uses the directories and addresses that a node uses on a machine of its own. Pods
get addresses from a bridge, by Debian's CNI plugins. There is no kube-proxy: the only service, the API server's, is an
address of the node itself. There is no DNS.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

from sandbox import binaries, isolated
from sandbox.kube import KubeApi
from sandbox.processes import Program, SandboxError

ADDRESS = "10.0.0.1"
SERVICE_ADDRESS = "10.96.0.1"  # of the service `kubernetes`: the first of the range that KubeApi hands out
POD_NETWORK = "10.244.0.0/24"

_CNI_PLUGINS = "/usr/lib/cni"
_CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
_VOLUME_PLUGINS = "/var/lib/kubelet/volume-plugins"
_PAUSE = "pause:sandbox"
_START_SECONDS = 60

# restrict_oom_score_adj: where we may not lower it, no pod would start.
_CONTAINERD = f"""
version = 2
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{_PAUSE}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_CNI_PLUGINS}"
"""
_NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni0",
            "isGateway": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": POD_NETWORK}]], "routes": [{"dst": "0.0.0.0/0"}]},
        }
    ],
}


class Node:
    """A cluster with one node. A context manager; its API server is `kube`.

    `name` is the node's. It is Ready once entered; images that are loaded can be run with imagePullPolicy Never.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._directory = isolated.directory() / "node"
        self._directory.mkdir()
        self.kube = KubeApi(self._directory / "kube", address=SERVICE_ADDRESS, port=443)
        self.containerd = Program("containerd", self._directory)
        self.kubelet = Program("kubelet", self._directory)
        self._controllers = Program("kube-controller-manager", self._directory)
        self._scheduler = Program("kube-scheduler", self._directory)

    def __enter__(self) -> Node:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End its programs. Containers, mounts and everything else end with the isolated command."""
        for program in (self.kubelet, self._scheduler, self._controllers, self.containerd):
            program.stop(seconds=5)
        self.kube.stop()

    def load(self, archive: Path) -> None:
        """Import an image from a docker or OCI archive."""
        _run("ctr", "--namespace=k8s.io", "images", "import", str(archive))

    def _start(self) -> None:
        for address in (ADDRESS, SERVICE_ADDRESS):
            _run("ip", "address", "add", f"{address}/32", "dev", "lo")
        self._start_containerd()
        self.kube.start()
        self._start_control_plane()
        self._start_kubelet()
        self.kubelet.wait_until(self._ready, seconds=_START_SECONDS)

    def _ready(self) -> bool:
        status = '{.status.conditions[?(@.type=="Ready")].status}'
        return self.kube.kubectl("get", "node", self.name, "--ignore-not-found", "-o", f"jsonpath={status}") == "True"

    def _start_containerd(self) -> None:
        network = Path("/etc/cni/net.d/10-pods.conflist")
        network.parent.mkdir(parents=True)
        network.write_text(json.dumps(_NETWORK))
        config = self._directory / "containerd.toml"
        config.write_text(_CONTAINERD)
        self.containerd.start([_program("containerd"), f"--config={config}"])
        self.containerd.wait_until(lambda: Path(_CONTAINERD_SOCKET).exists(), seconds=_START_SECONDS)
        pause = self._directory / "pause.tar"
        pause.write_bytes(_pause_image())
        self.load(pause)

    def _start_control_plane(self) -> None:
        keys = self._directory / "kube" / "pki"
        for program, user, port, more in (
            (
                self._controllers,
                "system:kube-controller-manager",
                10257,
                [
                    "--use-service-account-credentials",
                    f"--service-account-private-key-file={keys / 'service-accounts.key'}",
                    f"--root-ca-file={keys / 'ca.crt'}",
                    f"--cluster-signing-cert-file={keys / 'ca.crt'}",
                    f"--cluster-signing-key-file={keys / 'ca.key'}",
                    f"--flex-volume-plugin-dir={_VOLUME_PLUGINS}",
                ],
            ),
            (self._scheduler, "system:kube-scheduler", 10259, []),
        ):
            kubeconfig = self.kube.kubeconfig_for(user)
            common = [f"--kubeconfig={kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1"]
            program.start([binaries.path(program.name), *common, f"--secure-port={port}", *more])

    def _start_kubelet(self) -> None:
        kubeconfig = self.kube.kubeconfig_for(f"system:node:{self.name}", groups=["system:nodes"])
        certificate, key = self.kube.authority.issue("kubelet", user="kubelet", addresses=[f"IP:{ADDRESS}"])
        config = self._directory / "kubelet.yaml"
        config.write_text(json.dumps(self._kubelet_configuration(certificate, key)))
        self.kubelet.start(
            [
                binaries.path("kubelet"),
                f"--config={config}",
                f"--kubeconfig={kubeconfig}",
                f"--hostname-override={self.name}",
                f"--node-ip={ADDRESS}",
            ]
        )

    def _kubelet_configuration(self, certificate: Path, key: Path) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{_CONTAINERD_SOCKET}",
            "address": ADDRESS,
            "tlsCertFile": str(certificate),
            "tlsPrivateKeyFile": str(key),
            "authentication": {"x509": {"clientCAFile": str(self.kube.authority.certificate)}},
            "authorization": {"mode": "Webhook"},
            "failSwapOn": False,
            "failCgroupV1": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": isolated.cgroup(),
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "1Mi"},
            "imageGCHighThresholdPercent": 100,
            "makeIPTablesUtilChains": False,
            "resolvConf": "",
            "volumePluginDir": _VOLUME_PLUGINS,
        }


def _pause_image() -> bytes:
    """A docker archive with the container that holds a pod's namespaces: busybox, asleep."""
    busybox = _program("busybox")
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as files:
        files.add(busybox, "busybox")
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/busybox", "sleep", "2147483647"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    index = json.dumps([{"Config": "config.json", "RepoTags": [_PAUSE], "Layers": ["layer.tar"]}]).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as image:
        for name, content in (("layer.tar", layer.getvalue()), ("config.json", config), ("manifest.json", index)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            image.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def _program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if not found:
        raise SandboxError(f"{name} is not installed: `make e2e` installs what a node needs")
    return found


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SandboxError(f"{' '.join(command)}: {done.stderr.strip()}")
