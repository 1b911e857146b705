"""Records and observations for the tests of decide(), and the rows of their tables.

L, P, T, B, O as in docs/protocol.md: an image is given as "B", "O", "X" (somebody else's) or None.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from vmbackup.protocol.decide import decide
from vmbackup.protocol.record import Copy, DiskRecord, Guard, Image, Record, Settled, Snapshot
from vmbackup.protocol.terms import DiskSeen, Do, Intent, Mirror, Observation, OverlayFile, Power

IMAGES = {"B": Image.BASE, "O": Image.OVERLAY, "X": Image.OTHER, None: None}
LOCKED, EMPTY, DATA = OverlayFile(True, False), OverlayFile(False, True), OverlayFile(False, False)
ON_BASE = Settled(Image.BASE, durable=True)
ON_OVERLAY = Settled(Image.OVERLAY, durable=True)

Fields = dict[str, Any]


def disk_seen(live: str | None, persistent: str | None, overlay: OverlayFile | None, **more: Any) -> DiskSeen:
    written = IMAGES[more.pop("written", None)]
    target = more.pop("target", "vda")
    return DiskSeen(target, IMAGES[live], IMAGES[persistent], overlay, written=written, **more)


def off(persistent: str | None, overlay: OverlayFile | None = None) -> Observation:
    return Observation(Power.OFF, (disk_seen(None, persistent, overlay),))


def on(
    live: str, persistent: str | None, overlay: OverlayFile | None = None, power: Power = Power.RUNNING, **more: Any
) -> Observation:
    return Observation(power, (disk_seen(live, persistent, overlay, **more),))


def home(power: Power = Power.RUNNING, **more: Any) -> Observation:
    return on("B", "B", None, power, **more)


def on_overlay(power: Power = Power.RUNNING, **more: Any) -> Observation:
    return on("O", "O", LOCKED, power, **more)


def ready(power: Power = Power.RUNNING) -> Observation:
    return on_overlay(power, mirror=Mirror.READY, job=True, job_at_end=True)


VDA = DiskRecord("vda", base="/vda.qcow2", overlay="/vda.vmb.qcow2")


def record(disk: Fields | None = None, **changes: Any) -> Record:
    return Record("uid", "default", "nightly", disks=(replace(VDA, **(disk or {})),), **changes)


def fresh(disk: Fields | None = None, **changes: Any) -> Record:
    """Planned, with P settled on base."""
    return record({"settled": ON_BASE} | (disk or {}), **changes)


def taken(disk: Fields | None = None, **changes: Any) -> Record:
    """Its snapshot is taken, P settled on the overlay."""
    return record({"settled": ON_OVERLAY} | (disk or {}), **({"snapshot": Snapshot.DONE} | changes))


def committing(disk: Fields | None = None, **changes: Any) -> Record:
    """The copy is safe, the commit has begun."""
    return taken({"commit_begun": True, "commit_running": True} | (disk or {}), **({"copy": Copy.TAKEN} | changes))


def pivoting(disk: Fields | None = None, **changes: Any) -> Record:
    return committing({"pivot_intended": True} | (disk or {}), **({"guard": Guard.OURS} | changes))


def pivoted(disk: Fields | None = None, **changes: Any) -> Record:
    return pivoting({"settled": ON_BASE} | (disk or {}), **({"guard": Guard.NONE} | changes))


def finished(**changes: Any) -> Record:
    return fresh(**({"snapshot": Snapshot.DONE, "copy": Copy.STORED, "finished": True} | changes))


DELETED, CANCELLED, QUIESCE = {"deleted": True}, {"cancelled": True}, {"quiesce": True}
LIVE, LIMIT_1 = {"guarded": False}, {"backoff_limit": 1}
REQUIRED = {"quiesce_required": True}


@dataclass(frozen=True)
class Row:
    """A named row of a table. `more`: what else the action says."""

    name: str
    record: Record
    seen: Observation
    expected: Do
    intent: Fields = field(default_factory=dict)
    more: Fields = field(default_factory=dict)

    def check(self) -> None:
        action = decide(Intent(**self.intent), self.record, self.seen)
        assert action.do is self.expected, action
        for name, value in self.more.items():
            assert getattr(action, name) == value


def rows(*table: Row) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


def seen(observation: Observation, **changes: Any) -> Observation:
    return replace(observation, **changes)


TO_BASE, TO_OVERLAY = (("vda", Image.BASE),), (("vda", Image.OVERLAY),)


PAUSED_BY_USER = Guard.FOUND_PAUSED
