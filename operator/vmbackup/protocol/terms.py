"""The terms of a decision: observation, intent, action. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmbackup.api.backup import StallPolicy
from vmbackup.api.names import CANCEL_ANNOTATION
from vmbackup.api.status import Reason
from vmbackup.protocol.record import Guard, Image

CANCELLED = f"the backup was cancelled (annotation {CANCEL_ANNOTATION})"


class Power(StrEnum):
    """The state of the guest, as far as a backup is concerned. IO_ERROR: QEMU paused it because a write failed."""

    OFF = "off"
    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"


class Mirror(StrEnum):
    """`<mirror job='active-commit'>` in the live XML. READY does not prove a job: ask for it too (PROTOCOL R3)."""

    NONE = "none"
    PENDING = "pending"
    READY = "ready"


@dataclass(frozen=True)
class OverlayFile:
    """Our overlay's file. `empty`: no cluster is allocated (False where that was not looked at).

    `merged`: it was found to hold nothing that base lacks, and was not written since. `held`: by us, from before that
    was found out until now, so that no guest can start on it.
    """

    locked: bool  # by somebody else
    empty: bool
    merged: bool = False
    held: bool = False
    holds_snapshot: bool = False  # an internal one, of a user: he may want to revert to it


@dataclass(frozen=True)
class DiskSeen:
    """One disk, as libvirt and the file system show it now."""

    target: str
    live: Image | None  # L; None when off
    persistent: Image | None  # P; None for a transient domain
    overlay: OverlayFile | None = None  # None: no such file
    mirror: Mirror = Mirror.NONE
    job: bool = False  # blockJobInfo knows an active commit, and it goes to base
    job_at_end: bool = False  # its current equals its end: a hint, never proof of READY
    overdue: bool = False  # our job has passed commit.deadlineSeconds, and is not READY
    foreign_job: bool = False  # somebody else's block job
    written: Image | None = None  # T; None: not asked
    base_changed: bool = False  # base is not the file any more that it was, or was truncated
    astray: bool = False  # QEMU writes another file than base, though by base's name: base's name led there for a while

    @property
    def truth(self) -> Image | None:
        """The image that QEMU writes: its own word where it was asked, else libvirt's."""
        return self.written or self.live


@dataclass(frozen=True)
class Observation:
    """One look at a domain. All of it was read under the same domain id."""

    power: Power
    disks: tuple[DiskSeen, ...]
    call_in_flight: bool = False  # R4: an unanswered call may still be carried out
    migrating: bool = False
    saved: bool = False  # off, and the next start goes on from a saved state
    migrated: bool = False  # off here, since it goes on on another host
    config_failing: bool = False  # the persistent XML could not be made durable again and again
    thaw_after: float = 0.0  # CLOCK_BOOTTIME before which a failed thaw is not tried again
    room_low: str = ""  # while the base is copied: why its overlay's file system needs the copy to end
    now: float = 0.0  # CLOCK_BOOTTIME, seconds


@dataclass(frozen=True)
class Unwanted:
    """Why no copy is wanted any more."""

    message: str
    reason: Reason


@dataclass(frozen=True)
class Intent:
    """The request, as far as the rules depend on it."""

    deleted: bool = False
    cancelled: bool = False
    guarded: bool = True  # switchPolicy: Guarded
    quiesce: bool = False
    quiesce_required: bool = False
    backoff_limit: int = 6
    offline: bool = False  # commit.offline: merge also while the guest is off
    stall_policy: StallPolicy = StallPolicy.HOLD
    stall_pause: float = 0.0  # seconds
    leaving: bool = (
        False  # this run is to end: it leaves no guest suspended or slowed down, and every switch to the next
    )

    @property
    def unwanted(self) -> Unwanted | None:
        """Why no copy is wanted any more; None while one is."""
        if self.deleted:
            return Unwanted("the VMBackup was deleted", Reason.DELETED)
        return Unwanted(CANCELLED, Reason.CANCELLED) if self.cancelled else None


