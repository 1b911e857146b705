"""What a record says of itself."""

from __future__ import annotations

import pytest

from vmbackup.protocol.record import Record, Snapshot


@pytest.mark.parametrize(
    ("record", "is_begun", "is_done"),
    [
        (Record("u", "n", "n"), False, False),
        (Record("u", "n", "n", snapshot=Snapshot.INTENDED), True, False),
        (Record("u", "n", "n", snapshot=Snapshot.ADOPTED), True, False),
        (Record("u", "n", "n", snapshot=Snapshot.DONE, finished=True), False, True),
        (Record("u", "n", "n", snapshot=Snapshot.DONE, finished=True, gave_up=True), True, False),
        (Record("u", "n", "n", snapshot=Snapshot.DONE, orphan=True), True, False),
        (Record("u", "n", "n", finished=True), False, True),
    ],
    ids=["new", "snapshot intended", "adopting", "finished", "gave up", "orphan", "refused"],
)
def test_a_journal_says_whether_its_guest_may_be_on_an_overlay(record: Record, is_begun: bool, is_done: bool) -> None:
    assert (record.begun, record.done) == (is_begun, is_done)
