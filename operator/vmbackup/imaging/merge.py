"""Merges an overlay into its base while no guest runs, with qemu-img under QEMU's locks, and compares the result."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

from vmbackup.errors import PermanentError, TransientError
from vmbackup.imaging.control import CopyControl
from vmbackup.imaging.copy import opened_image
from vmbackup.imaging.errors import errors_of
from vmbackup.imaging.image import COMPARE_SECONDS, failure_of, info, qemu_img
from vmbackup.paths import open_trusted

MERGE_SECONDS = 24 * 3600.0
_MANY = 256  # parts of an overlay: up to here they are compared one by one, beyond it the images as a whole


class HeldOverlay:
    """An overlay whose data is all in its base too. A lock keeps guests from starting on it until `let_go`.

    `stamp` identifies this state of the file; any write changes it. The lock ends automatically when this object is
    garbage-collected.
    """

    def __init__(self, fd: int) -> None:
        self._close = weakref.finalize(self, os.close, fd)
        self.stamp = _stamp(os.fstat(fd))

    def let_go(self) -> None:
        """Guests may start on it again."""
        self._close()


def merge(overlay: Path, base: Path, base_format: str, bandwidth: int | None, control: CopyControl) -> HeldOverlay:
    """Merge a qcow2 overlay into the image right below it, durably, and prove by comparison that the base has it all.

    `bandwidth`: bytes per second, None is unlimited. The overlay is not changed, so a merge that failed or was
    cancelled can be repeated; until one has succeeded, the base alone matches no point in time. QEMU's locks on both
    images are held except for an instant between merging and comparing; a write of a guest in that instant is found.
    Raises Cancelled, TransientError if an image is in use, PermanentError otherwise.
    """
    below = _checked_backing(overlay, base, base_format)
    limit = ("-r", str(bandwidth)) if bandwidth else ()
    # -d: the overlay is not emptied. -b: the base and no template below it.
    command = ("commit", "-q", "-f", "qcow2", "-d", *limit, "-b", below, str(overlay))
    result = qemu_img(*command, timeout=MERGE_SECONDS, control=control)
    if result.returncode != 0:
        raise failure_of(result, base)
    with errors_of(overlay):
        fd = open_trusted(overlay)
    try:
        with control.reading(fd):
            with errors_of(base), opened_image(base) as base_fd:
                os.fsync(base_fd)
            if not same_where_written(overlay, base, base_format, control):
                raise TransientError(f"{overlay} was written while it was merged into {base}", reason="OverlayWritten")
            with errors_of(overlay):
                os.fsync(fd)  # its time stamps too
            control.check()  # an abandoned merge has lost its locks
        return HeldOverlay(fd)
    except BaseException:
        os.close(fd)
        raise


def is_unwritten(overlay: Path, stamp: str) -> bool:
    """Whether this is the file with this stamp, not written since. False if the file cannot be read."""
    try:
        return stamp_of(overlay) == stamp
    except OSError:
        return False


def stamp_of(overlay: Path) -> str:
    """Identifies this state of a file: any write changes it. Raises OSError."""
    return _stamp(overlay.stat())


def _stamp(file: os.stat_result) -> str:
    return f"{file.st_ino}.{file.st_size}.{file.st_mtime_ns}"


def _checked_backing(overlay: Path, base: Path, base_format: str) -> str:
    """How the overlay names its base. Raises PermanentError if it names another image."""
    found = info(overlay, "qcow2")
    backing = str(overlay.parent / (found.backing or ""))
    if not found.backing or os.path.realpath(backing) != os.path.realpath(base) or found.backing_format != base_format:
        raise PermanentError(
            f"{overlay} names {found.backing or 'nothing'} ({found.backing_format}) as the image below it, not {base} "
            f"({base_format}): find out which image it was made on before merging by hand",
            reason="OtherBase",
        )
    return found.backing


def same_where_written(overlay: Path, base: Path, base_format: str, control: CopyControl) -> bool:
    """Whether the base shows all that the overlay holds itself; elsewhere the overlay shows the base anyway.

    Raises TransientError while one of them is in use.
    """
    parts = list(_written(overlay, control))
    pairs = [[_part(overlay, "qcow2", *part), _part(base, base_format, *part)] for part in parts]
    if len(parts) > _MANY:
        pairs = [[_json(_whole(overlay, "qcow2")), _json(_whole(base, base_format))]]
    for pair in pairs:
        result = qemu_img("compare", "-q", *pair, timeout=COMPARE_SECONDS, control=control)
        if result.returncode not in (0, 1):
            raise failure_of(result, overlay)
        if result.returncode == 1:
            return False
    return True


def _written(overlay: Path, control: CopyControl) -> Iterator[tuple[int, int]]:
    """Where an overlay holds something itself, zeros too: start and end in bytes, adjacent parts as one.

    Nothing between them: of a part of an image (_part), QEMU shows zeros where the image below it has to be asked.
    """
    result = qemu_img("map", "--output=json", "-f", "qcow2", str(overlay), timeout=COMPARE_SECONDS, control=control)
    if result.returncode != 0:
        raise failure_of(result, overlay)
    parts = ((part["start"], part["start"] + part["length"]) for part in json.loads(result.stdout) if not part["depth"])
    start, end = next(parts, (0, 0))
    for following, its_end in parts:
        if following > end:
            yield start, end
            start = following
        end = its_end
    if end > start:
        yield start, end


def _part(image: Path, image_format: str, start: int, end: int) -> str:
    """A part of an image, in QEMU's words. The host's name of a file may hold anything, so it is given as JSON."""
    return _json({"driver": "raw", "offset": start, "size": end - start, "file": _whole(image, image_format)})


def _whole(image: Path, image_format: str) -> dict[str, object]:
    return {"driver": image_format, "file": {"driver": _driver_of(image), "filename": str(image)}}


def _json(node: dict[str, object]) -> str:
    return "json:" + json.dumps(node)


def _driver_of(image: Path) -> str:
    return "host_device" if image.is_block_device() else "file"
