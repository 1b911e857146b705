"""What a backup looks like from outside: phases, reasons, and the facts that the status is rendered from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """Where a backup is. For human eyes; programs look at the conditions."""

    PENDING = "Pending"
    SNAPSHOTTING = "Snapshotting"
    COPYING = "Copying"
    COMMITTING = "Committing"
    PIVOTED = "Pivoted"
    FAILED = "Failed"


class Reason(StrEnum):
    """Reasons of conditions and events. A refusal brings its own (RefusedError.reason)."""

    PENDING = "Pending"
    FINISHED = "Finished"
    PROGRESSING = "Progressing"
    QUEUED = "Queued"
    ADOPTING_OVERLAY = "AdoptingOverlay"
    SNAPSHOTTING = "Snapshotting"
    COPYING = "Copying"
    BRINGING_CHAIN_HOME = "BringingChainHome"
    COMMITTING = "Committing"
    COMMIT_RETRYING = "CommitRetrying"
    COMMIT_NOT_CONVERGING = "CommitNotConverging"
    SHIPPING = "Shipping"
    SUCCEEDED = "Succeeded"
    OVERLAY_ACTIVE = "OverlayActive"
    CHAIN_HOME = "ChainHome"
    STORED = "Stored"
    DOMAIN_OFF = "DomainOff"
    DOMAIN_MIGRATED = "DomainMigrated"
    WAITING_FOR_CALLS = "WaitingForCalls"
    WAITING_FOR_OTHERS = "WaitingForOthers"
    COPY_FAILED = "CopyFailed"
    OVERLAY_SPACE_LOW = "OverlaySpaceLow"
    COMMIT_FAILED = "CommitFailed"
    COMMIT_LIMIT_REACHED = "CommitLimitReached"
    QUARANTINED = "Quarantined"
    SHIPPING_FAILED = "ShippingFailed"
    DELETED = "Deleted"
    CANCELLED = "Cancelled"


GUEST_AWAY = (Reason.DOMAIN_OFF, Reason.DOMAIN_MIGRATED)
"""The guest is on its overlay and does not run here: nothing can be done for the chain, and no progress is expected."""


class RetryReason(StrEnum):
    """Why a commit is tried again. The label `reason` of vmbackup_commit_retries_total."""

    JOB_FAILED = "JobFailed"
    PIVOT_FAILED = "PivotFailed"
    UNKNOWN = "Unknown"
    BUSY = "Busy"


class DiskState(StrEnum):
    """Where one disk is."""

    PENDING = "Pending"
    SKIPPED = "Skipped"
    COPYING = "Copying"
    COPIED = "Copied"
    COMMITTING = "Committing"
    HOME = "Home"
    ON_OVERLAY = "OnOverlay"
    QUARANTINED = "Quarantined"


class Outcome(StrEnum):
    """How a backup ended; None of these while it runs. The label `result` of vmbackup_backups_total."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REFUSED = "refused"
    DELETED = "deleted"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class DiskReport:
    """The status of one disk. `message` says why a disk is left out, or what it waits for."""

    target: str
    state: DiskState
    format: str = ""
    base: str = ""
    overlay: str = ""
    message: str = ""
    copied_bytes: int = 0
    total_bytes: int = 0
    digest: str = ""
    merged_bytes: int = 0
    commit_seconds: float | None = None
    attempts: int = 0
    last_error: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a status is rendered from. Times are seconds since the epoch, UTC.

    `reason` and `message` are those of Ready; the other two conditions have their own, and a standard sentence where
    the message is empty. `outcome` is None while the backup runs.
    """

    phase: Phase = Phase.PENDING
    reason: str = Reason.PENDING
    message: str = ""
    outcome: Outcome | None = None
    backup_complete: bool | None = None  # None: not known yet
    backup_reason: str = ""
    backup_message: str = ""
    chain_clean: bool | None = None
    chain_reason: str = ""
    chain_message: str = ""
    domain_uuid: str = ""
    snapshot_time: float | None = None
    quiesced: bool | None = None
    start_time: float | None = None
    completion_time: float | None = None
    last_progress_time: float | None = None
    location: str = ""
    last_handled_retry: str = ""
    disks: tuple[DiskReport, ...] = ()

    @property
    def ready(self) -> bool | None:
        """Can be restored now, and every disk is home. None while it runs."""
        if self.outcome is None:
            return None
        return self.outcome is Outcome.SUCCEEDED