class Do(StrEnum):
    """Every action. Those marked (journal) change only the record; those marked (call) are mutating libvirt calls."""

    WAIT = "wait"
    PLAN = "plan"  # choose the disks, check that it can be done, start a fresh record
    REFUSE = "refuse"  # (journal) nothing was begun, nothing will be
    ADOPT = "adopt"  # (journal) an overlay that is not this backup's own goes home first
    INTEND_SNAPSHOT = "intend-snapshot"  # (journal) and suspend, where guarded
    RECORD_SNAPSHOT = "record-snapshot"  # (journal) the snapshot is there
    FREEZE = "freeze"  # (call)
    THAW = "thaw"  # (call)
    SUSPEND = "suspend"  # (call)
    RESUME = "resume"  # (call)
    FORGET_GUEST = "forget-guest"  # (journal) QEMU is gone, and with it what we had suspended, frozen or slowed down
    RECORD_IO_ERROR = "record-io-error"  # (journal) paused while on its overlay: to be resumed, once, when home
    CLEAR_GUARD = "clear-guard"  # (journal) nothing of ours is suspended any more
    SNAPSHOT = "snapshot"  # (call)
    REDEFINE = "redefine"  # (call) settle P, first half
    SYNC_CONFIG = "sync-config"  # settle P, second half: read back, fsync file and directory
    COPY = "copy"
    FAIL_BACKUP = "fail-backup"  # (journal) there will be no good copy; the chain goes home all the same
    BEGIN_COMMIT = "begin-commit"  # (journal) from here on base is not the point in time any more
    COMMIT = "commit"  # (call)
    MERGE_OFFLINE = "merge-offline"  # off: merge O into base, compare them, hold O, note that in the journal
    THROTTLE = "throttle"  # (call) slow down the guest's writes, or look whether that was enough
    UNTHROTTLE = "unthrottle"  # (call)
    INTEND_PAUSE = "intend-pause"  # (journal) and suspend, until the commit is READY or `until`
    RECORD_FAILURE = "record-failure"  # (journal) the job vanished without having pivoted
    INTEND_PIVOT = "intend-pivot"  # (journal) and suspend, where guarded
    CLEAR_PIVOT = "clear-pivot"  # (journal)
    COMPARE = "compare"  # off in the middle of a pivot: does O show the same as base?
    PIVOT = "pivot"  # (call)
    REMOVE_OVERLAY = "remove-overlay"
    QUARANTINE = "quarantine"  # (journal) touch nothing; a human, or a cold restart, must help
    LIFT_QUARANTINE = "lift-quarantine"  # (journal)
    GIVE_UP = "give-up"  # (journal) the limit of attempts is reached
    SHIP = "ship"  # what was taken is digested and published in the store
    RECORD_ORPHAN = "record-orphan"  # (journal) deleted, and home is impossible for now
    CLEAR_ORPHAN = "clear-orphan"  # (journal) it came home after all
    FINISH = "finish"  # (journal)
    RELEASE = "release"  # deleted: the finalizer may go
    DONE = "done"  # nothing is left to do


@dataclass(frozen=True)
class Action:
    """A decision. `target` names the disk; `images`, by target, what P shall name, or names already (COMPARE)."""

    do: Do
    target: str = ""
    images: tuple[tuple[str, Image], ...] = ()
    reason: str = ""
    cause: Reason | None = None  # FAIL_BACKUP: the reason for the condition; None where only the message says it
    until: float | None = None  # WAIT, INTEND_PAUSE: CLOCK_BOOTTIME, seconds; None: until something happens
    others: bool = False  # WAIT: for what somebody else does with this domain
    parked: bool = False  # WAIT: nothing can be done until a human or the guest acts
    guard: Guard = Guard.NONE  # INTEND_*: who keeps the guest still during the switch
