"""One consistent observation of a domain: libvirt and the file system, under one domain id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os.path import realpath
from pathlib import Path
from typing import TypeVar

from vmbackup.api.status import Reason
from vmbackup.errors import Cause, TransientError, VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import BlockJob, Guest
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.imaging.image import qcow_state
from vmbackup.imaging.locks import has_writer, is_locked
from vmbackup.imaging.merge import is_unwritten
from vmbackup.protocol.decide import needs_truth
from vmbackup.protocol.record import Copy, DiskRecord, Guard, Image, Record, Snapshot
from vmbackup.protocol.terms import DiskSeen, Mirror, Observation, OverlayFile, Power
from vmbackup.reconcile.admission import overlay_space as room
from vmbackup.reconcile.state.clock import boot_id, boottime, may_be_in_flight

Answer = TypeVar("Answer")

_ATTEMPTS = 5


@dataclass(frozen=True)
class View:
    """An observation, and the block jobs by target, which are for people: decide() does not use them."""

    seen: Observation
    jobs: dict[str, BlockJob]


@dataclass
class Observer:
    """Observes one domain. `merging`, `held`: the targets whose overlays reconcile.merging works on, or holds."""

    hypervisor: Hypervisor
    guest: Guest
    thaw_after: float = 0.0
    config_failing_until: float = 0.0  # CLOCK_BOOTTIME, seconds
    merging: set[str] = field(default_factory=set[str])
    held: set[str] = field(default_factory=set[str])

    def observe(self, record: Record, *, doubt: bool) -> View:
        """Observe everything that decide() needs. Raises TransientError while libvirtd is away or the state changes."""
        for _ in range(_ATTEMPTS):
            power, domain_id = self._power()
            view = self._look(record, power)
            if self._power() == (power, domain_id):
                view = self._with_truth(record, view, doubt=doubt)
                if not any(disk.astray for disk in view.seen.disks):
                    return view
                again = {disk.target for disk in self._look(record, power).seen.disks if disk.astray}
                if self._power() == (power, domain_id):
                    return _astray_only(view, again)
        raise TransientError(f"domain {record.domain} keeps changing its state", reason="StateChanged")

    def _power(self) -> tuple[Power, int | None]:
        try:
            state, domain_id = self.guest.state()
        except VMBackupError as error:
            if error.reason != Cause.DOMAIN_NOT_FOUND:
                raise
            return Power.OFF, None  # a transient domain that stopped, or one that was undefined
        return state, domain_id

    def _look(self, record: Record, power: Power) -> View:
        on = power is not Power.OFF
        live = _by_target(self.guest.live_xml() if on else None)
        persistent_xml = self._if_defined(self.guest.persistent_xml, otherwise=None)
        persistent = _by_target(persistent_xml)
        jobs: dict[str, BlockJob] = {}
        disks: list[DiskSeen] = []
        for disk in record.disks:
            job = self.guest.block_job(disk.target) if on and disk.target in live else None
            if job is not None:
                jobs[disk.target] = job
            seen = DiskSeen(
                target=disk.target,
                live=_image(disk, live.get(disk.target)) if on else None,
                persistent=_image(disk, persistent.get(disk.target)) if persistent_xml else None,
                overlay=self._overlay(disk),
                base_changed=_base_changed(disk),
            )
            seen = _with_job(seen, disk.base, live.get(disk.target), job)
            # A guest that somebody else has paused may have been saved or migrated: QEMU then holds no lock at all.
            locks = power is Power.RUNNING or (power is Power.PAUSED and record.guard is Guard.OURS)
            disks.append(replace(seen, astray=locks and _is_astray(disk, seen, live.get(disk.target))))
        copying = record.snapshot is Snapshot.DONE and record.copy is Copy.OPEN
        defined_off = persistent_xml is not None and not on
        now = boottime()
        observation = Observation(
            power=power,
            disks=tuple(disks),
            call_in_flight=self._call_in_flight(record, on=on),
            migrating=on and self.guest.migrating(),
            saved=defined_off and self._if_defined(self.guest.has_saved_state, otherwise=False),
            migrated=defined_off and self._migrated(record),
            config_failing=now < self.config_failing_until,
            thaw_after=self.thaw_after,
            room_low=room.low(record) if on and copying else "",
            now=now,
        )
        return View(observation, jobs)

    def _overlay(self, disk: DiskRecord) -> OverlayFile | None:
        path = Path(disk.overlay)
        try:
            file = qcow_state(path)
        except VMBackupError:  # it cannot be inspected: assume the worst, so that nothing is unlinked
            return OverlayFile(locked=True, empty=False)
        if file is None:
            return None
        held = disk.target in self.held
        return OverlayFile(
            locked=file.locked and not held and disk.target not in self.merging,
            empty=bool(file.empty),
            merged=bool(disk.merged) and is_unwritten(path, disk.merged),
            held=held,
            holds_snapshot=file.holds_snapshot,
        )

    def _migrated(self, record: Record) -> bool:
        """Whether it was migrated away. If libvirtd has restarted and does not know, the journal does."""
        known = self._if_defined(self.guest.was_migrated, otherwise=False)
        return record.copy_reason == Reason.DOMAIN_MIGRATED if known is None else known

    def _if_defined(self, ask: Callable[[], Answer], *, otherwise: Answer) -> Answer:
        try:
            return ask()
        except VMBackupError as error:
            if error.reason != Cause.DOMAIN_NOT_FOUND:
                raise
            return otherwise

    def _call_in_flight(self, record: Record, *, on: bool) -> bool:
        return may_be_in_flight(
            record.call,
            boot=boot_id(),
            now=boottime(),
            answering_since=self.hypervisor.answering_since,
            control_idle=not on or record.call is None or self.guest.control_idle(),
        )

    def _with_truth(self, record: Record, view: View, *, doubt: bool) -> View:
        seen = view.seen
        if seen.call_in_flight or not needs_truth(record, seen, doubt=doubt):
            return view
        written = self.guest.written_images()
        disks = tuple(
            replace(disk, written=_named(record.disk(disk.target), written.get(disk.target))) for disk in seen.disks
        )
        return replace(view, seen=replace(seen, disks=disks))


def _by_target(xml: str | None) -> dict[str, chain.Disk]:
    return {disk.target: disk for disk in chain.disks(xml)} if xml else {}


def _named(disk: DiskRecord, path: str | None) -> Image:
    return {disk.base: Image.BASE, disk.overlay: Image.OVERLAY}.get(path or "", Image.OTHER)


def _image(disk: DiskRecord, found: chain.Disk | None) -> Image:
    return _named(disk, found.source if found else None)


def _base_changed(disk: DiskRecord) -> bool:
    """Whether base was replaced, removed or truncated. Nothing may change it while there is an overlay."""
    if not disk.base_inode:
        return False
    try:
        status = Path(disk.base).stat()
    except FileNotFoundError:
        return True
    except OSError:  # it cannot be inspected now, which proves nothing
        return False
    return status.st_ino != disk.base_inode or status.st_size < disk.base_bytes


def _astray_only(view: View, again: set[str]) -> View:
    """The view in which a disk is astray only if that was seen twice, with QEMU's answer in between: it is alive."""
    disks = tuple(replace(disk, astray=disk.astray and disk.target in again) for disk in view.seen.disks)
    return replace(view, seen=replace(view.seen, disks=disks))


