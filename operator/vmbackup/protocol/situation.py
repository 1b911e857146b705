"""The situation that the rules look at, and the parts that they share: settling P, READY, quarantine, the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vmbackup.api.backup import StallPolicy
from vmbackup.protocol import advice
from vmbackup.protocol.record import Copy, DiskRecord, Guard, Image, Record, Snapshot
from vmbackup.protocol.table import row
from vmbackup.protocol.terms import Action, DiskSeen, Do, Intent, Mirror, Observation, OverlayFile, Power, Unwanted


@dataclass(frozen=True)
class Case:
    """One disk: its record and its observation."""

    record: DiskRecord
    seen: DiskSeen

    @property
    def target(self) -> str:
        """The disk's target."""
        return self.seen.target

    @property
    def on_overlay(self) -> bool:
        """L=O."""
        return self.seen.live is Image.OVERLAY

    @property
    def overlay(self) -> OverlayFile | None:
        """O, if there is such a file."""
        return self.seen.overlay

    @property
    def empty(self) -> bool:
        """O holds nothing."""
        return self.overlay is not None and self.overlay.empty

    @property
    def holds_snapshot(self) -> bool:
        """O holds a snapshot of the user, which would go with O: O is neither merged nor removed."""
        return self.overlay is not None and self.overlay.holds_snapshot

    @property
    def done_with(self) -> bool:
        """Base, where P or L names it, holds all of O: it was pivoted, or merged while the guest was off."""
        return self.record.pivot_intended or (self.overlay is not None and self.overlay.merged)


@dataclass(frozen=True)
class Situation:
    """All that a rule may look at."""

    intent: Intent
    record: Record
    seen: Observation
    disks: tuple[Case, ...]

    @property
    def on_overlay(self) -> tuple[Case, ...]:
        """The disks with L=O."""
        return tuple(disk for disk in self.disks if disk.on_overlay)

    @property
    def undefined(self) -> bool:
        """The domain has no definition here: undefined, or migrated away with its definition, or transient."""
        return bool(self.disks) and all(disk.seen.persistent is None for disk in self.disks)

    @property
    def paused(self) -> bool:
        """The guest cannot write."""
        return self.seen.power in (Power.PAUSED, Power.IO_ERROR)

    @property
    def suspended_by_us(self) -> bool:
        """The guest is paused, and it is ours to resume."""
        return self.seen.power is Power.PAUSED and self.record.guard is Guard.OURS

    @property
    def snapshot_due(self) -> bool:
        """This backup still wants its snapshot, and nothing is in its way."""
        return (
            not self.on_overlay
            and self.record.snapshot in (Snapshot.NONE, Snapshot.INTENDED)
            and self.record.copy is Copy.OPEN
            and not self.intent.unwanted
            and not self.intent.leaving
        )

    @property
    def pivot_due(self) -> bool:
        """A disk is about to be pivoted."""
        if self.intent.leaving:
            return False
        return any(disk.record.pivot_intended and self.may_pivot(disk) for disk in self.on_overlay)

    @property
    def may_pause(self) -> bool:
        """The guest may be suspended so that a commit converges."""
        asked = self.intent.stall_policy is StallPolicy.PAUSE and self.intent.guarded
        return asked and not self.intent.leaving and not self.seen.config_failing

    @property
    def pausing(self) -> bool:
        """It is, or is about to be: until every commit that is under way has been pivoted, or the time is over."""
        in_time = self.record.guard is Guard.OURS and self.seen.now < self.record.pause_until
        return in_time and self.may_pause and any(self.under_way(disk) for disk in self.on_overlay)

    def throttling(self, disk: Case) -> bool:
        """The guest's writes to this disk may be slowed down so that its commit converges."""
        asked = self.intent.stall_policy is StallPolicy.THROTTLE and not self.intent.leaving
        return asked and disk.on_overlay and self.under_way(disk)

    def under_way(self, disk: Case) -> bool:
        """The job of an attempt to bring this disk home is running."""
        return disk.seen.job and not self.exhausted(disk) and self.seen.now >= disk.record.retry_at

    def may_pivot(self, disk: Case) -> bool:
        """The job may be pivoted, P can be settled, and the next attempt is due."""
        due = not self.exhausted(disk) and self.seen.now >= disk.record.retry_at
        right_file = not (disk.seen.base_changed or disk.seen.astray)
        return ready(disk) and due and not self.seen.config_failing and right_file

    def exhausted(self, disk: Case) -> bool:
        """No further attempt is made to bring this disk home."""
        return self.record.gave_up or disk.record.failures > self.intent.backoff_limit


