"""Whether the agent of a node is alive, by what the API server shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from kubectl_vmbackup.backup import every
from kubectl_vmbackup.kubectl import Kubectl, KubectlError, Object, condition
from vmbackup.api.resource import moment

AGENT_LABELS = "app.kubernetes.io/name=vmbackup,app.kubernetes.io/component=agent"


@dataclass(frozen=True)
class Signs:
    """What is seen of a node and of its agent. None: it could not be looked at."""

    name: str
    exists: bool | None  # a Node object
    ready: bool | None  # as the Node object says, and since when
    since: datetime | None
    pods: Sequence[Object] | None  # of agents, on it
    last_write: datetime | None  # of its agent, to the status of any VMBackup

    @property
    def agent_ready(self) -> str:
        """The name of a pod of an agent there that is ready; ''."""
        return next((_path(pod) for pod in self.pods or () if condition(pod, "Ready").get("status") == "True"), "")

    @property
    def agent_pod(self) -> str:
        """The name of a pod of an agent there; ''."""
        return next((_path(pod) for pod in self.pods or ()), "")


def look(kubectl: Kubectl, name: str) -> Signs:
    """Look at a node. What may not be looked at is left open; raises KubectlError where there is no API server."""
    exists = ready = since = pods = last = None
    try:
        node = kubectl.find("nodes", name)
        exists = node is not None
        if node is not None:
            found = condition(node, "Ready")
            ready, since = found.get("status") == "True", moment(found.get("lastTransitionTime"))
    except KubectlError as error:
        _only_forbidden(error)
    try:
        pods = kubectl.items("pods", "-A", "-l", AGENT_LABELS, f"--field-selector=spec.nodeName={name}")
    except KubectlError as error:
        _only_forbidden(error)
    try:
        backups = every(kubectl, "-A", f"--field-selector=spec.nodeName={name}")
        last = max((backup.last_write for backup in backups if backup.last_write), default=None)
    except KubectlError as error:
        _only_forbidden(error)
    return Signs(name, exists, ready, since, pods, last)


def _only_forbidden(error: KubectlError) -> None:
    if not error.forbidden:
        raise error


def _path(pod: Object) -> str:
    return f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
