"""Overlays of a guest that is off, merged or compared with their base in the background (spec.commit.offline, pivots).

QEMU's locks refuse a guest that starts meanwhile. So all other work is done first, and at the end the images are
unlocked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vmbackup.errors import VMBackupError
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import reading
from vmbackup.imaging.merge import HeldOverlay, merge, same_where_written, stamp_of
from vmbackup.protocol.record import DiskRecord
from vmbackup.protocol.terms import Action
from vmbackup.reconcile.background.transfer import Transfer
from vmbackup.reconcile.observe import Observer


def compare(disk: DiskRecord, control: CopyControl) -> str:
    """The stamp of an overlay that holds nothing which its base lacks; empty if it does. TransientError if in use.

    No guest can start on either meanwhile: what it wrote would be taken for a difference, and quarantined for good.
    Raises Cancelled.
    """
    overlay, base = Path(disk.overlay), Path(disk.base)
    with reading(overlay, control), reading(base, control):
        return stamp_of(overlay) if same_where_written(overlay, base, disk.format, control) else ""


class Merging:
    """Merges one overlay at a time, and keeps the lock of a merged one until it is released: the guest cannot start."""

    def __init__(self, observer: Observer, wake: Callable[[], None]) -> None:
        self._observer = observer
        self._wake = wake
        self._merge: Transfer[HeldOverlay] | None = None
        self._compare: Transfer[str] | None = None
        self._compares: Action | None = None
        self._held: list[HeldOverlay] = []
        self._target = ""  # the disk that is worked on

    @property
    def target(self) -> str:
        """The disk being merged."""
        return self._target if self._merge is not None else ""

    def merge(self, disk: DiskRecord, bandwidth: int | None) -> str | None:
        """Start merging, or see how far it is: the stamp of the overlay once it is merged and held, else None.

        Raises the errors of imaging.merge.
        """
        if self._merge is None:
            self.let_go()
            overlay, base = Path(disk.overlay), Path(disk.base)
            self._begin(disk)
            self._merge = Transfer(
                lambda control: merge(overlay, base, disk.format, bandwidth, control),
                CopyControl(),
                self._wake,
                f"merge-{disk.target}",
            )
        if not self._merge.ended:
            return None
        target, merged = self._target, self._merge
        self._merge = None
        self._end()
        held = merged.result()
        self._held.append(held)
        self._observer.held.add(target)
        return held.stamp

    def compare(self, disk: DiskRecord, action: Action) -> str | None:
        """Start comparing, or see how far it is: None while it runs, else as `compare`, whose errors it raises.

        A comparison begun for another action, when P named the other image, is discarded.
        """
        if self._compare is None or self._compares != action:
            self.let_go()
            self._begin(disk)
            name = f"compare-{disk.target}"
            self._compare = Transfer(lambda control: compare(disk, control), CopyControl(), self._wake, name)
            self._compares = action
        if not self._compare.ended:
            return None
        compared, self._compare = self._compare, None
        self._end()
        return compared.result()

    def make_way(self, *, keep_merged: bool, keep_comparison: bool) -> None:
        """Release the overlays that the next step does not need: a guest may start on them again."""
        if not (keep_merged if self._compare is None else keep_comparison):
            self.let_go()

    def let_go(self) -> None:
        """End running work, and release the merged overlays: guests may start on them."""
        if self._compare is not None:
            self._compare.cancel()
        if self._merge is not None:
            self._merge.cancel()
            if self._merge.ended:
                with suppress(VMBackupError):
                    self._held.append(self._merge.result())
        self._compare = self._merge = None
        self._end()
        self._observer.held.clear()
        while self._held:
            self._held.pop().let_go()

    def _begin(self, disk: DiskRecord) -> None:
        self._target = disk.target
        self._observer.merging.add(disk.target)  # before its image is locked

    def _end(self) -> None:
        self._target = ""
        self._observer.merging.clear()
