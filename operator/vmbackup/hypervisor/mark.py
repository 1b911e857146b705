"""The second copy of "held still by us", in the live metadata of the domain: it dies with QEMU, as it should.

The first is the journal. This one is for the case that the journal is lost while a guest is suspended or frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from defusedxml.ElementTree import fromstring

KEY = "vmbackup"
URI = "https://vmbackup.dev/domain/1"


@dataclass(frozen=True)
class MarkedDisk:
    """A disk of the backup, its overlay (which need not be there), and whether the switch is its pivot."""

    target: str
    overlay: str
    pivoting: bool = False


@dataclass(frozen=True)
class Mark:
    """Which backup holds the guest. `frozen`: its file systems too, or they alone."""

    uid: str
    frozen: bool = False
    disks: tuple[MarkedDisk, ...] = ()

    @property
    def xml(self) -> str:
        """The element that stands for it; libvirt adds the namespace."""
        held = Element("held", uid=self.uid, frozen=_yes(self.frozen))
        for disk in self.disks:
            SubElement(held, "disk", target=disk.target, overlay=disk.overlay, pivoting=_yes(disk.pivoting))
        return tostring(held, encoding="unicode")

    @classmethod
    def of(cls, live_xml: str) -> Mark | None:
        """That of a domain; None if it has none."""
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
