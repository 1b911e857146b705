"""The guests of a soak, and what their images must hold: guests of one sector (writer.S), and a Linux (sandbox.guest).

Both append numbered records to each of their disks, and acknowledge a number on the serial line once it is durable.
"""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from uuid import NAMESPACE_DNS, uuid5

from sandbox import oracle
from sandbox.guest import make_disk
from sandbox.libvirtd import DiskSpec, domain_xml
from sandbox.oracle import ProofError
from tests.chaos.soak.choices import REFLINKS
from tests.chaos.soak.host import Host
from tests.support.agent_channel import Channel, ProxiedGuest
from tests.support.domains import qemu_img, what_is_wrong_with
from tests.support.storage import run
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.terms import Power

KINDS = ("plain", "chain", "tight", "linux", "cut")
MOST_RECORDS = 32767
USERS_LIMITS = {"total_bytes_sec": 64 << 20}  # of both disks of a guest of the kind plain

_ACKNOWLEDGED = re.compile(rb"^(vd[a-z]) (\d+)\n", re.MULTILINE)
_STARTED = re.compile(rb"(vd[a-z]) start (\d+)\r?\n")
_SECTOR = 512
_FIRST, _BULK, _BULK_SECTORS = 2047, 36864, 64  # as in writer.S
_BLOCKS = 256
_BYTES = (_BULK + _BLOCKS * _BULK_SECTORS) * _SECTOR


class LostError(ProofError):
    """So many acknowledged records are not there."""

    def __init__(self, text: str, records: int) -> None:
        super().__init__(f"{text}: lost records: {records}")
        self.records = records


