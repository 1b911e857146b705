"""What a human should do next about a VMBackup. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from vmbackup.api.resource import BackupResource, moment
from vmbackup.api.status import Reason

_TAKEN_WITHIN = timedelta(seconds=30)
_SILENT = timedelta(minutes=10)

_WHILE_RUNNING = {
    Reason.QUEUED: "nothing: it waits for its turn",
    Reason.COMMIT_RETRYING: "fix what the message names: the commit is tried again by itself",
    Reason.COMMIT_NOT_CONVERGING: "let the guest write less, raise spec.commit.bandwidth, or choose "
    "spec.commit.stallPolicy Throttle or Pause: each takes effect at once",
    Reason.WAITING_FOR_OTHERS: "wait for the job or migration that the message names, or end it",
    Reason.DOMAIN_MIGRATED: "see that the agent of the other host has brought the guest home, then undefine the domain "
    "here (virsh undefine); never start it here while it runs there",
    Reason.WAITING_FOR_CALLS: "nothing: it goes on 31 s after libvirtd answers again",
    Reason.ADOPTING_OVERLAY: "nothing: what an earlier backup left goes home first",
}


def next_step(backup: BackupResource, now: datetime) -> str:
    """One sentence, without a dot at its end."""
    if backup.terminating:
        return _while_deleted(backup, now)
    if not backup.running:
        return _after_the_end(backup)
    if not backup.observed:
        return _unseen(backup, now)
    if backup.reason == Reason.DOMAIN_OFF:
        return (
            f"start the guest on {backup.node} (virsh start {_quoted(backup)}): it boots from its overlay, and is "
            "brought home; never boot or copy its base alone"
        )
    if known := _WHILE_RUNNING.get(Reason(backup.reason)) if backup.reason in set(Reason) else None:
        return known
    progress = moment(backup.status.get("lastProgressTime"))
    if progress and now - progress > _SILENT:
        return f"look at the agent of {backup.node}: there was no progress for {span(now - progress)}"
    if backup.cancelled:
        return "nothing: it was cancelled, and the guest is brought home"
    return "nothing: it is running"


def needs_a_human(backup: BackupResource, now: datetime) -> bool:
    """Whether something must be done, or nothing makes progress."""
    return not next_step(backup, now).startswith("nothing")


def _while_deleted(backup: BackupResource, now: datetime) -> str:
    since = now - (backup.deleted_at or now)
    if not backup.held:
        return f"remove the finalizers of others: {', '.join(backup.finalizers)}"
    if since < _SILENT:
        return "nothing: it was deleted, and vanishes once the guest is home"
    return (
        f"see to the agent of {backup.node}: it was asked {span(since)} ago to let go of this VMBackup, which vanishes "
        f"once the guest is home; if that node is gone for good: {_command(backup, 'forget')}"
    )


def _after_the_end(backup: BackupResource) -> str:
    if backup.ready:
        return "nothing: it can be restored"
    if backup.reason == Reason.QUARANTINED:
        return (
            "do what the message says, mostly: shut the guest down and start it again; the quarantine is then lifted "
            "by itself; delete no file"
        )
    if backup.left_on_overlay:
        return f"fix what the message names; the guest runs on, and loses nothing; then: {_command(backup, 'retry')}"
    if backup.reason == Reason.CANCELLED:
        return f"nothing; for a backup after all: {_command(backup, 'retry')} --new"
    return f"fix what the message names, then: {_command(backup, 'retry')} --new"


def _unseen(backup: BackupResource, now: datetime) -> str:
    made = moment(backup.metadata.get("creationTimestamp"))
    if made and now - made < _TAKEN_WITHIN:
        return "nothing: the agent of its node is about to take it"
    return (
        f"no agent has taken it: is {backup.node} right, and does an agent with that --node-name run? "
        f"{_command(backup, 'check')}"
    )


def _command(backup: BackupResource, verb: str) -> str:
    return f"kubectl vmbackup {verb} {backup.name} -n {backup.namespace}"


def _quoted(backup: BackupResource) -> str:
    domain = str(backup.spec.get("domain", ""))
    plain = all(letter.isalnum() or letter in "-_." for letter in domain)
    return domain if plain else "'" + domain.replace("'", "'\\''") + "'"


def span(length: timedelta) -> str:
    """A length of time in two units at most, as kubectl prints ages."""
    seconds = max(0, int(length.total_seconds()))
    for unit, size, smaller, least in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            rest = seconds % size // least
            return f"{seconds // size}{unit}" + (f"{rest}{smaller}" if rest and seconds < 10 * size else "")
    return f"{seconds}s"
