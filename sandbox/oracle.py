"""Proves what an image of a test guest's disk holds: a sound file system, and an unbroken journal of its records.

    python -m sandbox.oracle IMAGE...               # says in words what it found

The image is never touched: it is read with QEMU's lock and through its backing chain into a temporary raw copy.
What is proven there: ext4 is clean once its own journal is replayed, as after any power cut; the records are intact and
numbered 1, 2, 3, … without a gap; every block of the bulk file, if there is one, carries its own checksum.

A record is acknowledged only after its fsync, and on each disk only one is under way. Hence, with numbers read from the
guest's serial line:

- a copy made at a snapshot holds every record acknowledged before the snapshot was begun, and at most one more than
  were acknowledged when it had been taken;
- the base image after the pivot, with the guest ended, holds all that were ever acknowledged.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

RECORD_BYTES = 512
BLOCK_BYTES = 4096
# As struct record in guest-os/writer.c: magic, crc32 of all that follows, number, milliseconds since 1970; then noise.
_HEADER = struct.Struct("<IIQQ")
_MAGIC = int.from_bytes(b"VMBJ", "little")
_CHECKED_FROM = 8
_NOTHING = bytes(RECORD_BYTES)


class ProofError(AssertionError):
    """An image is damaged or incomplete. The text names the image and the problem."""


@dataclass(frozen=True)
class Journal:
    """The records found in an image: all from 1 to `last`, each intact. `last` is 0 where there is none.

    `written` is when the guest wrote the last one, by its clock; `bulk_blocks` how many intact blocks of 4 KiB its bulk
    file has.
    """

    last: int = 0
    written: datetime | None = None
    bulk_blocks: int = 0

    def __str__(self) -> str:
        records = f"records 1 to {self.last}, the last written at {self.written:%H:%M:%S} UTC" if self.written else ""
        bulk = f"{self.bulk_blocks * BLOCK_BYTES >> 20} MiB of bulk data" if self.bulk_blocks else ""
        return f"{records or 'no records'}{', and ' if bulk else ''}{bulk}: all intact"


@dataclass(frozen=True)
class Bounds:
    """The last record that a snapshot may hold, by target of the disk.

    At least what was acknowledged before it was begun; at most one more than was acknowledged once it had been taken,
    where `at_most` is empty if it is unknown.
    """

    at_least: Mapping[str, int]
    at_most: Mapping[str, int] = field(default_factory=dict[str, int])

    @classmethod
    def around(cls, before: Mapping[str, int], after: Mapping[str, int]) -> Bounds:
        """From the last acknowledged record of each disk before the snapshot, and after it."""
        return cls(before, {target: number + 1 for target, number in after.items()})


def read_image(image: Path, *, image_format: str = "") -> Journal:
    """What a raw or qcow2 image holds, read through its backing chain. The format is probed where it is not given.

    Raises ProofError where anything is wrong with it, also where it is in use (QEMU's lock).
    """
    with tempfile.TemporaryDirectory(prefix="vmbackup-oracle-") as directory:
        raw = Path(directory, "raw")
        probed = ["-f", image_format] if image_format else []
        _run(image, "it cannot be read", "qemu-img", "convert", *probed, "-O", "raw", str(image), str(raw))
        _run(image, "its journal cannot be replayed", "e2fsck", "-y", "-E", "journal_only", str(raw))
        _run(image, "its file system is damaged", "e2fsck", "-fn", str(raw))
        return read_journal(_dumped(raw, "journal", directory), name=str(image), bulk=_dumped(raw, "bulk", directory))


def read_journal(journal: bytes, *, name: str, bulk: bytes = b"") -> Journal:
    """Check the guest's journal and bulk files. Raises ProofError; `name` is what the error calls the image."""
    found = Journal()
    for number, offset in enumerate(range(0, len(journal), RECORD_BYTES), start=1):
        record = journal[offset : offset + RECORD_BYTES]
        if record == _NOTHING[: len(record)]:
            if journal[offset:].strip(b"\0"):
                raise ProofError(f"{name}: record {number} is missing, but later records exist")
            break
        found = Journal(number, _written(record, number, name))
    return Journal(found.last, found.written, _count_blocks(bulk, name))


def _written(record: bytes, number: int, name: str) -> datetime:
    """When the record was written. Raises ProofError unless it is intact and the one with this number."""
    if len(record) < RECORD_BYTES:
        raise ProofError(f"{name}: record {number} is torn: {len(record)} of {RECORD_BYTES} bytes")
    magic, checksum, its_number, milliseconds = _HEADER.unpack_from(record)
    if magic != _MAGIC or checksum != zlib.crc32(record[_CHECKED_FROM:]):
        raise ProofError(f"{name}: record {number} is torn: its checksum does not fit")
    if its_number != number:
        raise ProofError(f"{name}: record {its_number} stands where record {number} belongs")
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def sealed_block(noise: bytes) -> bytes:
    """A block of the bulk file: the checksum of what follows, then noise, of which BLOCK_BYTES - 4 are used."""
    content = noise[: BLOCK_BYTES - 4]
    return zlib.crc32(content).to_bytes(4, "little") + content


def _count_blocks(bulk: bytes, name: str) -> int:
    for offset in range(0, len(bulk), BLOCK_BYTES):
        if bulk[offset : offset + BLOCK_BYTES] != sealed_block(bulk[offset + 4 : offset + BLOCK_BYTES]):
            raise ProofError(f"{name}: block {offset // BLOCK_BYTES} of its bulk file is torn")
    return len(bulk) // BLOCK_BYTES


def prove(
    image: Path, *, acknowledged_at_least: int = 0, at_most: int | None = None, image_format: str = ""
) -> Journal:
    """Prove that an image is sound and holds records 1 to n, acknowledged_at_least <= n <= at_most.

    `at_most` is one more than had been acknowledged: one record may be under way. Raises ProofError.
    """
    found = read_image(image, image_format=image_format)
    if found.last < acknowledged_at_least:
        raise ProofError(
            f"{image}: it ends with record {found.last}, but record {acknowledged_at_least} was acknowledged: "
            "acknowledged writes are lost, or the image is a stale one"
        )
    if at_most is not None and found.last > at_most:
        raise ProofError(f"{image}: it holds record {found.last}, but nothing after {at_most} had been written then")
    return found


def prove_one_moment(journals: Sequence[Journal]) -> None:
    """Prove that copies of all disks of one guest, in the order of their targets, are of one moment.

    The guest writes its disks in turn, so at any moment an earlier disk is level with a later one or one record ahead.
    Raises ProofError.
    """
    lasts = [journal.last for journal in journals]
    if lasts != sorted(lasts, reverse=True) or lasts[0] - lasts[-1] > 1:
        raise ProofError(f"the disks end with records {lasts}: that is not one moment of the guest")


def prove_snapshot(images: Mapping[str, Path], bounds: Bounds, *, formats: Mapping[str, str] = {}) -> list[Journal]:
    """Prove that images, by target, are those of one snapshot: each is sound and within the bounds, all of one moment.

    Returns what each holds, in the order of the targets. The formats are probed where they are not given. Raises
    ProofError.
    """
    found = [
        prove(
            images[target],
            acknowledged_at_least=bounds.at_least[target],
            at_most=bounds.at_most[target] if bounds.at_most else None,
            image_format=formats.get(target, ""),
        )
        for target in sorted(images)
    ]
    prove_one_moment(found)
    return found


def _dumped(raw: Path, name: str, directory: str) -> bytes:
    """The content of a file in the ext4 image, empty where there is none."""
    target = Path(directory, name)
    _run(raw, f"/{name} cannot be read", "debugfs", "-R", f"dump /{name} {target}", str(raw))
    return target.read_bytes() if target.exists() else b""


def _run(image: Path, wrong: str, *command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProofError(f"{image}: {wrong}: {(done.stdout + done.stderr).strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="sandbox.oracle", description="Say what images of a test guest's disks hold.")
    parser.add_argument("image", type=Path, nargs="+")
    parser.add_argument("--format", default="", help="of the images: raw or qcow2 (default: probed)")
    arguments = parser.parse_args()
    failed = False
    for image in arguments.image:
        try:
            print(f"{image}: file system clean; {read_image(image, image_format=arguments.format)}")
        except ProofError as error:
            failed = True
            print(error, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
