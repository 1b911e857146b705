from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.storage import run
from vmbackup.errors import PermanentError, TransientError
from vmbackup.imaging import CopyControl, image
from vmbackup.imaging.errors import classified, errors_of
from vmbackup.imaging.image import QcowState, info, qcow_state, rebase
from vmbackup.imaging.merge import same_where_written

UNLOCKED_EMPTY = QcowState(locked=False, empty=True)
UNLOCKED_WITH_DATA = QcowState(locked=False, empty=False)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    run("qemu-img", "create", "-q", "-f", "raw", str(path), "64M")
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", str(path))
    return path


@pytest.fixture
def overlay(base: Path) -> Path:
    path = base.with_name("overlay.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", str(path))
    return path


def write(path: Path, command: str) -> None:
    run("qemu-io", "-f", "qcow2", "-c", command, str(path))


class TestQcowState:
    def test_no_file_is_none(self, tmp_path: Path) -> None:
        assert qcow_state(tmp_path / "overlay.qcow2") is None

    @pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "cluster_size=2M", "extended_l2=on"])
    def test_a_fresh_overlay_is_empty_however_full_its_base(self, options: str, base: Path) -> None:
        path = base.with_name("fresh.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base.name, "-F", "raw", str(path))
        assert qcow_state(path) == UNLOCKED_EMPTY

    @pytest.mark.parametrize("command", ["write -P 5 0 512", "write -z 0 64k", "write -P 5 63M 64k"])
    def test_one_write_and_it_is_not_empty(self, command: str, overlay: Path) -> None:
        write(overlay, command)
        assert qcow_state(overlay) == UNLOCKED_WITH_DATA

    def test_reads_do_not_fill_it(self, overlay: Path) -> None:
        write(overlay, "read 0 64M")
        assert qcow_state(overlay) == UNLOCKED_EMPTY

    def test_an_internal_snapshot_is_content(self, overlay: Path) -> None:
        run("qemu-img", "snapshot", "-c", "one", str(overlay))
        assert qcow_state(overlay) == QcowState(locked=False, empty=False, holds_snapshot=True)

    def test_a_file_whose_creation_was_cut_short_is_empty(self, tmp_path: Path) -> None:
        (tmp_path / "cut.qcow2").touch()
        assert qcow_state(tmp_path / "cut.qcow2") == UNLOCKED_EMPTY

    @pytest.mark.parametrize("content", [b"QFI\xfb", bytes(1 << 20), b"something else" * 100, b"QFI\xfb" + bytes(68)])
    def test_what_is_not_understood_is_not_called_empty(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "odd.qcow2").write_bytes(content)
        assert qcow_state(tmp_path / "odd.qcow2") == UNLOCKED_WITH_DATA

    def test_an_overlay_cut_off_in_its_l1_table_is_not_called_empty(self, overlay: Path) -> None:
        os.truncate(overlay, 3 * 65536 + 1)
        assert qcow_state(overlay) == UNLOCKED_WITH_DATA


class TestInfo:
    def test_it_tells_format_sizes_and_backing(self, overlay: Path) -> None:
        found = info(overlay)
        assert (found.format, found.virtual_bytes, found.backing) == ("qcow2", 64 << 20, "base.raw")
        assert 0 < found.allocated_bytes < 1 << 20
        assert (found.data_file, found.encrypted) == (None, False)

    def test_a_known_format_is_not_probed(self, overlay: Path) -> None:
        assert info(overlay, "raw").backing is None

    def test_an_external_data_file_is_told(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data.raw", str(path), "1M")
        assert info(path).data_file == f"{tmp_path}/data.raw"

    def test_encryption_is_told(self, tmp_path: Path) -> None:
        path, options = (
            tmp_path / "disk.qcow2",
            "encrypt.format=aes,encrypt.key-secret=key",
        )  # luks measures the CPU, and fails on a busy one
        secret = ("--object", "secret,id=key,data=s")
        run("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", options, str(path), "1M")
        assert info(path).encrypted

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(PermanentError, match=r"gone\.img: No such file .*put it back") as error:
            info(tmp_path / "gone.img")
        assert error.value.reason == "NotFound"

    def test_a_damaged_image_is_named_with_what_qemu_img_says(self, overlay: Path) -> None:
        with overlay.open("r+b") as file:
            file.seek(4)
            file.write(b"\0\0\0\x09")
        with pytest.raises(PermanentError, match=r"overlay\.qcow2: .*Unsupported qcow2 version 9"):
            info(overlay, "qcow2")


class TestSameWhereWritten:
    def test_an_empty_overlay_is_as_its_base(self, base: Path, overlay: Path) -> None:
        assert same_where_written(overlay, base, "raw", CopyControl())

    def test_one_other_byte_is_seen(self, base: Path, overlay: Path) -> None:
        write(overlay, "write -P 9 1000 1")
        assert not same_where_written(overlay, base, "raw", CopyControl())

    def test_what_base_has_as_well_is_the_same(self, base: Path, overlay: Path) -> None:
        write(overlay, "write -P 9 1000 1")
        run("qemu-img", "commit", "-q", "-d", str(overlay))
        assert same_where_written(overlay, base, "raw", CopyControl())

    def test_a_missing_image_is_an_error_and_not_a_difference(self, base: Path) -> None:
        with pytest.raises(PermanentError, match="No such file"):
            same_where_written(base.with_name("gone.qcow2"), base, "raw", CopyControl())


def test_rebase_changes_the_name_of_the_backing_file_and_no_data(base: Path, overlay: Path) -> None:
    write(overlay, "write -P 9 1M 1M")
    base.rename(base.with_name("moved.raw"))
    rebase(overlay, "moved.raw", "raw")
    assert info(overlay).backing == "moved.raw"
    write(overlay, "read -P 1 0 1M")
    write(overlay, "read -P 9 1M 1M")


class TestQemuImg:
    def test_that_it_is_missing_is_told_with_the_cure(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(PermanentError, match="install qemu-utils"):
            info(base)

    def test_a_hanging_one_is_given_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = tmp_path / "qemu-img"
        fake.write_text("#!/bin/sh\nexec sleep 60\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(TransientError, match=r"did not end within 0\.1 s"):
            image.qemu_img("info", timeout=0.1)


@pytest.mark.parametrize(
    ("number", "kind", "reason", "cure"),
    [
        (errno.ENOSPC, PermanentError, "NoSpace", "free space"),
        (errno.EDQUOT, PermanentError, "NoSpace", "quota"),
        (errno.EROFS, PermanentError, "ReadOnly", "mount"),
        (errno.EACCES, PermanentError, "NoAccess", "user"),
        (errno.EIO, PermanentError, "IOError", "kernel's log"),
        (errno.ENOENT, PermanentError, "NotFound", "path"),
        (errno.EXDEV, PermanentError, "StorageError", "log"),
        (errno.ESTALE, TransientError, "Busy", "again"),
        (errno.EMFILE, TransientError, "Busy", "again"),
    ],
)
def test_each_error_of_the_system_has_its_kind_reason_and_cure(
    number: int, kind: type[Exception], reason: str, cure: str
) -> None:
    error = classified(OSError(number, "text"), "/a/file")
    assert type(error) is kind
    assert error.reason == reason
    assert str(error).startswith(f"/a/file: {os.strerror(number)}")
    assert cure in str(error)


def test_errors_within_are_named_after_the_path_given() -> None:
    with pytest.raises(PermanentError, match=r"^/b: Is a directory"), errors_of("/b"):
        os.open("/", os.O_WRONLY)