Rule = Callable[[Situation], Action | None]
OURS = (Image.BASE, Image.OVERLAY)


def settle(situation: Situation, wanted: Iterable[tuple[Case, Image | None]]) -> Action | None:
    """R2: make P name these images, durably on disk. None if it does already.

    A disk without P (a transient domain) or with an image that is not ours (somebody else set it), is left unchanged.
    """
    pairs = [(disk, image) for disk, image in wanted if image and image in OURS and disk.seen.persistent in OURS]
    images = tuple((disk.target, image) for disk, image in pairs)
    if any(disk.seen.persistent is not image or not settled(disk, image) for disk, image in pairs):
        return Action(Do.REDEFINE, images=images)
    if not all(disk.record.settled is not None and disk.record.settled.durable for disk, _ in pairs):
        return Action(Do.SYNC_CONFIG, images=images)
    return None


def settled(disk: Case, image: Image) -> bool:
    """We have redefined P to name this image since the last switch of images; not necessarily durable yet."""
    return disk.record.settled is not None and disk.record.settled.image is image


def settle_live(situation: Situation) -> Action | None:
    """Settle P on L, all disks."""
    return settle(situation, ((disk, disk.seen.live) for disk in situation.disks))


def settle_if_possible(situation: Situation) -> Action | None:
    """Settle P on L, unless that has failed again and again: the guest does not wait for it."""
    return None if situation.seen.config_failing else settle_live(situation)


def ready(disk: Case) -> bool:
    """The job may be pivoted. R5: a job without `<mirror>` (libvirtd died starting it) may be tried at its end."""
    if disk.seen.mirror is Mirror.NONE:
        return disk.seen.job and disk.seen.job_at_end
    return disk.seen.mirror is Mirror.READY and disk.seen.job


def consistent(disk: Case) -> bool:
    """L=P=T, no overlay is left behind, and libvirt does not believe in a job that is gone."""
    return (
        disk.seen.live is disk.seen.truth
        and disk.seen.persistent in (None, Image.OTHER, disk.seen.live)
        and (disk.on_overlay or disk.overlay is None)
        and (disk.seen.job or disk.seen.mirror is Mirror.NONE)
        and not disk.seen.base_changed
        and not disk.seen.astray
    )


def quarantine(situation: Situation, reason: str) -> Action:
    """Quarantine the chain.

    First resume and thaw what we hold; report each reason once; then release a deleted VMBackup, or wait.
    """
    if situation.suspended_by_us:
        return settle_if_possible(situation) or Action(Do.RESUME)
    if situation.record.guard is not Guard.NONE:  # a guest that is paused from now on was paused by somebody else
        return Action(Do.CLEAR_GUARD)
    if action := thaw_guest(situation) or unthrottle(situation):
        return action
    if situation.record.quarantined != reason:  # the next step for a human who has begun to help
        return Action(Do.QUARANTINE, reason=reason)
    return release_deleted(situation) or Action(Do.WAIT, reason=reason, parked=True)


@row(
    "B was replaced, removed or truncated, and O is there",
    "quarantine; no merge and no pivot",
    "O fits its original base only: merging O into another file destroys both, and a pivot would put the "
    "guest on a file that is not its disk",
)
def spare_changed_base(s: Situation) -> Action | None:
    """Base is another file than the one below O: a copy of it is not the snapshot, and O must not be merged into it."""
    for disk in s.disks:
        if disk.seen.base_changed and (disk.on_overlay or disk.overlay is not None):
            return quarantine(s, advice.base_changed(disk.record))
    return None


@row(
    "QEMU has another file open than B, though by B's name",
    "quarantine; no merge, no pivot, no removal of O",
    "QEMU opens B by its name: it writes the file to which B's name led then, so B lacks what the guest wrote",
)
def spare_astray_base(s: Situation) -> Action | None:
    """QEMU opens base by its name: if that led to another file then, neither the overlay nor base may be touched.

    The overlay is no longer done with, whatever is seen after the next start of the guest: a human must compare.
    """
    for disk in s.disks:
        if not disk.seen.astray or snapshot_wanted(s):  # before the snapshot it is refused
            continue
        if disk.record.pivot_intended and not disk.on_overlay and not s.suspended_by_us:
            return Action(Do.CLEAR_PIVOT, disk.target)
        return quarantine(s, advice.written_astray(disk.record, on_base=not disk.on_overlay))
    return None


