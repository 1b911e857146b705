"""A private libvirtd, our connection to it, and domains on it (tests/support/domains.py)."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from sandbox.guest import Guest as WritingGuest
from sandbox.guest import make_disk as make_ext4
from sandbox.libvirtd import CRASHED, DiskSpec, Libvirtd, domain_xml
from tests.support.domains import Domain, DomainFactory, GuestFactory, at_work, make_disk
from vmbackup.hypervisor.hypervisor import Hypervisor

_numbers = count(1)


@contextmanager
def private_libvirtd() -> Generator[Libvirtd]:
    """A libvirtd of the tests. If it crashes, it is started again, and a warning of the run shows its log."""
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))
    with Libvirtd(directory) as running:
        yield running
    log = running.log_file.read_text(errors="replace")
    for crash in re.finditer(rf"(?:.*\n){{0,5}}{CRASHED}.*", log):
        warnings.warn(crash[0], stacklevel=1)  # a defect of libvirt, which the tests that it falls into survive
    shutil.rmtree(directory)


@contextmanager
def connected(libvirtd: Libvirtd) -> Generator[Hypervisor]:
    """Our connection to a libvirtd."""
    made = Hypervisor(libvirtd.uri, config_dir=libvirtd.config_dir)
    yield made
    made.close()


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    """A private libvirtd, one for the whole run. A test that kills it starts it again."""
    with private_libvirtd() as running:
        yield running


@pytest.fixture(scope="session")
def hypervisor(libvirtd: Libvirtd) -> Iterator[Hypervisor]:
    """Our connection to it."""
    with connected(libvirtd) as hypervisor:
        yield hypervisor


@pytest.fixture
def domain(libvirtd: Libvirtd, hypervisor: Hypervisor, tmp_path: Path) -> Iterator[DomainFactory]:
    """Make domains that are gone after the test."""
    made: list[Domain] = []

    def make(
        disks: Mapping[str, str] | None = None,
        *,
        persistent: bool = True,
        start: bool = True,
        directory: Path | None = None,
        size: str = "64M",
        more_disks: tuple[DiskSpec, ...] = (),
        devices: str = "",
        os_xml: str = "",
        extra: str = "",
    ) -> Domain:
        name = f"guest-{next(_numbers)}"
        directory = (directory or tmp_path) / name
        directory.mkdir()
        specs = [make_disk(directory, target, kind, size) for target, kind in (disks or {"vda": "raw"}).items()]
        xml = directory / "domain.xml"
        xml.write_text(domain_xml(name, [*specs, *more_disks], devices=devices, os_xml=os_xml, extra=extra))
        if persistent:
            libvirtd.virsh("define", str(xml))
        if start:
            libvirtd.virsh(*(("start", name) if persistent else ("create", str(xml))), "--paused")
        guest = hypervisor.guest(name)
        made.append(Domain(libvirtd, guest, directory, {spec.target: str(spec.path) for spec in specs}))
        return made[-1]

    yield make
    libvirtd.start()
    for each in made:
        with suppress(KeyError):
            libvirtd.kill_guest(each.name)
        with suppress(RuntimeError):
            libvirtd.virsh("undefine", each.guest.uuid)


@pytest.fixture
def guests(domain: DomainFactory, libvirtd: Libvirtd) -> GuestFactory:
    """Make running guests."""

    def make(count: int) -> list[Domain]:
        made = [domain({"vda": "raw", "vdb": "qcow2"}, size="4M") for _ in range(count)]
        for guest in made:
            libvirtd.virsh("resume", guest.name)
        return made

    return make


@pytest.fixture
def writer(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[WritingGuest]:
    """A Linux guest with a guest agent that has begun to write numbered records to a raw and a qcow2 disk."""
    disks = [
        make_ext4("vda", tmp_path / "vda.raw", size_mib=64),
        make_ext4("vdb", tmp_path / "vdb.qcow2", image_format="qcow2", size_mib=64, bulk_mib=8),
    ]
    guest = WritingGuest(libvirtd.virsh, "writer", tmp_path, disks, agent=True, dirty_kib_per_second=256)
    with at_work(guest, libvirtd):
        yield guest
