"""The rules by which a running guest's disks go back from their overlay to base: commit, READY, pivot."""

from __future__ import annotations

from dataclasses import replace

from vmbackup.protocol import advice
from vmbackup.protocol.record import Guard
from vmbackup.protocol.situation import (
    Case,
    Situation,
    guard_for_switch,
    guarded,
    quarantine,
    settle_live,
    while_a_snapshot_is_kept,
)
from vmbackup.protocol.table import row
from vmbackup.protocol.terms import Action, Do, Mirror, Power


@row(
    "L=O, the commit past its deadline",
    "`stallPolicy` Throttle: lower the guest's live iotune, again each time that was not enough. Pause: "
    "record a time limit, suspend, wait for READY or that time; once in an attempt",
    "a guest that writes faster than its commit merges would stay on its overlay until that fills its file system",
)
def escalate(s: Situation) -> Action | None:
    """A commit does not converge: slow down the guest's writes, or suspend it, once in an attempt and for a while."""
    if s.pausing:
        return Action(Do.SUSPEND) if s.seen.power is Power.RUNNING else None
    for disk in s.on_overlay:
        if disk.seen.overdue and s.under_way(disk) and (action := _throttle(s, disk) or _pause(s, disk)):
            return action
    return None


def _throttle(s: Situation, disk: Case) -> Action | None:
    throttle = disk.record.throttle
    due = throttle is None or (not throttle.yielded and s.seen.now >= throttle.next_at)
    return Action(Do.THROTTLE, disk.target) if due and s.throttling(disk) else None


def _pause(s: Situation, disk: Case) -> Action | None:
    """Never together with a switch of images, nor with the guest frozen; and P is settled: see settle_overlay."""
    thawed = not s.record.frozen
    free = s.record.guard is Guard.NONE and s.seen.power is Power.RUNNING and thawed
    if not s.may_pause or not free or disk.record.pause_used:
        return None
    return Action(Do.INTEND_PAUSE, disk.target, until=s.seen.now + s.intent.stall_pause)


@row(
    "L=O, O holds a snapshot of the user, no job yet",
    "wait until the user has deleted it; meanwhile complete the copy in the store. Deleted: record the orphan, release",
    "the snapshot would be lost with O",
)
@row(
    "L=O, copy decided",
    "journal, commit, READY, intent, settle, suspend, observe, pivot; the limit of attempts reached: give up",
    "suspended from before the switch until P is durable: a power cut at any moment boots an image with "
    "everything (V3)",
)
def commit_and_pivot(s: Situation) -> Action | None:
    """L=O and the copy is decided: commit, READY, guarded pivot. Failed attempts are made again after a while."""
    if not s.on_overlay or s.record.gave_up:
        return None
    actions = [_way_home(s, disk) for disk in s.on_overlay]
    for action in actions:
        if action.do is not Do.WAIT or action.parked:
            return action
    if all(s.exhausted(disk) for disk in s.on_overlay):
        return Action(Do.GIVE_UP)
    until = [action.until for action in actions if action.until is not None]
    if s.pausing:
        until.append(s.record.pause_until)
    waiting = next((action for action in actions if action.others), Action(Do.WAIT, reason="the commit is running"))
    meanwhile = while_a_snapshot_is_kept(s) if any(disk.holds_snapshot for disk in s.on_overlay) else None
    return meanwhile or replace(waiting, until=min(until, default=None))


def _way_home(s: Situation, disk: Case) -> Action:
    record, seen = disk.record, disk.seen
    if disk.holds_snapshot and not seen.job:
        return Action(Do.WAIT, disk.target, reason=advice.holds_snapshot(record), others=True)
    if not record.commit_begun:
        return Action(Do.BEGIN_COMMIT, disk.target)
    if s.exhausted(disk):
        return Action(Do.WAIT, disk.target)
    if record.commit_running and not seen.job and seen.mirror is Mirror.NONE:
        return Action(Do.RECORD_FAILURE, disk.target, reason="the commit job ended before it was complete")
    if s.seen.now < record.retry_at:
        return Action(Do.WAIT, disk.target, until=record.retry_at)
    if s.may_pivot(disk):
        return _pivot(s, disk)
    if seen.foreign_job:
        return Action(Do.WAIT, disk.target, reason=advice.foreign_job(disk.record), others=True)
    if not seen.job and seen.mirror is not Mirror.NONE:
        return quarantine(s, advice.job_unknown(disk.record))
    if not seen.job:
        return Action(Do.COMMIT, disk.target)
    return Action(Do.WAIT, disk.target)


def _pivot(s: Situation, disk: Case) -> Action:
    if not disk.record.pivot_intended or not guarded(s):
        return Action(Do.INTEND_PIVOT, disk.target, guard=guard_for_switch(s))
    if not s.paused and (action := settle_live(s)):  # R2: where the config cannot be saved, the guest is not suspended
        return action
    return Action(Do.SUSPEND) if s.intent.guarded and not s.paused else Action(Do.PIVOT, disk.target)
