"""Facts about an image file: from qemu-img, or from the qcow2 header where qemu-img would have to lock it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from vmbackup.errors import PermanentError, TransientError, VMBackupError
from vmbackup.imaging.control import Cancelled, CopyControl
from vmbackup.imaging.errors import classified, errors_of
from vmbackup.imaging.locks import is_locked_by_another
from vmbackup.paths import open_trusted

QEMU_IMG_SECONDS = 60.0
COMPARE_SECONDS = 6 * 3600.0
_LOOK = 0.1  # seconds between looks whether qemu-img is to end

# Start of a qcow2 header, version 2 and 3 (QEMU, docs/interop/qcow2.txt): magic, version, backing file offset and
# length, cluster bits, size, encryption, number of L1 entries, their offset, refcount table (2), number of snapshots.
_QCOW2_HEADER = struct.Struct(">4sIQIIQIIQQII")
_QCOW2_MAGIC = b"QFI\xfb"
# Of version 3: magic, version, size, incompatible features, length of the header, after which extensions follow: their
# kind and length, then so many bytes, padded to a multiple of 8.
_QCOW2_V3 = struct.Struct(">4sI16xQ40xQ20xI")
_QCOW2_EXTENSION = struct.Struct(">II")
_HAS_DATA_FILE = 1 << 2
_DATA_FILE_NAME = 0x44415441
_BACKING_FORMAT = 0xE2792ACA
_END_OF_EXTENSIONS = 0
_V2_BYTES = 72  # of a header of version 2
_LONGEST_EXTENSIONS = 64 << 10
_LONGEST_NAME = 1023  # bytes of a backing file's name, as QEMU has it
_LONGEST_L1 = 32 << 20  # bytes, likewise (block/qcow2.h, QCOW_MAX_L1_SIZE)


@dataclass(frozen=True)
class QcowState:
    """Facts from the file of an overlay. `empty`: no cluster is allocated; None: locked, so this is unknown.

    `holds_snapshot`: a user's internal snapshot is in it (virsh snapshot-create-as without --disk-only).
    """

    locked: bool
    empty: bool | None
    holds_snapshot: bool = False


@dataclass(frozen=True)
class ImageInfo:
    """An image as `qemu-img info` shows it, sizes in bytes. `backing…` and `data_file` as the image names them."""

    format: str
    virtual_bytes: int
    allocated_bytes: int
    backing: str | None
    backing_format: str | None
    data_file: str | None
    encrypted: bool


def qcow_state(path: Path) -> QcowState | None:
    """The qcow2 overlay at `path`, or None if there is nothing. Takes no lock, so it is never in QEMU's way.

    Raises as `imaging.errors` says where it cannot be read, or something else is there: who owns the directory may have
    put a link or a FIFO in its place (paths.open_trusted).
    """
    if not os.path.lexists(path):
        return None
    with errors_of(path), os.fdopen(open_trusted(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        locked = is_locked_by_another(file.fileno())  # before anything is read: what is read while unlocked is final
        snapshot = _holds_snapshot(file)
        file.seek(0)
        return QcowState(locked, empty=None if locked else _is_empty_qcow2(file), holds_snapshot=snapshot)


def _holds_snapshot(file: BinaryIO) -> bool:
    """Read from the header, which QEMU writes before it reports that a snapshot is taken."""
    header = file.read(_QCOW2_HEADER.size)
    if len(header) < _QCOW2_HEADER.size or not header.startswith(_QCOW2_MAGIC):
        return False
    return _QCOW2_HEADER.unpack(header)[-1] > 0


def _is_empty_qcow2(file: BinaryIO) -> bool:
    """Whether a qcow2 has no cluster of its own: no L2 table and no internal snapshot.

    A file of no length is empty too (creating it was cut short); what cannot be understood is not.
    """
    header = file.read(_QCOW2_HEADER.size)
    if not header:
        return True
    if len(header) < _QCOW2_HEADER.size or not header.startswith(_QCOW2_MAGIC):
        return False
    *_, l1_entries, l1_offset, _refcounts, _refcount_clusters, snapshots = _QCOW2_HEADER.unpack(header)
    if 8 * l1_entries > _LONGEST_L1 or l1_offset >= 1 << 63:
        return False
    file.seek(l1_offset)
    l1_table = file.read(8 * l1_entries)
    return snapshots == 0 and l1_entries > 0 and len(l1_table) == 8 * l1_entries and not any(l1_table)


def info(path: Path, image_format: str | None = None) -> ImageInfo:
    """Facts from qemu-img about one image, without its backing images. The image may be in use.

    Pass the format if it is known: a guest can write the header of another format into its raw image.
    """
    if image_format in (None, "qcow2") and (known := _with_data_file(path)):
        return known  # qemu-img would open that file, whatever it is
    # -U: the header stays as it is while an image is in use; and without it a guest that is just starting would find
    # the image locked by us.
    given = ("-f", image_format) if image_format else ()
    result = qemu_img("info", "--output=json", "-U", *given, str(path))
    if result.returncode != 0:
        raise failure_of(result, path)
    found: Mapping[str, Any] = json.loads(result.stdout)
    specific = cast("Mapping[str, Any]", found.get("format-specific", {}).get("data", {}))
    return ImageInfo(
        format=found["format"],
        virtual_bytes=found["virtual-size"],
        allocated_bytes=found.get("actual-size", 0),
        backing=found.get("backing-filename"),
        backing_format=found.get("backing-filename-format"),
        data_file=specific.get("data-file"),
        encrypted=bool(found.get("encrypted", False)),
    )


def _with_data_file(path: Path) -> ImageInfo | None:
    """Facts from the header of a qcow2 that keeps its data in another file; None for any other image."""
    with errors_of(path), os.fdopen(open_trusted(path), "rb") as file:
        header = file.read(_QCOW2_V3.size)
        if len(header) < _QCOW2_V3.size or not header.startswith(_QCOW2_MAGIC):
            return None
        _, version, virtual_bytes, features, length = _QCOW2_V3.unpack(header)
        if version < 3 or not features & _HAS_DATA_FILE:
            return None
        name = _extension(file, length, _DATA_FILE_NAME) or "of no name"
    return ImageInfo("qcow2", virtual_bytes, 0, None, None, name, encrypted=False)


def _extension(file: BinaryIO, header_bytes: int, wanted: int) -> str:
    """The text of one header extension of a qcow2; empty if it has none. Raises OSError, ValueError."""
    file.seek(header_bytes)
    extensions = file.read(_LONGEST_EXTENSIONS)
    while len(extensions) >= _QCOW2_EXTENSION.size:
        kind, size = _QCOW2_EXTENSION.unpack_from(extensions)
        if kind in (wanted, _END_OF_EXTENSIONS):
            return os.fsdecode(extensions[_QCOW2_EXTENSION.size :][:size])
        extensions = extensions[_QCOW2_EXTENSION.size + (size + 7) // 8 * 8 :]
    return ""


def images_below(path: Path) -> list[str]:
    """The backing images of an image that is declared qcow2, nearest first, as far as qcow2 headers name files.

    A backing image is looked into only if the header above it declares qcow2: a guest may have written the header of
    any image into its raw disk. Read without qemu-img, because it may be called for every image of a host. An
    unreadable image has none.
    """
    below: list[str] = []
    while (backing := _backing_file(path)) and backing[0] not in below:
        below.append(backing[0])
        if backing[1] != "qcow2":
            break
        path = Path(backing[0])
    return below


def _backing_file(path: Path) -> tuple[str, str] | None:
    """Path and declared format of the backing file; None if there is none."""
    try:
        with os.fdopen(open_trusted(path), "rb") as file:
            header = file.read(_QCOW2_HEADER.size)
            if len(header) < _QCOW2_HEADER.size or not header.startswith(_QCOW2_MAGIC):
                return None
            _, version, offset, length, *_ = _QCOW2_HEADER.unpack(header)
            if not offset or length > _LONGEST_NAME:
                return None
            file.seek(offset)
            name = os.fsdecode(file.read(length))
            file.seek(0)
            whole = file.read(_QCOW2_V3.size)
            header_bytes = _QCOW2_V3.unpack(whole)[-1] if version > 2 and len(whole) == _QCOW2_V3.size else _V2_BYTES
            declared = _extension(file, header_bytes, _BACKING_FORMAT)
    except (OSError, ValueError):  # an image may hold anything, also offsets beyond every file
        return None
    return (str(path.parent / name), declared) if name and "\0" not in name else None


def rebase(path: Path, backing: str, backing_format: str) -> None:
    """Write another backing file into a qcow2's header, data untouched. `backing` is relative to the image's folder."""
    result = qemu_img("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", backing_format, str(path))
    if result.returncode != 0:
        raise failure_of(result, path)


def qemu_img(
    *arguments: str, timeout: float = QEMU_IMG_SECONDS, control: CopyControl | None = None
) -> subprocess.CompletedProcess[str]:
    """Run qemu-img. Raises PermanentError if it is not installed, TransientError after `timeout` seconds.

    With a control, cancelling kills it and raises Cancelled. It does not outlive this process: its locks would keep a
    guest from starting.
    """
    program = shutil.which("qemu-img")
    if program is None:
        raise PermanentError("qemu-img is not installed: install qemu-utils (Debian) or qemu-img")
    environment = {**os.environ, "LC_ALL": "C"}
    pipe, ends = subprocess.PIPE, time.monotonic() + timeout
    command = [*_dying_with_us(), program, *arguments]
    try:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace", env=environment
        ) as process:
            try:
                output, errors = _until_it_ends(process, ends, control)
            except BaseException:
                process.kill()
                raise
            return subprocess.CompletedProcess(command, process.returncode, output, errors)
    except subprocess.TimeoutExpired:
        raise TransientError(f"qemu-img {arguments[0]} did not end within {timeout:g} s", reason="Timeout") from None
    except OSError as error:
        raise classified(error, "qemu-img") from error


def _dying_with_us() -> tuple[str, ...]:
    """A prefix that makes the kernel kill a program together with the thread that waits for it (util-linux)."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()


def _until_it_ends(process: subprocess.Popen[str], ends: float, control: CopyControl | None) -> tuple[str, str]:
    while True:
        try:
            return process.communicate(timeout=_LOOK)
        except subprocess.TimeoutExpired:
            if control is not None and control.cancelled.is_set():
                raise Cancelled from None
            if time.monotonic() > ends:
                raise


def failure_of(result: subprocess.CompletedProcess[str], path: Path) -> VMBackupError:
    """The error of a failed qemu-img as one of our kinds."""
    text = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
    if " lock" in text:
        return TransientError(f"{path} is in use: {text}", reason="ImageBusy")
    for number in (errno.ENOENT, errno.ENOSPC, errno.EACCES, errno.EIO):
        if os.strerror(number) in text:
            known = classified(OSError(number, ""), path)
            return PermanentError(f"{known} ({text})", reason=known.reason)
    return PermanentError(f"{path}: {text}", reason="QemuImgFailed")
