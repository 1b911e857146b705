"""Domain XML to disk chains and back. Pure: text in, frozen objects or text out; no libvirt.

Editing leaves every byte outside our own <disk> elements as it was: namespaces, metadata, comments, other edits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import PurePosixPath
from xml.etree.ElementTree import Element, SubElement, tostring
from xml.parsers import expat

from defusedxml.ElementTree import fromstring

from vmbackup.errors import PermanentError, RefusedError
from vmbackup.protocol.terms import Mirror

_OVERLAY_NAME = re.compile(r"\.vmb-([0-9a-f]{8})-([a-z]+)\.qcow2$")
_OURS = ("source", "backingStore")  # of a <disk>: with @type and driver/@type they name the image
_FORMATS = ("raw", "qcow2")
_KINDS = ("file", "block")
_SOURCE_PARTS = ("seclabel", "reservations")  # of a <source>: parts that do not change which bytes the image has


@dataclass(frozen=True)
class ChainImage:
    """An image below the one that a disk writes. `kind`: file, block, network, …"""

    path: str
    format: str
    kind: str
    unknown_part: str = ""  # a child of its <source> that we do not know: the image may be other bytes than the file's


@dataclass(frozen=True)
class Disk:
    """A disk of a domain. `source` is the image that it writes; `chain` the images below, nearest first.

    `chain` is complete only in live XML: persistent XML may not contain it.
    """

    target: str
    device: str  # disk | lun | cdrom | floppy
    kind: str  # file | block | network | volume | vhostuser | …
    source: str | None
    format: str
    alias: str = ""  # live XML only
    readonly: bool = False
    shareable: bool = False
    transient: bool = False
    encrypted: bool = False
    sliced: bool = False
    unknown_part: str = ""  # as in ChainImage
    mirror: Mirror = Mirror.NONE
    mirror_to: str | None = None  # the file that an active commit goes to
    foreign_job: bool = False  # a mirror that is not an active commit
    chain: tuple[ChainImage, ...] = ()


@dataclass(frozen=True)
class DomainFacts:
    """The parts of a domain's XML that a backup records, besides the disks."""

    name: str
    uuid: str
    nvram: str | None


def domain_facts(xml: str) -> DomainFacts:
    """Name, UUID and the path of the UEFI variables, of live or persistent XML."""
    root = fromstring(xml)
    nvram = root.find("os/nvram")
    path = None
    if nvram is not None:
        path = (nvram.text or "").strip() or (_path(nvram.find("source")) if nvram.get("type") else None)
    return DomainFacts(root.findtext("name", ""), root.findtext("uuid", ""), path)


def guest_agent(live_xml: str) -> str | None:
    """The state of the channel of the guest agent: connected, disconnected, …; None if there is no such channel."""
    target = fromstring(live_xml).find("devices/channel/target[@name='org.qemu.guest_agent.0']")
    return None if target is None else target.get("state", "unknown")


def disks(xml: str) -> tuple[Disk, ...]:
    """The disks of live or persistent XML, in its order."""
    return tuple(_disk(element) for element in fromstring(xml).iterfind("devices/disk"))


def ineligible(disk: Disk) -> str | None:
    """Why a disk cannot be backed up, and the cure; None if it can."""
    templates = [image for image in disk.chain if image.unknown_part]
    reasons = (
        (disk.device in ("cdrom", "floppy"), f"is a {disk.device}: removable media are not backed up"),
        (disk.device == "lun", "is passed through as a LUN: use device='disk'"),
        (disk.kind == "vhostuser", "is served by vhost-user, not by QEMU: back it up where it is served"),
        (disk.kind == "network", "has a network source, which is not supported yet: use a file or block device"),
        (
            disk.kind not in (*_KINDS, "vhostuser", "network"),
            f"has a source of type {disk.kind}: use a file or block device",
        ),
        (disk.source is None, "has no image: attach one"),
        (disk.readonly, "is read-only and does not change: copy it once by hand"),
        (disk.shareable, "is shareable: other guests may write it at the same time; back it up inside a guest"),
        (disk.transient, "is transient: its changes are discarded when the guest stops"),
        (disk.encrypted, "is encrypted by QEMU, which is not supported yet: encrypt below the image or in the guest"),
        (disk.sliced, "uses a slice of its image, which is not supported: use a separate image"),
        (disk.unknown_part != "", f"has a <{disk.unknown_part}> in its <source>, which is not supported: remove it"),
        (disk.format not in _FORMATS, f"has the format {disk.format}: convert it to raw or qcow2"),
        (
            any(image.kind not in _KINDS for image in disk.chain),
            "has a backing image that is not a file or block device: rebase it onto one",
        ),
        (
            bool(templates),
            "".join(
                f"has the backing image {image.path} with <{image.unknown_part}>, that is, not the whole file as it "
                "is, which is not supported: rebase it onto an image of its own (qemu-img rebase)"
                for image in templates[:1]
            ),
        ),
    )
    return next((reason for holds, reason in reasons if holds), None)


