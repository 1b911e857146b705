"""Our edits of the persistent XML, judged by real libvirt."""

from __future__ import annotations

import pytest

from tests.support.domains import Domain, DomainFactory
from vmbackup.hypervisor import chain

DISKS = {"vda": "raw", "vdb": "qcow2", "vdc": "chain"}
METADATA = "<metadata><app:a xmlns:app='http://example.org/a'><!-- a note --><app:b c='ü'/></app:a></metadata>"
QEMU_ARGUMENTS = "<qemu:commandline><qemu:arg value='-name'/><qemu:arg value='other'/></qemu:commandline>"
SECRET = "<graphics type='vnc' socket='{}/vnc' passwd='secret'/>"


def persistent(made: Domain) -> str:
    xml = made.guest.persistent_xml()
    assert xml is not None
    return xml


def remembered(made: Domain) -> dict[str, str]:
    return {target: chain.disk_xml(persistent(made), target) for target in made.bases}


def on_overlays(made: Domain, bases: dict[str, str]) -> dict[str, str]:
    return {target: chain.on_overlay(xml, made.overlay(target)) for target, xml in bases.items()}


def test_what_we_define_after_a_snapshot_is_what_libvirt_defines(domain: DomainFactory) -> None:
    made = domain(DISKS)
    before, bases = persistent(made), remembered(made)
    wanted = on_overlays(made, bases)
    made.snapshot()
    by_libvirt = persistent(made)
    made.guest.define(before)  # as if libvirt had lost it
    made.guest.define(chain.with_images(persistent(made), wanted))
    assert persistent(made) == by_libvirt != before


def test_going_back_gives_the_xml_from_before(domain: DomainFactory) -> None:
    made = domain(DISKS, extra=METADATA + QEMU_ARGUMENTS)
    before, bases = persistent(made), remembered(made)
    made.snapshot()
    made.guest.define(chain.with_images(persistent(made), bases))
    assert persistent(made) == before


def test_the_bases_are_found_in_the_live_xml_where_nothing_was_remembered(domain: DomainFactory) -> None:
    made = domain(DISKS)
    before = persistent(made)
    made.snapshot()
    live = made.guest.live_xml() or ""
    made.guest.define(
        chain.with_images(persistent(made), {t: chain.on_base(chain.disk_xml(live, t)) for t in made.bases})
    )
    images = {disk.target: (disk.source, disk.format) for disk in chain.disks(persistent(made))}
    assert images == {disk.target: (disk.source, disk.format) for disk in chain.disks(before)}


def test_namespaces_metadata_and_passwords_survive(domain: DomainFactory) -> None:
    made = domain(extra=METADATA + QEMU_ARGUMENTS)
    with_secret = persistent(made).replace("</devices>", f"{SECRET.format(made.directory)}</devices>")
    made.guest.define(with_secret)
    before, bases = persistent(made), remembered(made)
    made.guest.define(chain.with_images(before, on_overlays(made, bases)))
    there = persistent(made)
    for kept in ("<qemu:arg value='other'/>", "<!-- a note -->", '<app:b c="&#xFC;"/>', "passwd='secret'"):
        assert kept in there
    assert made.persistent().source == made.overlay()
    made.guest.define(chain.with_images(there, bases))
    assert persistent(made) == before


@pytest.mark.parametrize("kind", ["raw", "chain"])
def test_a_guest_boots_from_what_we_define_on_either_image(domain: DomainFactory, kind: str) -> None:
    made = domain({"vda": kind})
    bases = remembered(made)
    made.write("vda", 0x11)
    wanted = on_overlays(made, bases)
    made.snapshot()
    made.guest.define(chain.with_images(persistent(made), bases))
    made.guest.define(chain.with_images(persistent(made), wanted))
    made.write("vda", 0x22, "1M")
    made.libvirtd.virsh("destroy", made.name)
    made.libvirtd.virsh("start", made.name, "--paused")
    assert made.holds("vda", 0x11)
    assert made.holds("vda", 0x22, "1M")
    assert made.live().chain[0].path == made.bases["vda"]


def test_a_changed_path_with_the_old_driver_type_does_not_boot(domain: DomainFactory) -> None:
    """Why with_images changes the driver type too: docs/protocol.md, item 8."""
    made = domain({"vda": "raw"})
    overlay = made.snapshot()["vda"]
    xml = persistent(made)
    made.libvirtd.virsh("destroy", made.name)
    disk = chain.disk_xml(xml, "vda")
    below = disk[disk.index("<backingStore") : disk.index("</backingStore>") + len("</backingStore>")]
    made.guest.define(xml.replace(below, "").replace(overlay, made.bases["vda"]))
    with pytest.raises(RuntimeError, match="not in qcow2 format"):
        made.libvirtd.virsh("start", made.name, "--paused")
