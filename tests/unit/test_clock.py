"""Deadlines and pauses are counted in CLOCK_BOOTTIME, which starts at 0 with each boot."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.decisions import Fields, committing, fresh, pivoting, taken
from vmbackup.protocol.record import Freeze, Guard, Record
from vmbackup.protocol.transition import of_this_boot

THEN, NOW = 90_000.0, 40.0  # this boot is younger than what an earlier one has written down


@pytest.mark.parametrize(
    ("record", "disk", "more"),
    [
        (taken(snapshot_at=THEN), {}, {"snapshot_at": NOW}),
        (taken(), {}, {"snapshot_at": None}),
        (committing({"commit_started": THEN}), {"commit_started": None}, {}),
        (committing({"retry_at": THEN, "failures": 3}), {"retry_at": 0.0, "failures": 3}, {}),
        (taken(snapshot_time=1.8e9, snapshot_at=THEN), {}, {"snapshot_time": 1.8e9}),
        (pivoting(suspended_at=THEN), {"pivot_intended": True}, {"guard": Guard.NONE, "suspended_at": None}),
        (fresh(freeze=Freeze.FROZEN, quiesced=True), {}, {"freeze": Freeze.NONE, "quiesced": None}),
    ],
    ids=[
        "a copy's deadline runs from now",
        "no snapshot, no deadline",
        "the attempt ended with QEMU",
        "the next attempt waits no longer, and is counted on",
        "what people read stays",
        "a guest that is suspended now was not suspended by this backup",
        "a guest that has booted is not frozen",
    ],
)
def test_after_a_reboot_nothing_is_measured_against_the_boot_before(
    record: Record, disk: Fields, more: dict[str, Any]
) -> None:
    now = of_this_boot(record, "this", NOW)
    assert now.boot_id == "this"
    for name, value in disk.items():
        assert getattr(now.disks[0], name) == value
    for name, value in more.items():
        assert getattr(now, name) == value


def test_within_a_boot_all_goes_on() -> None:
    record = committing({"commit_started": 30.0, "retry_at": 35.0}, boot_id="this", snapshot_at=20.0)
    assert of_this_boot(record, "this", NOW) is record