def overlay_path(disk: Disk, uid8: str, overlay_dir: str | None = None) -> str:
    """Where the overlay of a backup goes: `<directory of the base, or overlay_dir>/<stem>.vmb-<uid8>-<target>.qcow2`.

    Raises RefusedError for a base that is not a file if there is no `overlay_dir`.
    """
    base = PurePosixPath(disk.source or "")
    if overlay_dir is None and disk.kind != "file":
        raise RefusedError(
            f"disk {disk.target} is the {disk.kind} device {base}: set --overlay-dir to a directory for its overlay",
            reason="OverlayDirectoryNeeded",
        )
    return str(PurePosixPath(overlay_dir or base.parent) / f"{base.stem}.vmb-{uid8}-{disk.target}.qcow2")


def parse_overlay(path: str) -> tuple[str, str] | None:
    """The uid8 and disk target in the name of one of our overlays; None for any other file."""
    match = _OVERLAY_NAME.search(path)
    return (match[1], match[2]) if match else None


def disk_xml(xml: str, target: str) -> str:
    """The <disk> element of a target, byte for byte. Raises PermanentError if there is none."""
    data = xml.encode()
    start, end = _span(data, target)
    return data[start:end].decode()


def on_overlay(disk_xml: str, overlay: str) -> str:
    """The <disk> on the base as the <disk> on a qcow2 overlay over that base."""
    disk = fromstring(disk_xml)
    below = Element("backingStore", type=disk.get("type", "file"))
    SubElement(below, "format", type=_format(disk))
    base = disk.find("source")
    source = Element("source", file=overlay)
    if base is not None:
        below.append(_plain(base))
        source.extend(deepcopy(label) for label in base.iterfind("seclabel"))
    below.extend(deepcopy(deeper) for deeper in disk.iterfind("backingStore"))
    _replace_image(disk, "file", "qcow2", [source, below])
    return tostring(disk, encoding="unicode")


def on_base(disk_xml: str) -> str:
    """The <disk> on an overlay as the <disk> on the image below it. Raises PermanentError if it names none."""
    disk = fromstring(disk_xml)
    below = disk.find("backingStore")
    source = None if below is None else below.find("source")
    if below is None or source is None:
        target = _target(disk)
        raise PermanentError(f"the XML of disk {target} names no backing image: use the live XML", reason="NoBase")
    image_format = below.find("format")
    deeper = [deepcopy(element) for element in below.iterfind("backingStore")]
    _replace_image(
        disk,
        below.get("type", "file"),
        "raw" if image_format is None else image_format.get("type", "raw"),
        [_plain(source), *deeper],
    )
    return tostring(disk, encoding="unicode")


def without_overlay(xml: str, target: str, overlay: str) -> str:
    """The <disk> of a target on its base, from XML in which it may be on `overlay`. Raises PermanentError."""
    found = disk_xml(xml, target)
    on_it = any(disk.target == target and disk.source == overlay for disk in disks(xml))
    return on_base(found) if on_it else found


def with_images(persistent_xml: str, images: Mapping[str, str]) -> str:
    """The persistent XML with some disks on other images; everything else, also of these disks, is unchanged.

    `images` maps a target to a <disk> element (the remembered one, or that of `on_overlay`) that is on the wanted
    image: its @type, source, driver type and backingStore are copied. libvirt does not start a guest if the path was
    changed but not the driver type. Raises PermanentError if the XML has no such disk.
    """
    data = persistent_xml.encode()
    for target, wanted_xml in images.items():
        start, end = _span(data, target)
        disk, wanted = fromstring(data[start:end].decode()), fromstring(wanted_xml)
        image = [_plain(element) for name in _OURS for element in wanted.iterfind(name)]
        _replace_image(disk, wanted.get("type", "file"), _format(wanted), image)
        disk.tail = None
        data = data[:start] + tostring(disk, encoding="unicode").encode() + data[end:]
    return data.decode()


