"""Objects that all VMBackups of a node share."""

from __future__ import annotations

from dataclasses import dataclass

from vmbackup.agent.policies import Policies
from vmbackup.agent.runtime.queue import Queue
from vmbackup.agent.runtime.threads import Threads
from vmbackup.cluster.client import Cluster
from vmbackup.cluster.events import Events
from vmbackup.reconcile.node import Node


@dataclass(frozen=True)
class Context:
    """The hypervisor and its backups, the API server, its policies, the queue, and threads for blocking calls."""

    node: Node
    cluster: Cluster
    events: Events
    policies: Policies
    queue: Queue
    threads: Threads
