"""The mark in the live metadata of a domain: which backup has suspended or frozen the guest. It disappears with QEMU.

The journal says the same. The mark is for the case that the journal is lost while the guest is suspended or frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from defusedxml.ElementTree import fromstring

KEY = "vmbackup"
URI = "https://vmbackup.dev/domain/1"


@dataclass(frozen=True)
class MarkedDisk:
    """A disk of the backup, its overlay (which may not exist), and whether the disk is being pivoted."""

    target: str
    overlay: str
    pivoting: bool = False


@dataclass(frozen=True)
class Mark:
    """Which backup holds the guest. `frozen`: its file systems are frozen, whether or not it is suspended."""

    uid: str
    frozen: bool = False
    disks: tuple[MarkedDisk, ...] = ()

    @property
    def xml(self) -> str:
        """The metadata element; libvirt adds the namespace."""
        held = Element("held", uid=self.uid, frozen=_yes(self.frozen))
        for disk in self.disks:
            SubElement(held, "disk", target=disk.target, overlay=disk.overlay, pivoting=_yes(disk.pivoting))
        return tostring(held, encoding="unicode")

    @classmethod
    def of(cls, live_xml: str) -> Mark | None:
        """The mark of a domain; None if it has none."""
        held = fromstring(live_xml).find(f"metadata/{{{URI}}}held")
        if held is None:
            return None
        disks = tuple(
            MarkedDisk(disk.get("target", ""), disk.get("overlay", ""), disk.get("pivoting") == "yes")
            for disk in held.iterfind(f"{{{URI}}}disk")
        )
        return cls(held.get("uid", ""), held.get("frozen") == "yes", disks)


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
