"""The test guest and its oracle can be trusted: sound images pass, broken ones are found."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox.guest import Guest, make_disk
from sandbox.libvirtd import Libvirtd
from sandbox.oracle import RECORD_BYTES, Journal, ProofError, main, prove, prove_one_moment, read_image, read_journal


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    with tempfile.TemporaryDirectory(prefix="vmb-") as directory, Libvirtd(directory) as libvirtd:
        yield libvirtd


@pytest.fixture
def guest(writer: Guest) -> Guest:
    """A guest on a raw disk and a qcow2 disk that has begun to write."""
    return writer


def acknowledged(guest: Guest) -> dict[str, int]:
    return {target: guest.acknowledged(target) for target in guest.disks}


def image_of(guest: Guest, target: str) -> Path:
    return Path(guest.disks[target].path)


def test_a_backup_by_plain_virsh_is_proven_on_both_sides(libvirtd: Libvirtd, guest: Guest, tmp_path: Path) -> None:
    before = acknowledged(guest)
    overlays = [f"--diskspec={target},file={tmp_path / target}.overlay.qcow2" for target in guest.disks]
    libvirtd.virsh("snapshot-create-as", "writer", "s", "--disk-only", "--atomic", "--no-metadata", *overlays)
    after = acknowledged(guest)
    guest.wait_for_more(5)  # these are only in the overlays
    copies = {target: Path(shutil.copy(image_of(guest, target), tmp_path / f"{target}.copy")) for target in guest.disks}
    for target in guest.disks:
        base = str(image_of(guest, target))
        libvirtd.virsh("blockcommit", "writer", target, "--active", "--base", base, "--pivot", "--wait")
    guest.wait_for_more(5)
    guest.destroy()

    journals = [
        prove(copy, acknowledged_at_least=before[target], at_most=after[target] + 1, image_format=disk.format)
        for (target, copy), disk in zip(copies.items(), guest.disks.values(), strict=True)
    ]
    prove_one_moment(journals)
    for target, last in acknowledged(guest).items():
        home = prove(image_of(guest, target), acknowledged_at_least=last, at_most=last + 1)
        assert home.last >= after[target] + 10
    assert journals[1].bulk_blocks == (8 << 20) // 4096
    guest.assert_only_rising()
    with pytest.raises(ProofError, match="acknowledged writes are lost, or the image is a stale one"):
        prove(copies["vda"], acknowledged_at_least=acknowledged(guest)["vda"])


def test_after_a_power_cut_the_guest_goes_on_behind_its_last_record(guest: Guest) -> None:
    guest.destroy()
    last = acknowledged(guest)
    guest.start()
    guest.wait_for_more(3)
    for target in guest.disks:
        assert guest.starts(target) in ([1, last[target] + 1], [1, last[target] + 2])
    guest.assert_only_rising()


def test_a_guest_sent_back_in_time_shows_itself(guest: Guest, tmp_path: Path) -> None:
    guest.destroy()
    stale = shutil.copy(image_of(guest, "vda"), tmp_path / "stale")
    guest.start()
    guest.wait_for_more(5)
    guest.destroy()
    shutil.copy(stale, image_of(guest, "vda"))
    guest.start()
    guest.wait_for_more(3)
    with pytest.raises(ProofError, match=r"vda: \d+ was acknowledged after \d+: the guest went back in time"):
        guest.assert_only_rising()


def test_half_a_line_at_a_power_cut_is_no_acknowledgement(guest: Guest) -> None:
    guest.destroy()
    last = acknowledged(guest)
    with guest.serial_log.open("ab") as log:
        log.write(b"vda 1")  # of 17, say
    guest.start()
    guest.wait_for_more(3)
    assert len(guest.starts("vda")) == 2
    assert 1 < last["vda"] < guest.history("vda")[-3]
    guest.assert_only_rising()


def test_a_disk_that_the_guest_cannot_use_is_told(guest: Guest) -> None:
    guest.destroy()
    image_of(guest, "vda").write_bytes(bytes(64 << 20))
    guest.start()
    with pytest.raises(ProofError, match="vda failed to mount"):
        guest.wait_for_more(3)
    with pytest.raises(ProofError, match="vda failed to mount"):
        guest.acknowledged("vdb")


def test_a_frozen_guest_acknowledges_nothing_until_it_is_thawed(libvirtd: Libvirtd, guest: Guest) -> None:
    guest.wait_for_agent()
    libvirtd.virsh("domfsfreeze", "writer")
    frozen_at = acknowledged(guest)
    with pytest.raises(ProofError, match="not after 3 more records"):
        guest.wait_for_more(3, seconds=1)
    last = acknowledged(guest)
    assert all(last[target] <= frozen_at[target] + 1 for target in last)
    libvirtd.virsh("domfsthaw", "writer")
    guest.wait_for_more(3)


def test_a_guest_shuts_down_cleanly_when_asked(guest: Guest) -> None:
    guest.shut_down()
    for target, last in acknowledged(guest).items():
        prove(image_of(guest, target), acknowledged_at_least=last, at_most=last + 1)


def test_an_image_in_use_is_refused(guest: Guest) -> None:
    with pytest.raises(ProofError, match=r"cannot be read.*lock"):
        read_image(image_of(guest, "vdb"))


@pytest.fixture(scope="module")
def journal(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A journal that the guest really wrote."""
    directory = tmp_path_factory.mktemp("journal")
    guest = Guest(libvirtd.virsh, "journal", directory, [make_disk("vda", directory / "vda.raw", size_mib=32)])
    guest.create()
    guest.wait_for(20)
    guest.shut_down(seconds=30)
    debugfs(image_of(guest, "vda"), f"dump /journal {directory}/journal")
    return (directory / "journal").read_bytes()


