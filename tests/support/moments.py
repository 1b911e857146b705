"""The moments of a backup, each as the agent reports it, with what kubectl wait, Flux and Argo CD are to see of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmbackup.api.status import Outcome, Phase, Reason, Report
from vmbackup.protocol.terms import CANCELLED

CODES = {"T": "True", "F": "False", "U": "Unknown"}
HEALTH = {"InProgress": "Progressing", "Failed": "Degraded", "Current": "Healthy"}
"""What Argo CD says where kstatus says this."""


@dataclass(frozen=True)
class Moment:
    """A report and the status that it must become: each condition as T, F or U, its reason, and kstatus' verdict."""

    name: str
    report: Report
    ready: str
    backup_complete: str
    chain_clean: str
    reconciling: str
    stalled: str
    verdict: str

    def __str__(self) -> str:
        return self.name


_LOCKED = "disk vda: the base is locked by a reader"
_OVERLAY = "disk vda: /var/lib/libvirt/images/web-01.vmb-01234567.qcow2"

RUNNING = Report(backup_complete=None, chain_clean=True)
ON_OVERLAY = replace(RUNNING, chain_clean=False, chain_reason=Reason.OVERLAY_ACTIVE)
FAILED = replace(RUNNING, phase=Phase.FAILED, outcome=Outcome.FAILED)
COPY_FAILED = {"backup_complete": False, "backup_reason": Reason.COPY_FAILED}
COMMIT_FAILED = {"chain_clean": False, "chain_reason": Reason.COMMIT_FAILED}

MOMENTS = [
    Moment(
        "queued",
        replace(RUNNING, reason=Reason.QUEUED, message="another backup of this domain is running"),
        *("U Queued", "U", "T", "T", "F", "InProgress"),
    ),
    Moment(
        "refused",
        replace(
            FAILED,
            reason="DomainNotRunning",
            message="domain web-01 is not running: start it, or copy its disks as they are",
            outcome=Outcome.REFUSED,
            backup_complete=False,
        ),
        *("F DomainNotRunning", "F DomainNotRunning", "T", "F", "T", "Failed"),
    ),
    Moment(
        "refused, the chain not looked at",
        replace(
            FAILED,
            reason="StoreNotFound",
            message="spec.storeRef.name is 'local': there is no VMBackupStore of this name",
            outcome=Outcome.REFUSED,
            backup_complete=False,
            chain_clean=None,
        ),
        *("F StoreNotFound", "F StoreNotFound", "U", "F", "T", "Failed"),
    ),
    Moment(
        "adopting another's overlay",
        replace(ON_OVERLAY, reason=Reason.ADOPTING_OVERLAY, message="an earlier backup left its overlay"),
        *("U AdoptingOverlay", "U", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "snapshot",
        replace(
            ON_OVERLAY,
            phase=Phase.SNAPSHOTTING,
            reason=Reason.SNAPSHOTTING,
            message="the guest is being switched to its overlay",
        ),
        *("U Snapshotting", "U", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "copy",
        replace(ON_OVERLAY, phase=Phase.COPYING, reason=Reason.COPYING, message="the frozen base is being copied"),
        *("U Copying", "U", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "copy failed",
        replace(
            ON_OVERLAY,
            phase=Phase.COMMITTING,
            reason=Reason.BRINGING_CHAIN_HOME,
            message="disk vda: the store is full",
            **COPY_FAILED,
        ),
        *("U BringingChainHome", "F CopyFailed", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "copy failed, chain home",
        replace(FAILED, reason=Reason.COPY_FAILED, message="disk vda: the store is full", **COPY_FAILED),
        *("F CopyFailed", "F CopyFailed", "T", "F", "T", "Failed"),
    ),
    Moment(
        "cancelled",
        replace(
            FAILED,
            reason=Reason.CANCELLED,
            message=CANCELLED,
            outcome=Outcome.CANCELLED,
            backup_complete=False,
        ),
        *("F Cancelled", "F Cancelled", "T", "F", "T", "Failed"),
    ),
    Moment(
        "commit retry",
        replace(
            ON_OVERLAY,
            phase=Phase.COMMITTING,
            reason=Reason.COMMIT_RETRYING,
            message=_LOCKED,
            backup_complete=True,
            **COMMIT_FAILED,
        ),
        *("U CommitRetrying", "T Stored", "F CommitFailed", "T", "F", "InProgress"),
    ),
    Moment(
        "shipping",
        replace(RUNNING, phase=Phase.PIVOTED, reason=Reason.SHIPPING, message="every disk is home"),
        *("U Shipping", "U", "T ChainHome", "T", "F", "InProgress"),
    ),
    Moment(
        "done",
        replace(
            RUNNING,
            phase=Phase.PIVOTED,
            outcome=Outcome.SUCCEEDED,
            message="stored at /var/lib/vmbackup/store/default/web-01.1, and every disk is home",
            backup_complete=True,
        ),
        *("T Succeeded", "T Stored", "T ChainHome", "F", "F", "Current"),
    ),
    Moment(
        "guest off on its overlay",
        replace(
            ON_OVERLAY,
            phase=Phase.COMMITTING,
            reason=Reason.DOMAIN_OFF,
            message=f"the guest is off on its overlay ({_OVERLAY}); the commit continues when it starts",
            backup_complete=True,
        ),
        *("U DomainOff", "T Stored", "F OverlayActive", "T", "F", "InProgress"),
    ),
    Moment(
        "gave up, the copy complete",
        replace(FAILED, reason=Reason.COMMIT_LIMIT_REACHED, message=_LOCKED, backup_complete=True, **COMMIT_FAILED),
        *("F CommitLimitReached", "T Stored", "F CommitFailed", "F", "T", "Failed"),
    ),
    Moment(
        "gave up, the copy failed",
        replace(FAILED, reason=Reason.COMMIT_LIMIT_REACHED, message=_LOCKED, chain_clean=False, **COPY_FAILED),
        *("F CommitLimitReached", "F CopyFailed", "F OverlayActive", "F", "T", "Failed"),
    ),
    Moment(
        "quarantine",
        replace(
            FAILED,
            reason=Reason.QUARANTINED,
            message="disk vda: QEMU writes the overlay, libvirt names the base: shut the guest down and start it again",
            chain_clean=False,
            chain_reason=Reason.QUARANTINED,
        ),
        *("F Quarantined", "U", "F Quarantined", "F", "T", "Failed"),
    ),
    Moment(
        "shipping failed",
        replace(FAILED, reason=Reason.SHIPPING_FAILED, message="disk vda: the store went away", backup_complete=False),
        *("F ShippingFailed", "F ShippingFailed", "T ChainHome", "F", "T", "Failed"),
    ),
]