def while_a_snapshot_is_kept(s: Situation) -> Action | None:
    """Its user may keep it for days: neither the stored copy nor a deleted VMBackup waits for that.

    But the commits of the other disks come first: for them the guest may be suspended or throttled.
    """
    if s.pausing or any(s.under_way(disk) for disk in s.on_overlay):
        return None
    if s.record.copy is Copy.TAKEN and not s.intent.unwanted:
        return Action(Do.SHIP)
    return release_deleted(s)


def thaw_guest(s: Situation) -> Action | None:
    """Frozen by us: thaw. An agent that does not answer is asked again later, and blocks nothing."""
    due = s.record.frozen and s.seen.power is Power.RUNNING and s.seen.now >= s.seen.thaw_after
    return Action(Do.THAW) if due else None


@row(
    "throttled by us, and no attempt is under way",
    "restore the limits that were there before, also before a quarantine; if somebody else changed them, leave them",
    "a guest must not stay slow because of a backup that is over",
)
def unthrottle(s: Situation) -> Action | None:
    """The end of an attempt, however it ended: the guest writes as fast as before."""
    if s.suspended_by_us:
        return None
    for disk in s.disks:
        if disk.record.throttle is not None and not s.throttling(disk):
            return Action(Do.UNTHROTTLE, disk.target)
    return None


def release_deleted(situation: Situation) -> Action | None:
    """Deleted, and home is impossible for now: record the orphan on the node, then release the finalizer."""
    if not situation.intent.deleted:
        return None
    return thaw_pending(situation) or (Action(Do.RELEASE) if situation.record.orphan else Action(Do.RECORD_ORPHAN))


def thaw_pending(s: Situation) -> Action | None:
    """Frozen by us still: the guest agent is asked again before the end."""
    if s.seen.power is Power.OFF or not s.record.frozen:
        return None
    until = s.seen.thaw_after if s.seen.now < s.seen.thaw_after else None
    return Action(Do.WAIT, reason="the guest agent has not thawed the guest yet", until=until)


def snapshot_wanted(s: Situation) -> bool:
    """This backup has not taken its snapshot, has not failed, and was neither deleted nor cancelled."""
    waiting = (Snapshot.NONE, Snapshot.ADOPTED, Snapshot.INTENDED)
    return s.record.snapshot in waiting and s.record.copy is Copy.OPEN and not s.intent.unwanted


@row(
    "no disk is on O, no O is left",
    "complete the copy in the store (deleted or cancelled: the copy has failed), finish; deleted: release",
    "the finalizer is the promise that the chain is home",
)
def finish(s: Situation) -> Action | None:
    """Every disk is home (or nothing was ever begun)."""
    if s.record.guard is not Guard.NONE:
        return Action(Do.CLEAR_GUARD)
    if s.record.orphan:
        return Action(Do.CLEAR_ORPHAN)
    return end(s) or (Action(Do.RELEASE) if s.intent.deleted else None)


def fail_unwanted(unwanted: Unwanted) -> Action:
    """Deleted or cancelled: no copy is wanted any more."""
    return Action(Do.FAIL_BACKUP, reason=unwanted.message, cause=unwanted.reason)


def end(s: Situation) -> Action | None:
    """The copy is decided and shipped, then the backup is finished."""
    if s.intent.unwanted and s.record.copy in (Copy.OPEN, Copy.TAKEN):
        return fail_unwanted(s.intent.unwanted)
    if s.record.copy is Copy.OPEN:
        return Action(Do.FAIL_BACKUP, reason="no copy was made")
    if s.record.copy is Copy.TAKEN:
        return Action(Do.SHIP)
    return thaw_pending(s) or (None if s.record.finished else Action(Do.FINISH))


def guarded(s: Situation) -> bool:
    """The record says who keeps the guest suspended: we, or somebody who had paused it, and still does."""
    found_paused = s.record.guard is Guard.FOUND_PAUSED and s.paused
    return s.record.guard is Guard.OURS or found_paused or not s.intent.guarded


def guard_for_switch(s: Situation) -> Guard:
    """Who keeps the guest suspended during the switch that is about to be intended."""
    if not s.intent.guarded:
        return Guard.NONE
    return Guard.FOUND_PAUSED if s.paused and s.record.guard is not Guard.OURS else Guard.OURS
