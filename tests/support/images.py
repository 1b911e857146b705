"""The images of a guest that no hypervisor knows, for stores."""

from __future__ import annotations

from pathlib import Path

from tests.support.storage import run
from vmbackup.stores.base import DiskSource, SourceImage

MIB = 1 << 20
ODD_BYTES = 20000256  # of a raw disk: no multiple of a block of 4 KiB


class GuestImages:
    """Images of a guest in a folder: vda on a chain of three, vdb on the same template, vdc raw."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        template = self._raw("template.raw", 64 * MIB, {0: b"\1" * 4 * MIB})
        middle = self._qcow2("middle", template, "write -P 2 2M 4M")
        vda = self._qcow2("vda", middle, "write -P 3 5M 4M")
        vdb = self._qcow2("vdb", template, "write -P 4 0 1M")
        vdc = self._raw("vdc.raw", ODD_BYTES, {MIB: b"\5" * 2 * MIB})
        self.vda = DiskSource("vda", (vda, middle, template), 64 * MIB)
        self.vdb = DiskSource("vdb", (vdb, template), 64 * MIB)
        self.vdc = DiskSource("vdc", (vdc,), ODD_BYTES)
        self.disks = (self.vda, self.vdb, self.vdc)

    def _raw(self, name: str, size: int, content: dict[int, bytes]) -> SourceImage:
        path = self.folder / name
        with path.open("wb") as file:
            file.truncate(size)
            for position, data in content.items():
                file.seek(position)
                file.write(data)
        return SourceImage(str(path), "raw")

    def _qcow2(self, name: str, backing: SourceImage, command: str) -> SourceImage:
        path = f"{self.folder}/{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing.path, "-F", backing.format, path)
        run("qemu-io", "-f", "qcow2", "-c", command, path)
        return SourceImage(path, "qcow2")

    def contents(self, folder: Path) -> dict[str, Path]:
        """The content of each disk as a raw file in `folder`, by target."""
        folder.mkdir()
        for disk in self.disks:
            top = disk.chain[0]
            run("qemu-img", "convert", "-f", top.format, "-O", "raw", top.path, f"{folder}/{disk.target}")
        return {disk.target: folder / disk.target for disk in self.disks}
