"""Commits that do not converge: which they are, and how far a guest's writes are slowed down for them. Pure.

The guest is slowed down by the live <iotune> of the disk, which QEMU forgets when it ends, and which does not concern
the block job. A job copies 64 KiB for the smallest write: a guest at the lowest limit may dirty sixteen times that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vmbackup.protocol.record import DiskRecord, Record, Throttle
from vmbackup.protocol.terms import DiskSeen, Mirror, Observation

LOWEST = 1 << 20  # bytes per second
_LEAST_SHARE = 32  # of what the commit merges: the lowest limit where that is slow
_FLOOR = 16 << 10  # bytes per second
_LONGEST_STEP = 30.0  # seconds

Bytes = Mapping[str, int]


def with_overdue(record: Record, seen: Observation, deadline: float) -> Observation:
    """The observation, with the commits marked that have passed their deadline (seconds since the attempt began)."""
    disks = tuple(
        replace(disk, overdue=_overdue(record.disk(disk.target), disk, seen, deadline)) for disk in seen.disks
    )
    return replace(seen, disks=disks)


def _overdue(record: DiskRecord, disk: DiskSeen, seen: Observation, deadline: float) -> bool:
    running = disk.job and disk.mirror is not Mirror.READY and record.commit_started is not None
    return running and seen.now - (record.commit_started or 0.0) >= deadline


def step_seconds(deadline: float) -> float:
    """How long one limit is tried, if a commit has `deadline` seconds to converge on its own."""
    return min(_LONGEST_STEP, deadline)


def next_limit(throttle: Throttle, merged: int, remaining: int, seconds: float) -> int | None:
    """The next limit in bytes per second; None if the present one will do, or is the lowest.

    `merged` and `remaining` are bytes of the job, `seconds` since it began. It converges if what remains shrinks by a
    quarter of what it merges.
    """
    speed = merged / max(seconds, 1.0)
    lowest = max(_FLOOR, min(LOWEST, int(speed / _LEAST_SHARE)))
    if not throttle.limits:
        original = dict(throttle.original)
        bounds = [original[name] for name in ("write_bytes_sec", "total_bytes_sec") if original.get(name)]
        return min([max(lowest, int(min([speed, *bounds]) / 2)), *bounds])
    present = throttle.limits[-1]
    shrunk = throttle.remaining - remaining
    if present <= lowest or (shrunk > 0 and 4 * shrunk >= merged - throttle.merged):
        return None
    return max(lowest, present // 2)


def lowered(original: Bytes, limit: int) -> dict[str, int]:
    """The byte limits (libvirt's names; _max and _max_length are bursts) with at most `limit` per second to write.

    libvirt takes a total or one each for reading and writing: of a total, reading gets the rest. A burst would let the
    guest write as fast as ever for a while, so there is none.
    """
    tune = {name: value for name, value in original.items() if not name.startswith("write")}
    total = tune.get("total_bytes_sec", 0)
    if total:
        tune = {"read_bytes_sec": max(total - limit, limit)}
    return {**tune, "write_bytes_sec": limit}


def is_ours(throttle: Throttle, present: Bytes) -> bool:
    """Whether the current byte limits are those that we have set, as far as we know."""
    limits = throttle.limits[-2:] if throttle.pending else throttle.limits[-1:]
    expected = [lowered(dict(throttle.original), limit) for limit in limits]
    if len(throttle.limits) <= int(throttle.pending):
        expected.append(dict(throttle.original))
    return any(same(present, each) for each in expected)


def same(one: Bytes, other: Bytes) -> bool:
    """Whether two limits are equal. libvirt reports a burst length of 1 second if none was set."""
    return _compared(one) == _compared(other)


def _compared(tune: Bytes) -> dict[str, int]:
    return {name: value for name, value in tune.items() if value and (value != 1 or not name.endswith("_length"))}
