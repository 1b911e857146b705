"""What the proofs of the tests are made of: each function looks at one thing, and yields all that is wrong with it.

The records of a Linux guest are proven by sandbox/oracle.py. The proofs themselves are put together of both by
tests/chaos/proof.py (a guest that lives on), tests/chaos/soak/proof.py (random faults), tests/chaos/power.py (power
cuts) and tests/support/survival.py (killed drivers).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from sandbox.libvirtd import Libvirtd
from tests.support.domains import qemu_img, what_is_wrong_with
from tests.support.kill_points import records_in
from tests.support.storage import sha256sum
from vmbackup.hypervisor import chain

Sources = Mapping[str, str | None]  # the images of a domain, by target

# -- the images that a domain names


def sources_in(xml: str | None) -> Sources:
    """The image of each disk that a definition names; none where there is no definition."""
    return {disk.target: disk.source for disk in chain.disks(xml)} if xml else {}


def sources_on_disk(libvirtd: Libvirtd, domain: str) -> Sources:
    """The image of each disk by the file in which libvirt keeps the persistent XML."""
    return sources_in((libvirtd.config_dir / f"{domain}.xml").read_text())


def sources(libvirtd: Libvirtd, domain: str, *, inactive: bool = False) -> dict[str, str]:
    """The image of each disk by the live XML, or by the persistent one."""
    lines = libvirtd.virsh("domblklist", domain, *["--inactive"] * inactive).splitlines()
    return {words[0]: words[1] for words in (line.split(maxsplit=1) for line in lines)}


def every_source(libvirtd: Libvirtd, domain: str) -> dict[str, Sources]:
    """The image of each disk, by definition: all three must name its base once it is home."""
    return {
        "live XML": sources(libvirtd, domain),
        "persistent XML": sources(libvirtd, domain, inactive=True),
        "XML on disk": sources_on_disk(libvirtd, domain),
    }


def not_on_base(named: Mapping[str, Sources], bases: Mapping[str, str]) -> Iterator[str]:
    """Disks for which a definition names another image than the base. `named`: as `every_source`."""
    for target, base in bases.items():
        for definition, images in named.items():
            if images.get(target) != base:
                yield f"{target}: the {definition} names {images.get(target)}, its base is {base}"


# -- what images hold


def damaged(images: Iterable[Path], *, leaks: bool = False) -> Iterator[str]:
    """What `qemu-img check` finds. `leaks`: unused clusters are fine, since a QEMU that was killed leaves some."""
    yield from filter(None, (what_is_wrong_with(image, leaks=leaks) for image in images))


def wrong_records(images: Mapping[str, Path], allowed: Collection[int], size: int | None = None) -> Iterator[str]:
    """Disks of a guest without an OS that hold another number of records, and images that are damaged.

    `images` by target; `size`: bytes of the disk in which there are records. Raises AssertionError at a gap.
    """
    for target, image in images.items():
        if (count := records_in(content(image, size))) not in allowed:
            yield f"{target}: {image} holds {count} records, and should hold {sorted(allowed)}"
    yield from damaged(images.values(), leaks=True)


def content(image: Path, size: int | None = None) -> bytes:
    """The first bytes that a guest sees on this disk. The guest may run, as long as it has flushed what it wrote."""
    if image.suffix == ".raw":
        return image.read_bytes()[:size]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        qemu_img("convert", "-U", "-f", "qcow2", "-O", "raw", str(image), str(raw))
        return raw.read_bytes()[:size]


# -- a backup in its store


def copies(folder: Path) -> dict[str, Path]:
    """The copies in the folder of a backup, by target, as its manifest names them."""
    return {disk["target"]: folder / disk["file"] for disk in _disks(folder)}


def wrong_digests(folder: Path) -> Iterator[str]:
    """Copies whose digest is not that of the manifest."""
    for disk in _disks(folder):
        if (digest := sha256sum(folder / disk["file"])) != disk["digest"]:
            yield f"{folder / disk['file']} has the digest {digest}, its manifest says {disk['digest']}"


def _disks(folder: Path) -> list[dict[str, str]]:
    return json.loads((folder / "manifest.json").read_text())["disks"]
