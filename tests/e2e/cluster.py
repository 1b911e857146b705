"""What the manifests install on the one node of a cluster, and what the tests look at there."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import image
from sandbox.demo.proof import acknowledged, prove_copy
from sandbox.guest import Guest
from sandbox.host import IMAGES, URI, HostLibvirtd
from sandbox.kube import KubeApi, KubectlError
from sandbox.node import Node
from sandbox.oracle import Bounds
from tests.support.agents import VMBackup, manifest
from tests.support.domains import wait_until

NODE = "node-a"
DOMAIN = "web-01"
STORE = "local"  # as manifests/samples/store.yaml has it
SECONDS = 120  # for anything to happen on a loaded machine

MANIFESTS = Path(__file__).parent.parent.parent / "manifests"
_OURS = "--namespace=vmbackup-system"
_AGENT = "--selector=app.kubernetes.io/component=agent"
_DAEMONSET = "daemonset/vmbackup-agent"


@dataclass(frozen=True)
class Cluster:
    """A node that is a hypervisor, its guest, and the agent there."""

    node: Node
    host: HostLibvirtd
    guest: Guest

    @property
    def kube(self) -> KubeApi:
        """As its administrator sees it."""
        return self.node.kube

    def install(self) -> None:
        """What docs/install.md says, and a store."""
        self.node.load(image.archive())
        self.kube.kubectl("apply", "-k", MANIFESTS)
        self.label("=true")
        self.kube.kubectl("apply", "-f", MANIFESTS / "samples" / "store.yaml")
        self.wait_for_rollout()

    def uninstall(self) -> None:
        self.kube.kubectl("delete", "-k", MANIFESTS, f"--timeout={SECONDS}s")

    def user(self, name: str, *, namespace: str) -> KubeApi:
        """The server as a user sees it who may `edit` a namespace of their own, and nothing else."""
        self.kube.kubectl("create", "namespace", namespace)
        binding = [f"--namespace={namespace}", "--clusterrole=edit", f"--user={name}"]
        self.kube.kubectl("create", "rolebinding", name, *binding)
        theirs = self.kube.seen_by(name)
        wait_until(lambda: _may_create(theirs, namespace), f"{name} may create VMBackups", SECONDS)
        return theirs

    # The agent

    def pod(self) -> dict[str, Any]:
        """The one pod of the agent that is not ending."""
        (pod,) = [pod for pod in self.pods() if "deletionTimestamp" not in pod["metadata"]]
        return pod

    def pod_name(self) -> str:
        return self.pod()["metadata"]["name"]

    def pods(self) -> list[dict[str, Any]]:
        """Every pod of an agent, also one that is ending."""
        return self.kube.get("pods", _OURS, _AGENT)["items"]

    def wanted_pods(self) -> int | None:
        """On how many nodes its controller wants an agent to be; None before it has looked."""
        daemonset = self.kube.get(_DAEMONSET, _OURS)
        seen = daemonset["status"].get("observedGeneration") == daemonset["metadata"]["generation"]
        return daemonset["status"]["desiredNumberScheduled"] if seen else None

    def label(self, text: str) -> None:
        """Set the label that says whether the node is a hypervisor, or with `-` take it away."""
        self.kube.kubectl("label", "node", NODE, f"vmbackup.dev/hypervisor{text}")

    def roll(self) -> None:
        """Replace the pod, as an upgrade does."""
        self.kube.kubectl("rollout", "restart", _DAEMONSET, _OURS)
        self.wait_for_rollout()

    def wait_for_rollout(self) -> None:
        self.kube.kubectl("rollout", "status", _DAEMONSET, _OURS, f"--timeout={SECONDS}s")

    def logs(self) -> str:
        """What the agent's container has logged since its start."""
        return self.kube.kubectl("logs", _OURS, self.pod_name())

    def metrics(self) -> str:
        """What Prometheus is told by the pod."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{self.pod()['status']['podIP']}:9777/metrics", timeout=10) as answer:
            return answer.read().decode()

    def metrics_by_tls(self, authority: Path) -> str:
        """The same by TLS, as the component metrics-tls lets Prometheus ask."""
        name, address = "vmbackup-agent.vmbackup-system.svc", self.pod()["status"]["podIP"]
        flags = ["--silent", "--fail", "--noproxy", "*", "--cacert", authority, "--resolve", f"{name}:9777:{address}"]
        return subprocess.run(
            ["curl", *flags, f"https://{name}:9777/metrics"], check=True, capture_output=True, text=True
        ).stdout

    def stolen_token(self) -> Path:
        """A kubeconfig with the token that the kubelet has given to the pod, as root on the node finds it."""
        volumes = Path(f"/var/lib/kubelet/pods/{self.pod()['metadata']['uid']}/volumes/kubernetes.io~projected")
        (token,) = volumes.glob("*/token")
        config = json.loads(self.kube.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token.read_text()}
        kubeconfig = self.kube.directory / "stolen.kubeconfig"
        kubeconfig.write_text(json.dumps(config))
        return kubeconfig

    # Backups

    def back_up(self, user: KubeApi, name: str, namespace: str = "team-a", **spec: Any) -> VMBackup:
        """Apply a VMBackup of the guest, as that user; `spec` by the dotted paths of tests/support/manifests.py."""
        user.apply(manifest(name, NODE, STORE, DOMAIN, namespace, **spec))
        return VMBackup(user, name, namespace)

    @contextmanager
    def proven_backup(self, user: KubeApi, name: str, **spec: Any) -> Iterator[VMBackup]:
        """The same; at the end of the block it becomes Ready, and its copy and the guest are proven."""
        before = acknowledged(self.guest)
        made = self.back_up(user, name, **spec)
        wait_until(lambda: "snapshotTime" in made.status, "a snapshot", SECONDS)
        after = acknowledged(self.guest)
        yield made
        self.prove(made, Bounds.around(before, after))

    def prove(self, made: VMBackup, bounds: Bounds) -> None:
        """Wait until it is Ready, and prove its copy, and that the guest has lost nothing."""
        folder = Path(made.wait(seconds=SECONDS)["location"])
        assert len(list(prove_copy(folder, bounds))) > len(self.guest.disks)
        self.assert_home()

    def assert_home(self) -> None:
        """The guest is on its own images, no overlay is left, it never went back in time, and it writes on."""
        in_use = self.host.virsh("domblklist", DOMAIN).split()
        assert all(str(disk.path) in in_use for disk in self.guest.disks.values())
        assert not list(IMAGES.glob("*.vmb-*"))
        self.guest.assert_only_rising()
        self.guest.wait_for_more()

    @contextmanager
    def told_of_states(self) -> Iterator[int]:
        """A file descriptor that has a line for each change of the guest's state, as soon as libvirtd tells it."""
        command = ["stdbuf", "-oL", "virsh", f"--connect={URI}", "event", DOMAIN, "lifecycle", "--loop"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as virsh:
            assert virsh.stdout is not None
            try:
                yield virsh.stdout.fileno()
            finally:
                virsh.kill()

    def guest_runs(self) -> bool:
        return self.host.virsh("domstate", DOMAIN) == "running"

    def diagnosis(self) -> str:
        """All that may say why a test has failed."""
        parts: list[str] = []
        for command in (
            "get pods,vmbackups --all-namespaces --output=wide",
            f"describe pods {_OURS}",
            "events --all-namespaces",
            f"logs {_OURS} {_AGENT} --tail=100 --prefix",
            f"logs {_OURS} {_AGENT} --tail=50 --prefix --previous",
        ):
            with suppress(KubectlError):
                parts.append(f"$ kubectl {command}\n{self.kube.kubectl(*command.split())}")
        for program in (self.node.kubelet, self.node.containerd, self.host.program):
            parts.append(f"the end of {program.log}:\n{program.log_tail(40)}")
        return "\n\n".join(parts)


def agent_process() -> int | None:
    """The agent's process: number 1 of the namespace of its pod."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            numbers = next(line for line in status.read_text().splitlines() if line.startswith("NSpid:")).split()[1:]
            command = status.with_name("cmdline").read_text()
            if len(numbers) > 1 and numbers[-1] == "1" and "/vmbackup\0" in command:
                return int(numbers[0])
    return None


def _may_create(kube: KubeApi, namespace: str) -> bool:
    with suppress(KubectlError):
        return "yes" in kube.kubectl("auth", "can-i", "create", "vmbackups.vmbackup.dev", f"--namespace={namespace}")
    return False
