"""Whether a base shows all that an overlay holds, also where the overlay holds nothing between what it holds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from vmbackup.imaging import merge
from vmbackup.imaging.control import CopyControl


@pytest.mark.parametrize("many", [256, 0], ids=["part by part", "as a whole"])
@pytest.mark.parametrize(("written", "same"), [(1, True), (2, False)])
def test_only_what_the_overlay_holds_itself_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int, written: int, same: bool
) -> None:
    monkeypatch.setattr(merge, "_MANY", many)
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(b"\1" * (2 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", f"write -P {written} 1M 64k", str(overlay))
    assert merge.same_where_written(overlay, base, "raw", CopyControl()) is same


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