def debugfs(image: Path, request: str, *options: str) -> None:
    subprocess.run(["debugfs", *options, "-R", request, str(image)], check=True, capture_output=True)


def record(number: int) -> slice:
    return slice((number - 1) * RECORD_BYTES, number * RECORD_BYTES)


def without_record_7(journal: bytearray) -> None:
    del journal[record(7)]


def with_record_7_emptied(journal: bytearray) -> None:
    journal[record(7)] = bytes(RECORD_BYTES)


def with_record_7_twice(journal: bytearray) -> None:
    journal[record(8)] = journal[record(7)]


def with_half_of_record_7(journal: bytearray) -> None:
    journal[record(7).stop - RECORD_BYTES // 2 : record(7).stop] = bytes(RECORD_BYTES // 2)


def with_one_bit_of_record_7_changed(journal: bytearray) -> None:
    journal[record(7).start + 300] ^= 1


def with_a_stranger_as_record_7(journal: bytearray) -> None:
    journal[record(7)] = random.Random(7).randbytes(RECORD_BYTES)


def with_half_a_record_at_the_end(journal: bytearray) -> None:
    del journal[-RECORD_BYTES // 2 :]


@pytest.mark.parametrize(
    ("doctor", "complaint"),
    [
        (without_record_7, "record 8 stands where record 7 belongs"),
        (with_record_7_emptied, "record 7 is missing, but later records exist"),
        (with_record_7_twice, "record 7 stands where record 8 belongs"),
        (with_half_of_record_7, "record 7 is torn"),
        (with_one_bit_of_record_7_changed, "record 7 is torn"),
        (with_a_stranger_as_record_7, "record 7 is torn"),
        (with_half_a_record_at_the_end, r"record \d+ is torn: 256 of 512 bytes"),
    ],
)
def test_a_broken_journal_is_refused(journal: bytes, doctor: Callable[[bytearray], None], complaint: str) -> None:
    doctored = bytearray(journal)
    doctor(doctored)
    with pytest.raises(ProofError, match=complaint):
        read_journal(bytes(doctored), name="doctored")


def test_room_after_the_last_record_is_no_fault(journal: bytes) -> None:
    """As a power cut leaves it: the file has grown, the record itself has not arrived, nor was it acknowledged."""
    whole = read_journal(journal, name="whole")
    assert whole.last >= 20
    assert read_journal(journal + bytes(RECORD_BYTES), name="grown") == whole
    assert read_journal(b"", name="empty") == Journal()


@pytest.mark.parametrize(
    ("lasts", "one_moment"),
    [([5, 5], True), ([6, 5], True), ([6, 6, 5], True), ([5, 6], False), ([7, 5], False), ([6, 5, 6], False)],
)
def test_disks_of_different_moments_are_told_apart(lasts: list[int], one_moment: bool) -> None:
    journals = [Journal(last) for last in lasts]
    if one_moment:
        prove_one_moment(journals)
    else:
        with pytest.raises(ProofError, match="not one moment"):
            prove_one_moment(journals)


def overwrite(image: Path, what: bytes, with_: bytes) -> None:
    content = image.read_bytes()
    assert what in content
    image.write_bytes(content.replace(what, with_))


def test_a_damaged_image_is_refused_and_the_command_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "vda.raw"
    make_disk("vda", image, size_mib=32, bulk_mib=1)
    monkeypatch.setattr("sys.argv", ["oracle", str(image)])
    assert main() == 0
    assert "file system clean; no records, and 1 MiB of bulk data: all intact" in capsys.readouterr().out

    block = first_bulk_block(image)
    overwrite(image, block, block[:2048] + bytes(2048))
    assert main() == 1
    assert "block 0 of its bulk file is torn" in capsys.readouterr().err

    debugfs(image, "clri /bulk", "-w")
    assert main() == 1
    assert "its file system is damaged" in capsys.readouterr().err


def first_bulk_block(image: Path) -> bytes:
    target = image.with_name("bulk")
    debugfs(image, f"dump /bulk {target}")
    return target.read_bytes()[:4096]