def _replace_image(disk: Element, kind: str, image_format: str, image: list[Element]) -> None:
    places = [index for index, child in enumerate(disk) if child.tag in _OURS]
    for old in [child for child in disk if child.tag in _OURS or child.tag == "mirror"]:
        disk.remove(old)
    disk.set("type", kind)
    driver = disk.find("driver")
    if driver is None:
        driver = Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", image_format)
    place = min([*places, list(disk).index(driver) + 1])
    for offset, element in enumerate(image):
        element.tail = driver.tail
        disk.insert(place + offset, element)


def _plain(element: Element) -> Element:
    """A copy without the node numbers that live XML adds."""
    copy = deepcopy(element)
    for part in copy.iter():
        if part.tag in ("source", "backingStore"):
            part.attrib.pop("index", None)
    return copy


def _disk(element: Element) -> Disk:
    kind = element.get("type", "file")
    source, mirror, alias = element.find("source"), element.find("mirror"), element.find("alias")
    ours = mirror is not None and mirror.get("job") == "active-commit"
    return Disk(
        target=_target(element),
        device=element.get("device", "disk"),
        kind=kind,
        source=_path(source),
        format=_format(element),
        alias="" if alias is None else alias.get("name", ""),
        readonly=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find("encryption") is not None or element.find("source/encryption") is not None,
        sliced=element.find("source/slices") is not None,
        unknown_part=_unknown_part(source),
        mirror=Mirror.NONE if mirror is None or not ours else _mirror(mirror),
        mirror_to=_path(mirror.find("source")) if mirror is not None and ours else None,
        foreign_job=mirror is not None and not ours,
        chain=tuple(_chain(element)),
    )


def _mirror(mirror: Element) -> Mirror:
    return Mirror.READY if mirror.get("ready") == "yes" else Mirror.PENDING


def _chain(disk: Element) -> Iterator[ChainImage]:
    below = disk.find("backingStore")
    while below is not None and below.find("source") is not None:
        image_format = below.find("format")
        yield ChainImage(
            path=_path(below.find("source")) or "",
            format="raw" if image_format is None else image_format.get("type", "raw"),
            kind=below.get("type", "file"),
            unknown_part=_unknown_part(below.find("source")),
        )
        below = below.find("backingStore")


def _unknown_part(source: Element | None) -> str:
    """The first child of a <source> that may change which bytes the image has: a slice, an encryption, a later word."""
    return next((part.tag for part in source if part.tag not in _SOURCE_PARTS), "") if source is not None else ""


def _target(disk: Element) -> str:
    target = disk.find("target")
    return "" if target is None else target.get("dev", "")


def _format(disk: Element) -> str:
    driver = disk.find("driver")
    return "raw" if driver is None else driver.get("type", "raw")


def _path(source: Element | None) -> str | None:
    if source is None:
        return None
    return next(
        (source.attrib[name] for name in ("file", "dev", "dir", "name", "volume", "path") if name in source.attrib),
        None,
    )


def _span(data: bytes, target: str) -> tuple[int, int]:
    """Start and end of the <disk> of a target, as byte offsets."""
    fromstring(data)  # refuses entities and invalid XML before anything is cut out by position
    parser = expat.ParserCreate()
    path: list[str] = []
    start = 0
    found: list[int] = []

    def on_start(name: str, attributes: dict[str, str]) -> None:
        nonlocal start
        path.append(name)
        if path == ["domain", "devices", "disk"]:
            start = parser.CurrentByteIndex
        if path == ["domain", "devices", "disk", "target"] and attributes.get("dev") == target:
            found.append(start)

    def on_end(_name: str) -> None:
        if path == ["domain", "devices", "disk"] and len(found) == 1:
            found.append(data.index(b">", parser.CurrentByteIndex) + 1)
        path.pop()

    parser.StartElementHandler, parser.EndElementHandler = on_start, on_end
    parser.Parse(data, True)
    if len(found) != 2:
        raise PermanentError(
            f"the domain's XML no longer has a disk {target}: attach it again as it was", reason="DiskMissing"
        )
    return found[0], found[1]