def _is_astray(disk: DiskRecord, seen: DiskSeen, live: chain.Disk | None) -> bool:
    """Whether QEMU, while on, has another file open than base: then its locks are not on base.

    QEMU opens base by its name at the snapshot, at the start of a commit and at the pivot (measured on 7.2), and keeps
    the file that had the name at that moment.
    """
    if not disk.base_locked or seen.base_changed or seen.live not in (Image.BASE, Image.OVERLAY):
        return False
    if seen.live is Image.OVERLAY and not (live and live.chain and _named(disk, live.chain[0].path) is Image.BASE):
        return False  # QEMU does not use base at all: somebody has merged it into the overlay (virsh blockpull)
    writes = seen.live is Image.BASE or seen.job
    try:
        return not (has_writer if writes else is_locked)(Path(disk.base))
    except VMBackupError:  # it cannot be inspected now, which proves nothing
        return False


def _with_job(seen: DiskSeen, base: str, live: chain.Disk | None, job: BlockJob | None) -> DiskSeen:
    """A commit to base counts as ours, even if somebody else started it. Any other job that involves base is foreign,
    and so is a commit to an image below base.
    """
    elsewhere = live is not None and live.mirror_to is not None and realpath(live.mirror_to) != realpath(base)
    ours = job is not None and job.kind == "active-commit" and not elsewhere and seen.live is not Image.BASE
    return replace(
        seen,
        mirror=live.mirror if live and not elsewhere else Mirror.NONE,
        job=ours,
        job_at_end=job is not None and ours and job.current == job.end > 0,
        foreign_job=(job is not None and not ours) or (live is not None and live.foreign_job),
    )
