"""Our lock bytes against those of a real QEMU and qemu-img: each sees the other."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.storage import run
from vmbackup.errors import TransientError
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import clone_or_copy, copy_file, opened_image
from vmbackup.imaging.image import QcowState, info, qcow_state
from vmbackup.imaging.locks import has_writer, hold_reader_lock, is_locked
from vmbackup.imaging.merge import same_where_written
from vmbackup.protocol.record import DiskRecord
from vmbackup.reconcile.background import merging

pytest_plugins = ("tests.support.fixtures_storage",)


class Qemu:
    """A paused QEMU without a guest, that has images open as disks, and a QMP connection to it."""

    def __init__(self, stack: ExitStack, *disks: tuple[Path, str]) -> None:
        ours, theirs = socket.socketpair()
        stack.enter_context(closing(ours))
        command = ["qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "32"]
        command += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        for number, (path, image_format) in enumerate(disks):
            driver = "host_device" if path.is_block_device() else "file"
            node = {
                "node-name": f"disk{number}",
                "driver": image_format,
                "file": {"driver": driver, "filename": str(path)},
            }
            command += [
                "-blockdev",
                json.dumps(node),
                "-device",
                f"virtio-blk-pci,drive=disk{number},id=device{number}",
            ]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        stack.callback(self._process.wait, 30)
        stack.callback(self._process.kill)
        theirs.close()
        ours.settimeout(30)
        self._answers = stack.enter_context(ours.makefile())
        self._socket = ours
        self._events: list[Any] = []
        assert "QMP" in json.loads(self._answers.readline())
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        """The answer; an error of QEMU is raised as RuntimeError with its text."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._answers.readline())
            if "error" in answer:
                raise RuntimeError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
            self._events.append(answer)

    def wait_for(self, event: str) -> Any:
        """The data of an event, which may have come already."""
        for seen in self._events:
            if seen["event"] == event:
                return seen["data"]
        self._events.append(json.loads(self._answers.readline()))
        return self.wait_for(event)

    def write(self, pattern: int) -> None:
        """Write 512 bytes to the first disk as a guest would."""
        for command in (f"write -P {pattern} 0 512", "flush"):
            line = f'qemu-io -d /machine/peripheral/device0/virtio-backend "{command}"'
            assert self.qmp("human-monitor-command", **{"command-line": line}) == ""

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)

    def snapshot(self, overlay: Path) -> None:
        """disk0 goes on in the overlay; what it was on is frozen."""
        self.qmp(
            "blockdev-snapshot-sync",
            **{"node-name": "disk0", "snapshot-file": str(overlay), "format": "qcow2"},
            **{"snapshot-node-name": "overlay"},
        )


@pytest.fixture
def qemu() -> Iterator[Callable[..., Qemu]]:
    with ExitStack() as stack:
        yield lambda *disks: Qemu(stack, *disks)


