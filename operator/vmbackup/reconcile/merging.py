"""Overlays of a guest that is off, merged in the background (spec.commit.offline)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vmbackup.errors import VMBackupError
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import reading
from vmbackup.imaging.merge import HeldOverlay, merge, same_where_written, stamp_of
from vmbackup.reconcile.observe import Observer
from vmbackup.reconcile.record import DiskRecord
from vmbackup.reconcile.terms import Do
from vmbackup.reconcile.transfer import Transfer

# What is done between the merge and the end of the overlay: from the one to the other no guest may start on it.
HOLDING = (Do.MERGE_OFFLINE, Do.REDEFINE, Do.SYNC_CONFIG, Do.REMOVE_OVERLAY)


def compare(disk: DiskRecord) -> str:
    """The stamp of an overlay that holds nothing which its base lacks; empty if it does. TransientError if in use.

    No guest can start on either meanwhile: what it wrote would be taken for a difference, and quarantined for good.
    """
    overlay, base, control = Path(disk.overlay), Path(disk.base), CopyControl()
    with reading(overlay, control), reading(base, control):
        return stamp_of(overlay) if same_where_written(overlay, base, disk.format, control) else ""


class Merging:
    """Merges one overlay at a time, and then holds it against every start until it is let go."""

    def __init__(self, observer: Observer, wake: Callable[[], None]) -> None:
        self._observer = observer
        self._wake = wake
        self._transfer: Transfer[HeldOverlay] | None = None
        self._held: list[HeldOverlay] = []
        self.target = ""  # the disk being merged

    def merge(self, disk: DiskRecord, bandwidth: int | None) -> str | None:
        """Start merging, or see how far it is: the stamp of the overlay once it is merged and held, else None.

        Raises the errors of imaging.merge.
        """
        if self._transfer is None:
            self.let_go()
            overlay, base = Path(disk.overlay), Path(disk.base)
            self._transfer = Transfer(
                lambda control: merge(overlay, base, disk.format, bandwidth, control),
                CopyControl(),
                self._wake,
                f"merge-{disk.target}",
            )
            self.target = disk.target
            self._observer.merging.add(disk.target)
        if not self._transfer.ended:
            return None
        transfer, self._transfer = self._transfer, None
        target, self.target = self.target, ""
        self._observer.merging.clear()
        held = transfer.result()
        self._held.append(held)
        self._observer.held.add(target)
        return held.stamp

    def let_go(self) -> None:
        """End a merge that runs, and let guests start on what was merged."""
        if self._transfer is not None:
            self._transfer.cancel()
            if self._transfer.ended:
                with suppress(VMBackupError):
                    self._held.append(self._transfer.result())
            self._transfer, self.target = None, ""
        self._observer.merging.clear()
        self._observer.held.clear()
        while self._held:
            self._held.pop().let_go()
