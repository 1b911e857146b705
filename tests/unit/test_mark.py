"""Which backup has suspended a guest: the mark on its domain, compared with the journals of this node."""

from __future__ import annotations

from typing import Any

import pytest

from vmbackup.hypervisor.mark import URI, Mark, MarkedDisk
from vmbackup.protocol.record import Call, Freeze, Guard, Record, Snapshot
from vmbackup.reconcile.leftovers.reader import MarkState, mark_state

MARK = Mark("uid-1", frozen=True, disks=(MarkedDisk("vda", "/a & b.qcow2", pivoting=True), MarkedDisk("vdb", "/c")))


def domain_xml(metadata: str) -> str:
    return f"<domain><name>web</name><metadata>{metadata}</metadata></domain>"


def test_a_mark_is_read_as_it_was_written_with_the_namespace_that_libvirt_adds() -> None:
    text = MARK.xml.replace("<held ", f'<vmbackup:held xmlns:vmbackup="{URI}" ')
    text = text.replace("<disk ", "<vmbackup:disk ").replace("</held>", "</vmbackup:held>")
    assert Mark.of(domain_xml(text)) == MARK


@pytest.mark.parametrize("metadata", ["", "<other xmlns='https://example.org/1' uid='uid-1'/>", "<held uid='uid-1'/>"])
def test_what_others_write_into_metadata_is_no_mark(metadata: str) -> None:
    assert Mark.of(domain_xml(metadata)) is None


@pytest.mark.parametrize(
    ("uid", "fields", "expected"),
    [
        ("uid-2", {"guard": Guard.OURS, "snapshot": Snapshot.DONE}, MarkState.LOST),
        ("uid-1", {}, MarkState.LOST),  # started over after its journal was lost
        ("uid-1", {"guard": Guard.OURS, "snapshot": Snapshot.INTENDED}, MarkState.KNOWN),
        ("uid-1", {"freeze": Freeze.FROZEN}, MarkState.KNOWN),
        ("uid-1", {"freeze": Freeze.THAW_DUE, "snapshot": Snapshot.DONE}, MarkState.KNOWN),
        ("uid-1", {"call": Call("resume", "boot", 1.0), "snapshot": Snapshot.DONE}, MarkState.KNOWN),
        ("uid-1", {"snapshot": Snapshot.DONE}, MarkState.STALE),
        ("uid-1", {"snapshot": Snapshot.DONE, "guard": Guard.FOUND_PAUSED}, MarkState.STALE),
    ],
)
def test_the_journal_of_its_backup_answers_for_a_mark(uid: str, fields: dict[str, Any], expected: MarkState) -> None:
    assert mark_state(Mark("uid-1"), [Record(uid, "default", "nightly", **fields)]) is expected
