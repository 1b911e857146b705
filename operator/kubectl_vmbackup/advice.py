"""The next step of the person who looks at a VMBackup. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from vmbackup.api.resource import BackupResource, moment
from vmbackup.api.status import Reason

_TAKEN_WITHIN = timedelta(seconds=30)
_SILENT = timedelta(minutes=10)


@dataclass(frozen=True)
class NextStep:
    """`text` is one sentence, without a full stop. `human`: somebody must act, or nothing makes progress."""

    text: str
    human: bool = True


def _nothing(why: str) -> NextStep:
    return NextStep(f"nothing: {why}", human=False)


_WHILE_RUNNING = {
    Reason.QUEUED: _nothing("it is queued"),
    Reason.COMMIT_RETRYING: NextStep("fix the problem that the message names; the commit is retried automatically"),
    Reason.COMMIT_NOT_CONVERGING: NextStep(
        "reduce the guest's writes, raise spec.commit.bandwidth, or set spec.commit.stallPolicy to Throttle or Pause; "
        "each takes effect at once"
    ),
    Reason.WAITING_FOR_OTHERS: NextStep("wait for the job or migration that the message names, or end it"),
    Reason.DOMAIN_MIGRATED: NextStep(
        "check that the agent on the destination host has brought the guest home, then undefine the domain here "
        "(virsh undefine); never start it here while it runs there"
    ),
    Reason.WAITING_FOR_CALLS: _nothing("it continues 31 s after libvirtd answers again"),
    Reason.ADOPTING_OVERLAY: _nothing("the overlay of an earlier backup is merged first"),
}


def next_step(backup: BackupResource, now: datetime) -> NextStep:
    """The next step of the person who looks at this VMBackup."""
    if backup.terminating:
        return _while_deleted(backup, now)
    if not backup.running:
        return _after_the_end(backup)
    if not backup.observed:
        return _unobserved(backup, now)
    if backup.reason == Reason.DOMAIN_OFF:
        return NextStep(
            f"start the guest on {backup.node} (virsh start {_quoted(backup)}): it boots from its overlay, and the "
            "agent then brings it home; never boot or copy only its base"
        )
    if known := _WHILE_RUNNING.get(Reason(backup.reason)) if backup.reason in set(Reason) else None:
        return known
    progress = moment(backup.status.get("lastProgressTime"))
    if progress and now - progress > _SILENT:
        return NextStep(f"check the agent of {backup.node}: there was no progress for {span(now - progress)}")
    return _nothing("it was cancelled, and its guest is brought home" if backup.cancelled else "it is running")


def _while_deleted(backup: BackupResource, now: datetime) -> NextStep:
    since = now - (backup.deleted_at or now)
    if not backup.held:
        return NextStep(f"remove the finalizers of other controllers: {', '.join(backup.finalizers)}")
    if since < _SILENT:
        return _nothing("it was deleted, and disappears when the guest is home")
    return NextStep(
        f"check the agent of {backup.node}: this VMBackup was deleted {span(since)} ago, and disappears when the guest "
        f"is home; if that node is gone for good: {_command(backup, 'forget')}"
    )


def _after_the_end(backup: BackupResource) -> NextStep:
    if backup.ready:
        return _nothing("it can be restored")
    if backup.reason == Reason.QUARANTINED:
        return NextStep(
            "do what the message says, usually: shut the guest down and start it again; the quarantine is then lifted "
            "automatically; delete no file"
        )
    if backup.left_on_overlay:
        return NextStep(
            "fix the problem that the message names; the guest keeps running and loses no data; then: "
            f"{_command(backup, 'retry')}"
        )
    if backup.reason == Reason.CANCELLED:
        return NextStep(f"nothing; to take the backup after all: {_command(backup, 'retry')} --new", human=False)
    return NextStep(f"fix the problem that the message names, then: {_command(backup, 'retry')} --new")


def _unobserved(backup: BackupResource, now: datetime) -> NextStep:
    made = moment(backup.metadata.get("creationTimestamp"))
    if made and now - made < _TAKEN_WITHIN:
        return _nothing("the agent of its node is about to take it")
    return NextStep(
        f"no agent has taken it: check that spec.nodeName {backup.node} is right, and that an agent with that "
        f"--node-name runs: {_command(backup, 'check')}"
    )


def _command(backup: BackupResource, verb: str) -> str:
    return f"kubectl vmbackup {verb} {backup.name} -n {backup.namespace}"


def _quoted(backup: BackupResource) -> str:
    domain = str(backup.spec.get("domain", ""))
    plain = all(letter.isalnum() or letter in "-_." for letter in domain)
    return domain if plain else "'" + domain.replace("'", "'\\''") + "'"


def span(length: timedelta) -> str:
    """A duration in at most two units, as kubectl prints ages."""
    seconds = max(0, int(length.total_seconds()))
    for unit, size, smaller, least in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            rest = seconds % size // least
            return f"{seconds // size}{unit}" + (f"{rest}{smaller}" if rest and seconds < 10 * size else "")
    return f"{seconds}s"
