"""What all VMBackups of a node share, as the agent sees them."""

from __future__ import annotations

from dataclasses import dataclass

from vmbackup.node.policies import Policies
from vmbackup.node.queue import Queue
from vmbackup.node.threads import Threads
from vmbackup.reconcile.backup import Node
from vmbackup.report.cluster import Cluster
from vmbackup.report.events import Events


@dataclass(frozen=True)
class Premises:
    """The hypervisor and its backups, the API server, its policies, the queue, and threads for what blocks."""

    node: Node
    cluster: Cluster
    events: Events
    policies: Policies
    queue: Queue
    threads: Threads
