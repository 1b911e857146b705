"""What manifests/ installs: rendered, and on an API server of its own, with agents' tokens as their pods have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sandbox.kube import KubeApi, KubectlError

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
NAMESPACE = "vmbackup-system"
AGENT = "vmbackup-agent"  # the name of all that is the agents'
SERVICE_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{AGENT}"

Objects = Mapping[tuple[str, str], dict[str, Any]]
"""Objects by kind and name."""


def rendered(kube: KubeApi, directory: Path = MANIFESTS) -> Objects:
    """What `kubectl kustomize` makes of a directory."""
    return by_name(kube.kubectl("kustomize", directory))


def by_name(text: str) -> Objects:
    """The objects of a YAML stream."""
    objects = [each for each in yaml.safe_load_all(text) if each]
    named = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(named) == len(objects), "two objects of the same kind and name"
    return named


class Pods:
    """Agents' pods on nodes, as the DaemonSet's controller makes them, and their tokens. Nothing runs in them."""

    def __init__(self, kube: KubeApi) -> None:
        self.kube = kube
        self._template = rendered(kube)["DaemonSet", AGENT]["spec"]["template"]

    def make(self, node: str, *, namespace: str = NAMESPACE, dry_run: bool = False) -> str:
        """The pod of an agent on this node; what the API server warns of."""
        metadata = {"name": f"{AGENT}-{node}", "namespace": namespace, "labels": self._template["metadata"]["labels"]}
        spec = self._template["spec"] | {"nodeName": node}
        if namespace != NAMESPACE:
            spec = {key: value for key, value in spec.items() if not key.startswith("serviceAccount")}
        self.kube.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}})
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        flags = ["--dry-run=server"] if dry_run else []
        return self.kube.kubectl("create", "-f", "-", "--output=yaml", *flags, stdin=json.dumps(pod))

    def token(self, node: str) -> str:
        """The files mounted into the pod of this node's agent, which could be stolen there."""
        name = f"{AGENT}-{node}"
        try:
            uid = self.kube.get("pod", name, "-n", NAMESPACE)["metadata"]["uid"]
        except KubectlError:
            self.make(node)
            uid = self.kube.get("pod", name, "-n", NAMESPACE)["metadata"]["uid"]
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={name}", f"--bound-object-uid={uid}"]
        return self.kube.kubectl("create", "token", AGENT, "-n", NAMESPACE, *bound).strip()

    def kubeconfig(self, node: str) -> Path:
        """The kubeconfig of a user with that token."""
        return self.kube.kubeconfig_of(self.token(node), name=f"token-of-{node}")
