"""Signs of life of a node and its agent on the API server."""

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
    """Facts about a node and its agent. None: no permission to see it."""

    name: str
    exists: bool | None  # a Node object
    ready: bool | None  # the condition Ready of the Node, and its lastTransitionTime
    since: datetime | None
    pods: Sequence[Object] | None  # of agents, on it
    last_write: datetime | None  # of its agent, to the status of any VMBackup

    @property
    def agent_ready(self) -> str:
        """The ready agent pod of the node; '' if there is none."""
        return next((_path(pod) for pod in self.pods or () if condition(pod, "Ready").get("status") == "True"), "")

    @property
    def agent_pod(self) -> str:
        """An agent pod of the node, ready or not; '' if there is none."""
        return next((_path(pod) for pod in self.pods or ()), "")


def look(kubectl: Kubectl, name: str) -> Signs:
    """Read the facts about a node. Those without permission are None. Raises KubectlError for all other errors."""
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
