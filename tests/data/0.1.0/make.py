"""Writes the data of this folder with the code of 0.1.0 (commit 152f695). See README.md."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import libvirt
from vmbackup.reconcile.journal import Journal
from vmbackup.reconcile.record import (
    Call,
    Copy,
    DiskRecord,
    Freeze,
    Guard,
    Image,
    Record,
    Settled,
    Snapshot,
    Throttle,
)  # fmt: skip

from vmbackup.hypervisor.mark import KEY, URI, Mark, MarkedDisk
from vmbackup.imaging import CopyControl
from vmbackup.stores.base import BackupKey, DiskSource, GuestFacts, SourceImage
from vmbackup.stores.directory import DirectoryStore

HERE = Path(__file__).parent
WORLD = Path("/tmp/vmbackup-0.1.0")  # the notes of an unfinished backup name the images by this path
BOOT = "9d0c8f1e-5c5d-4f0e-8f6a-2f1d8a0c7b11"
KIB = 1 << 10
FACTS = GuestFacts(
    "web-01", "11111111-2222-3333-4444-555555555555", "<domain/>", WORLD / "guest/vars.fd", 1_790_000_000.0
)


def disk(target: str, **changes: object) -> DiskRecord:
    overlay = f"/images/web-01.{target}.vmb-0f4a3e5c.qcow2"
    known = DiskRecord(
        target, base=f"/images/{target}.qcow2", overlay=overlay, format="qcow2", virtual_bytes=1 << 30,
        base_inode=131, base_bytes=4096, room=64 << 20, backing=(("/images/template.raw", "raw"),),
        persistent_disk_xml="<disk type='file'/>", total_bytes=1 << 30,
    )  # fmt: skip
    return dataclasses.replace(known, **changes)


def record(uid: str, **changes: object) -> Record:
    known = Record(
        uid, "default", "nightly", domain="web-01", domain_uuid=FACTS.domain_uuid,
        spec={"nodeName": "a", "domain": "web-01", "storeRef": {"name": "local"}, "copy": {"bandwidth": "200Mi"}},
        store={"directory": {"path": "/backups"}}, disks=(disk("vda"), disk("vdb")),
        skipped=(("hdc", "is a cdrom"),), started=1_790_000_000.25, boot_id=BOOT, domain_xml=FACTS.domain_xml,
    )  # fmt: skip
    return dataclasses.replace(known, **changes)


def taken(uid: str, **changes: object) -> Record:
    """On its overlays, the copy is safe."""
    stored = (disk("vda", file="vda.qcow2", digest="sha256:" + "a" * 64, copied_bytes=1 << 30), disk("vdb"))
    known = {"snapshot": Snapshot.DONE, "snapshot_time": 1_790_000_001.5, "snapshot_at": 5000.5, "copy": Copy.TAKEN}
    return record(uid, **{"disks": stored, "quiesced": True, **known, **changes})


RUNNING = {"commit_begun": True, "commit_running": True, "commit_started": 5010.0, "attempts": 2, "failures": 1}
THROTTLE = Throttle(
    (("total_bytes_sec", 1 << 20),), limits=(1 << 22, 1 << 21), pending=True, merged=7, remaining=9, next_at=5060.0
)
SETTLED = disk("vda", settled=Settled(Image.OVERLAY, durable=True), pivot_intended=True, **RUNNING)
RECORDS = [
    record("planned"),
    record("adopted", snapshot=Snapshot.ADOPTED, disks=(disk("vda", owner="another-uid"),)),
    record("intended", snapshot=Snapshot.INTENDED, replan=True, call=Call("snapshot", BOOT, 5000.0)),
    record("frozen", snapshot=Snapshot.INTENDED, freeze=Freeze.FROZEN, call=Call("freeze", BOOT, 4999.5)),
    record("thaw-due", snapshot=Snapshot.DONE, freeze=Freeze.THAW_DUE, snapshot_time=1_790_000_001.5),
    record("not-frozen", snapshot=Snapshot.DONE, freeze=Freeze.TRIED, quiesced=False),
    taken(
        "committing",
        disks=(disk("vda", last_error="busy", retry_at=5100.0, **RUNNING), disk("vdb", commit_seconds=0.5)),
    ),
    taken(
        "throttled", disks=(disk("vda", throttle=THROTTLE, **RUNNING), disk("vdb", throttle=Throttle((), yielded=True)))
    ),
    taken(
        "paused",
        guard=Guard.OURS,
        pause_until=5300.0,
        suspended_at=5200.0,
        disks=(disk("vda", pause_used=True, **RUNNING),),
    ),
    taken("switching", guard=Guard.OURS, suspended_at=5200.0, disks=(SETTLED,), call=Call("pivot", BOOT, 5201.0)),
    taken("found-paused", guard=Guard.FOUND_PAUSED, io_error=True),
    taken(
        "off", disks=(disk("vda", merged="131.4096.1790000000000000000", commit_begun=True),), nvram="/images/vars.fd"
    ),
    taken("copy-failed", copy=Copy.FAILED, copy_error="/backups: No space left on device", copy_reason="NoSpace"),
    taken("quarantined", quarantined="vda: libvirt still lists a commit that QEMU no longer has"),
    taken("orphan", orphan=True, spec={}, store={}),
    taken("gave-up", gave_up=True, finished=True, handled_retry="1790000000", completed=1_790_000_400.0),
    taken(
        "finished",
        copy=Copy.STORED,
        finished=True,
        completed=1_790_000_400.0,
        location="/backups/default/nightly.finished",
    ),
]


def journals() -> None:
    folder = HERE / "journals"
    for each in RECORDS:
        journal = Journal.start(folder, record(each.uid))
        journal.write(each, durable=True)
        journal.close()
    torn = folder / "switching.journal"
    torn.write_bytes(torn.read_bytes() + b'1f0c2a77 {"uid":"swit')  # as a power cut leaves it
    known = {each.uid: dataclasses.asdict(each) for each in RECORDS}
    (HERE / "records.json").write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def guest() -> list[DiskSource]:
    folder = WORLD / "guest"
    folder.mkdir()
    (folder / "vars.fd").write_bytes(b"variables")
    (folder / "template.raw").write_bytes(b"\1" * 4 * KIB + bytes(12 * KIB))
    (folder / "vdc.raw").write_bytes(bytes(4 * KIB) + b"\5" * 512)
    sources = [DiskSource("vdc", (SourceImage(str(folder / "vdc.raw"), "raw"),), 4608)]
    for target, pattern in (("vda", 3), ("vdb", 4)):
        path = str(folder / f"{target}.qcow2")
        new = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", "template.raw", "-F", "raw", path)
        subprocess.run(["qemu-img", *new], check=True)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 8k 2k", path], check=True)
        chain = (SourceImage(path, "qcow2"), SourceImage(str(folder / "template.raw"), "raw"))
        sources.append(DiskSource(target, chain, 16 * KIB))
    return sources


def store(sources: list[DiskSource]) -> None:
    vdc, vda, vdb = sources
    directory, control = DirectoryStore(WORLD / "store"), CopyControl()
    whole = BackupKey("default", "nightly", "0f4a3e5c-whole")
    directory.check(whole, sources)
    directory.publish(whole, [directory.take(whole, each, control) for each in sources], FACTS, control)
    cut_off = BackupKey("default", "nightly", "0f4a3e5c-unfinished")
    for each in (vda, vdc):
        directory.take(cut_off, each, control)
    half = WORLD / f"store/default/.nightly.{cut_off.uid}.partial/vdb.qcow2"
    half.write_bytes(Path(vdb.chain[0].path).read_bytes()[:700])  # as a copy that was killed leaves it


def mark() -> None:
    """As libvirt itself shows it, here its test driver."""
    connection = libvirt.open("test:///default")
    domain = connection.lookupByName("test")
    disks = (MarkedDisk("vda", "/images/a & b.qcow2", pivoting=True), MarkedDisk("vdb", "/images/vdb.qcow2"))
    held = Mark("0f4a3e5c", frozen=True, disks=disks).xml
    domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, held, KEY, URI, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    (HERE / "marked.xml").write_text(domain.XMLDesc())


if __name__ == "__main__":
    os.umask(0o077)
    for old in ("journals", "guest", "store"):
        shutil.rmtree(HERE / old, ignore_errors=True)
    WORLD.mkdir()
    journals()
    store(guest())
    for made in ("guest", "store"):
        shutil.move(WORLD / made, HERE / made)
    WORLD.rmdir()
    mark()
