"""The shared environment of all backups of one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vmbackup.backoff import Backoff
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Record
from vmbackup.reconcile.state import journal as journals
from vmbackup.reconcile.state.domain_lock import DIRECTORY
from vmbackup.reconcile.telling.listener import NodeMetrics, Reporter


@dataclass(frozen=True)
class Node:
    """The shared environment of all backups of a node. `reporter_of` finds the reporter of a backup not run here."""

    hypervisor: Hypervisor
    state_dir: Path
    metrics: NodeMetrics
    overlay_dir: Path | None = None
    image_roots: tuple[Path, ...] = ()
    backoff: Backoff = field(default_factory=Backoff)
    lock_dir: Path = DIRECTORY
    reporter_of: Callable[[Record], Reporter | None] = field(default=lambda _record: None)

    def records(self) -> list[Record]:
        """The records of all backups that have a journal here."""
        return list(journals.records(self.state_dir))
