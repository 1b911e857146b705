"""Nodes and pods as the API server would show them: there is no kubelet here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count

from sandbox.kube import KubeApi

NAMESPACE = "vmbackup-system"
_numbers = count(1)


@dataclass(frozen=True)
class AgentPod:
    """The pod of an agent, on a node."""

    kube: KubeApi
    node: str
    name: str

    @property
    def path(self) -> str:
        return f"{NAMESPACE}/{self.name}"

    def becomes(self, *, ready: bool) -> None:
        conditions = [{"type": "Ready", "status": str(ready)}]
        _status(self.kube, f"pod/{self.name}", {"phase": "Running", "conditions": conditions}, "-n", NAMESPACE)


def remove(pod: AgentPod) -> None:
    """The pod and its node."""
    pod.kube.kubectl("delete", "pod", "-n", NAMESPACE, pod.name, "--force")
    pod.kube.kubectl("delete", "node", pod.node)


def add_node(kube: KubeApi, name: str, *, ready: bool) -> None:
    labels = {"vmbackup.dev/hypervisor": "true"}
    kube.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
    condition = {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-01-01T00:00:00Z"}
    _status(kube, f"node/{name}", {"conditions": [condition]})


def add_agent_pod(kube: KubeApi, node: str) -> AgentPod:
    pod = AgentPod(kube, node, f"vmbackup-agent-{next(_numbers)}")
    labels = {"app.kubernetes.io/name": "vmbackup", "app.kubernetes.io/component": "agent"}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": NAMESPACE}}
    kube.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        account,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": NAMESPACE, "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "agent", "image": "vmbackup"}]},
        },
    )
    pod.becomes(ready=True)
    return pod


def _status(kube: KubeApi, what: str, status: dict[str, object], *words: str) -> None:
    kube.kubectl("patch", what, *words, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