@pytest.fixture(params=["raw", "qcow2", "block device"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """An image of 4 MiB and its format."""
    if request.param == "block device":
        return request.getfixturevalue("loop_device"), "raw"
    path = tmp_path / f"disk.{request.param}"
    run("qemu-img", "create", "-q", "-f", request.param, str(path), "4M")
    return path, request.param


Images = tuple[Path, str]


def test_an_image_that_nobody_has_open_is_not_locked(image: Images) -> None:
    assert not is_locked(image[0])
    assert not has_writer(image[0])


def test_the_disk_of_a_running_qemu_is_locked_and_has_a_writer(image: Images, qemu: Callable[..., Qemu]) -> None:
    qemu(image)
    assert is_locked(image[0])
    assert has_writer(image[0])


def test_the_locks_go_with_a_killed_qemu(image: Images, qemu: Callable[..., Qemu]) -> None:
    qemu(image).kill()
    assert not is_locked(image[0])


def test_the_disk_of_a_running_qemu_is_not_copied(image: Images, qemu: Callable[..., Qemu], tmp_path: Path) -> None:
    qemu(image)
    with pytest.raises(TransientError, match="being written by another process") as error:
        copy_file(image[0], tmp_path / "copy", CopyControl())
    assert error.value.reason == "ImageBusy"


def test_a_frozen_base_is_locked_without_a_writer_and_can_be_copied(
    image: Images, qemu: Callable[..., Qemu], tmp_path: Path
) -> None:
    qemu(image).snapshot(tmp_path / "overlay.qcow2")
    assert is_locked(image[0])
    assert not has_writer(image[0])
    copy_file(image[0], tmp_path / "copy", CopyControl())
    clone_or_copy(image[0], tmp_path / "clone", CopyControl())


def test_the_overlay_of_a_running_qemu_is_seen_as_locked_and_afterwards_as_empty(
    image: Images, qemu: Callable[..., Qemu], tmp_path: Path
) -> None:
    machine, overlay = qemu(image), tmp_path / "overlay.qcow2"
    machine.snapshot(overlay)
    assert qcow_state(overlay) == QcowState(locked=True, empty=None)
    machine.kill()
    assert qcow_state(overlay) == QcowState(locked=False, empty=True)


def test_what_qemu_wrote_to_the_overlay_makes_it_not_empty(
    image: Images, qemu: Callable[..., Qemu], tmp_path: Path
) -> None:
    machine, overlay = qemu(image), tmp_path / "overlay.qcow2"
    machine.snapshot(overlay)
    machine.write(1)
    machine.kill()
    assert qcow_state(overlay) == QcowState(locked=False, empty=False)


def test_a_commit_cannot_write_base_under_our_copy(image: Images, qemu: Callable[..., Qemu], tmp_path: Path) -> None:
    machine = qemu(image)
    machine.snapshot(tmp_path / "overlay.qcow2")
    commit = {"job-id": "commit", "device": "overlay", "base-node": "disk0"}
    with opened_image(image[0]) as fd:
        hold_reader_lock(fd)
        with pytest.raises(RuntimeError, match='Failed to get "write" lock'):
            machine.qmp("block-commit", **commit)
    machine.qmp("block-commit", **commit)
    assert machine.wait_for("BLOCK_JOB_READY")["device"] == "commit"


def test_a_base_that_is_being_committed_to_is_not_copied(
    image: Images, qemu: Callable[..., Qemu], tmp_path: Path
) -> None:
    machine = qemu(image)
    machine.snapshot(tmp_path / "overlay.qcow2")
    machine.qmp("block-commit", **{"job-id": "commit", "device": "overlay", "base-node": "disk0"})
    machine.wait_for("BLOCK_JOB_READY")
    assert has_writer(image[0])
    with pytest.raises(TransientError, match="being written"):
        copy_file(image[0], tmp_path / "copy", CopyControl())


def test_while_we_read_nobody_starts_to_write(image: Images, qemu: Callable[..., Qemu]) -> None:
    with opened_image(image[0]) as fd:
        hold_reader_lock(fd)
        assert is_locked(image[0])
        assert not has_writer(image[0])
        write = ["qemu-io", "-f", image[1], "-c", "write 0 512", str(image[0])]
        refused = subprocess.run(write, capture_output=True, text=True, check=False, timeout=60)
        assert 'Failed to get "write" lock' in refused.stderr
    assert not is_locked(image[0])


def test_two_readers_do_not_disturb_each_other(image: Images, tmp_path: Path) -> None:
    with opened_image(image[0]) as one, opened_image(image[0]) as other:
        hold_reader_lock(one)
        hold_reader_lock(other)
        run("qemu-img", "convert", "-f", image[1], "-O", "raw", str(image[0]), str(tmp_path / "out.raw"))


def test_we_hold_what_qemu_img_convert_holds(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(b"x" * (4 << 20))
    convert = subprocess.Popen(
        ["qemu-img", "convert", "-p", "-r", "1M", "-f", "raw", "-O", "raw", str(source), str(tmp_path / "out.raw")],
        stdout=subprocess.PIPE,
    )
    try:
        assert convert.stdout
        convert.stdout.read(1)  # the progress: it has both open
        theirs = lock_bytes(source)
    finally:
        convert.kill()
        convert.communicate(timeout=30)
    with opened_image(source) as fd:
        hold_reader_lock(fd)
        assert lock_bytes(source) == theirs
    assert theirs


def lock_bytes(path: Path) -> set[tuple[str, str]]:
    """Kind and range of each lock on a file, as the kernel lists them."""
    inode = str(path.stat().st_ino)
    rows = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return {(row[3], f"{row[6]}-{row[7]}") for row in rows if len(row) == 8 and row[5].split(":")[-1] == inode}


def test_an_image_in_use_is_described_but_not_compared(qemu: Callable[..., Qemu], tmp_path: Path) -> None:
    path, other = tmp_path / "disk.qcow2", tmp_path / "other.raw"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(path), "4M")
    run("qemu-img", "create", "-q", "-f", "raw", str(other), "4M")
    qemu((path, "qcow2"))
    assert info(path, "qcow2").virtual_bytes == 4 << 20
    with pytest.raises(TransientError, match="is in use") as error:
        same_where_written(path, other, "raw", CopyControl())
    assert error.value.reason == "ImageBusy"


def test_nobody_can_write_to_images_while_they_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "raw", str(base), "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay))
    refused: list[str] = []

    def compare(*_: object) -> bool:
        for image, kind in ((base, "raw"), (overlay, "qcow2")):
            write = ["qemu-io", "-f", kind, "-c", "write 0 4k", str(image)]
            refused.append(subprocess.run(write, capture_output=True, text=True, check=False).stderr)
        return same_where_written(overlay, base, "raw", CopyControl())

    monkeypatch.setattr(merging, "same_where_written", compare)
    assert merging.compare(DiskRecord("vda", base=str(base), overlay=str(overlay), format="raw"), CopyControl())
    assert all('Failed to get "write" lock' in each for each in refused)
    assert len(refused) == 2