class Subject:
    """One guest. `bases`: its images, by target."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name
        self.kind = name.rpartition("-")[0]
        self.directory = host.directory / name
        mebibytes = {"chain": 400, "cut": 400, "tight": 160}.get(self.kind, 0)
        reflink = self.kind in REFLINKS
        self.images = host.place(f"{name}/images", mebibytes=mebibytes, reflink=reflink)
        tight = self.kind == "tight"
        room = self.images if reflink else host.place(f"{name}/store", mebibytes=300 * tight)
        self.store = room / "store"
        self.store.mkdir()
        self.state_dir = host.place(f"{name}/state", mebibytes=8 * (tight or self.kind == "cut"))
        self.limits = USERS_LIMITS if self.kind == "plain" else {}
        self.channel = Channel(self.directory / "agent.sock")
        self.serial_log = self.directory / f"{name}.serial.log"
        self.xml_file = self.directory / "domain.xml"
        self.disks = self._make_disks()
        self.bases = {disk.target: Path(disk.path) for disk in self.disks}
        self.xml_file.write_text(self._xml())
        self.guest = Guest(host.hypervisor, str(uuid5(NAMESPACE_DNS, name)), name)
        self.description = ""
        self.edited = (0.0, 0.0)  # the last edit of it, CLOCK_MONOTONIC, in seconds
        self.wanted = Power.RUNNING

    def start(self) -> None:
        """Define and start it."""
        self.host.virsh("define", str(self.xml_file))
        self.defined = self.host.patiently(self.guest.persistent_xml) or ""
        self.host.sync()
        self.host.virsh("start", self.name)

    def clear_store(self) -> None:
        """Make room."""
        for path in self.store.iterdir():
            shutil.rmtree(path)

    @property
    def overlays(self) -> list[Path]:
        """The files of our overlays."""
        return sorted(self.images.glob("*.vmb-*"))

    # -- what it has acknowledged

    def acknowledged(self, length: int | None = None) -> dict[str, int]:
        """The last number that is acknowledged, by target, or was when its serial log had that length."""
        said = self._said(length)
        return {target: max((n for disk, n in said if disk == target), default=0) for target in self.bases}

    def at_most(self, length: int | None = None) -> dict[str, int]:
        """The last record that can have been written, by target: one more than acknowledged or found at boot."""
        found = dict(self._found(length))
        return {target: max(number, found.get(target, 0)) + 1 for target, number in self.acknowledged(length).items()}

    def assert_only_rising(self) -> None:
        """Raise ProofError if it ever acknowledged a number again, or a lower one: it went back in time."""
        for target in self.bases:
            for before, after in pairwise(n for disk, n in self._said() if disk == target):
                if after <= before:
                    text = f"{target}: {after} was acknowledged after {before}: the guest went back in time"
                    raise LostError(text, before - after + 1)

    def _said(self, length: int | None = None) -> list[tuple[str, int]]:
        return [(match[1].decode(), int(match[2])) for match in _ACKNOWLEDGED.finditer(self._serial(length))]

    def _found(self, length: int | None = None) -> list[tuple[str, int]]:
        return [(match[1].decode(), int(match[2]) - 1) for match in _STARTED.finditer(self._serial(length))]

    def _serial(self, length: int | None) -> bytes:
        return self.serial_log.read_bytes()[:length] if self.serial_log.exists() else b""

    # -- what its images hold

    def prove(self, images: Mapping[str, Path], at_least: Mapping[str, int], at_most: Mapping[str, int]) -> int:
        """Prove that these images (nobody may write them) are sound and hold these records, all of one moment.

        Returns how many records were found. Raises ProofError.
        """
        found: list[oracle.Journal] = []
        for target in sorted(images):
            with tempfile.TemporaryDirectory(dir=self.directory) as folder:
                raw = Path(folder, "raw")
                image_format = "raw" if images[target].suffix == ".raw" else "qcow2"
                _check(images[target])
                qemu_img("convert", "-U", "-f", image_format, "-O", "raw", str(images[target]), str(raw))
                journal = self._read(raw, f"{self.name} {images[target]}")
            if journal.last < at_least[target]:
                text = f"{images[target]} ends with record {journal.last}, yet {at_least[target]} was acknowledged"
                raise LostError(text, at_least[target] - journal.last)
            if target in at_most and journal.last > at_most[target]:
                raise ProofError(f"{images[target]} holds record {journal.last}, written after {at_most[target]}")
            found.append(journal)
        oracle.prove_one_moment(found)
        return sum(journal.last for journal in found)

    def _read(self, raw: Path, name: str) -> oracle.Journal:
        return oracle.read_image(raw, image_format="raw") if self.kind == "linux" else read_sectors(raw, name)

    # -- how it is made

    def _make_disks(self) -> list[DiskSpec]:
        if self.kind == "linux":
            vda = make_disk("vda", self.images / "vda.raw", size_mib=48, bulk_mib=4)
            return [vda, make_disk("vdb", self.images / "vdb.qcow2", image_format="qcow2", size_mib=48, bulk_mib=4)]
        boot = self.images / "boot.raw"
        boot.write_bytes(boot_sector(self.directory))
        with boot.open("r+b") as file:
            file.truncate(_BYTES)
        vda = self.images / ("vda.qcow2" if self.kind == "chain" else "vda.raw")
        vdb = self.images / ("vdb.raw" if self.kind == "chain" else "vdb.qcow2")
        if self.kind == "chain":
            template = str(self.images / "template.qcow2")
            qemu_img("convert", "-f", "raw", "-O", "qcow2", str(boot), template)
            qemu_img("create", "-f", "qcow2", "-b", template, "-F", "qcow2", str(vda))
        else:
            shutil.copy(boot, vda)
        qemu_img("create", "-f", vdb.suffix[1:], str(vdb), str(_BYTES))
        boot.unlink()
        inner = "<boot order='{}'/>"  # without it the BIOS does not see the second disk
        limits = "".join(f"<{name}>{number}</{name}>" for name, number in self.limits.items())
        inner += f"<iotune>{limits}</iotune>" if limits else ""
        paths = enumerate((vda, vdb), start=1)
        return [DiskSpec(f"vd{'ab'[n - 1]}", path, path.suffix[1:], inner=inner.format(n)) for n, path in paths]

    def _xml(self) -> str:
        if self.kind == "linux":
            linux = ProxiedGuest(
                self.host.virsh,
                self.name,
                self.directory,
                self.disks,
                records_per_second=10,
                dirty_kib_per_second=128,
                agent=True,
                memory_mib=96,
            )
            linux.channel = self.channel.path
            return linux.xml()
        serial = f"<serial type='file'><source path='{self.serial_log}' append='on'/></serial>"
        xml = domain_xml(self.name, self.disks, uuid=str(uuid5(NAMESPACE_DNS, self.name)), devices=serial)
        return xml.replace("<driver name='qemu'", "<driver name='qemu' cache='writethrough'")


def boot_sector(directory: Path) -> bytes:
    """writer.S as the first sector of a disk."""
    source, assembled, linked = Path(__file__).with_name("writer.S"), directory / "writer.o", directory / "writer"
    run("gcc", "-c", "-o", str(assembled), str(source))
    run("ld", "-Ttext=0x7c00", "--oformat=binary", "-o", str(linked), str(assembled))
    return linked.read_bytes()


def read_sectors(raw: Path, name: str) -> oracle.Journal:
    """What an image of a guest of one sector holds. Raises ProofError where a record or its bulk is not as written."""
    content = raw.read_bytes()
    last = 0
    while _holds(content, _FIRST + last + 1, 1, last + 1):
        last += 1
    if content[(_FIRST + last + 1) * _SECTOR : _BULK * _SECTOR].strip(b"\0"):
        raise ProofError(f"{name}: record {last + 1} is missing or torn, yet there is something there or after it")
    under_way = _block_of(last + 1)
    newest = {_block_of(number): number for number in range(max(1, last - _BLOCKS + 1), last + 1)}
    for block in range(_BLOCKS):
        number = newest.get(block, 0)
        if block != under_way and not _holds(content, _BULK + block * _BULK_SECTORS, _BULK_SECTORS, number):
            raise LostError(f"{name}: block {block} of its bulk is not as it was written with record {number}", 1)
    return oracle.Journal(last)


def _check(image: Path) -> None:
    """Raise ProofError where qemu-img finds more than clusters that nobody uses: a QEMU that was killed leaves some."""
    if wrong := what_is_wrong_with(image, leaks=True):
        raise ProofError(wrong)


def _block_of(number: int) -> int:
    return number * 37 % _BLOCKS  # each of them once in 256 numbers: 37 is odd


def _holds(content: bytes, sector: int, sectors: int, number: int) -> bool:
    where = sector * _SECTOR
    length = sectors * _SECTOR
    return content[where : where + length] == struct.pack("<I", number) * (length // 4)
