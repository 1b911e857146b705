"""Reading disk chains from XML, and putting other images into it."""

from __future__ import annotations

import pytest

from vmbackup.errors import PermanentError, RefusedError
from vmbackup.hypervisor.chain import (
    ChainImage,
    Disk,
    disk_xml,
    disks,
    domain_facts,
    ineligible,
    on_base,
    on_overlay,
    overlay_path,
    parse_overlay,
    with_images,
)
from vmbackup.protocol.terms import Mirror

OVERLAY = "/images/web.vmb-0123abcd-vda.qcow2"
PERSISTENT = """\
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <uuid>6f0a1d4e-0c3b-4b58-9a3e-5f2f7c1f0a11</uuid>
  <!-- a comment with <disk> in it -->
  <metadata>
    <app:info xmlns:app="http://example.org/app"><disk>ünïcode</disk><!-- kept --></app:info>
  </metadata>
  <os><nvram template='/usr/share/OVMF.fd'>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source file='/images/web.raw'/>
      <target dev='vda' bus='virtio'/>
      <serial>S1</serial>
      <boot order='1'/>
    </disk>
    <disk type="block" device="disk" >
      <driver name="qemu"  type="qcow2"/>
      <source dev="/dev/vg/b"/>
      <backingStore type='file'>
        <format type='qcow2'/>
        <source file='/images/template.qcow2'/>
      </backingStore>
      <target dev="vdb" bus="virtio"/>
    </disk>
    <disk type='file' device='cdrom'>
      <target dev='sda' bus='sata'/>
      <readonly/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-foo'/>
  </qemu:commandline>
</domain>
"""
ON_OVERLAY = """\
<disk type='file' device='disk'>
  <driver name='qemu' type='qcow2'/>
  <source file='/images/web.vmb-0123abcd-vda.qcow2' index='3'/>
  <backingStore type='file' index='1'>
    <format type='raw'/>
    <source file='/images/web.raw'/>
    <backingStore/>
  </backingStore>
  {mirror}
  <target dev='vda' bus='virtio'/>
  <alias name='virtio-disk0'/>
</disk>"""


def domain(disk: str) -> str:
    return f"<domain><devices>{disk}</devices></domain>"


def test_the_disks_of_a_domain_with_their_chains() -> None:
    assert disks(PERSISTENT) == (
        Disk("vda", "disk", "file", "/images/web.raw", "raw"),
        Disk(
            "vdb",
            "disk",
            "block",
            "/dev/vg/b",
            "qcow2",
            chain=(ChainImage("/images/template.qcow2", "qcow2", "file"),),
        ),
        Disk("sda", "cdrom", "file", None, "raw", readonly=True),
    )


@pytest.mark.parametrize(
    ("mirror", "seen", "foreign"),
    [
        ("", Mirror.NONE, False),
        ("<mirror type='file' job='active-commit'/>", Mirror.PENDING, False),
        ("<mirror type='file' job='active-commit' ready='yes'/>", Mirror.READY, False),
        ("<mirror type='file' job='active-commit' ready='pivot'/>", Mirror.PENDING, False),
        ("<mirror type='file' job='active-commit' ready='abort'/>", Mirror.PENDING, False),
        ("<mirror type='file' job='copy' ready='yes'/>", Mirror.NONE, True),
    ],
)
def test_a_mirror_is_ready_only_when_it_is_an_active_commit_and_says_yes(
    mirror: str, seen: Mirror, foreign: bool
) -> None:
    (disk,) = disks(domain(ON_OVERLAY.format(mirror=mirror)))
    assert (disk.mirror, disk.foreign_job) == (seen, foreign)


def test_a_live_disk_on_its_overlay() -> None:
    (disk,) = disks(domain(ON_OVERLAY.format(mirror="")))
    assert (disk.source, disk.format, disk.alias) == (OVERLAY, "qcow2", "virtio-disk0")
    assert disk.chain == (ChainImage("/images/web.raw", "raw", "file"),)


SLICED_TEMPLATE = (
    "<backingStore type='file'><format type='raw'/><source file='/t'><slices/></source><backingStore/></backingStore>"
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("", None),
        ("<backingStore type='file'><format type='vmdk'/><source file='/t'/></backingStore>", None),
        ("<readonly/>", "is read-only"),
        ("<shareable/>", "is shareable"),
        ("<transient/>", "is transient"),
        ("<encryption format='luks'/>", "is encrypted"),
        ("<backingStore type='network'><format type='raw'/><source name='p/i'/></backingStore>", "has a backing image"),
        (SLICED_TEMPLATE, "has the backing image /t with <slices>, that is, not the whole file"),
        (SLICED_TEMPLATE.replace("slices", "encryption"), "has the backing image /t with <encryption>"),
        (SLICED_TEMPLATE.replace("slices", "a-word-of-2030"), "has the backing image /t with <a-word-of-2030>"),
        (SLICED_TEMPLATE.replace("slices", "seclabel"), None),
    ],
)
def test_what_is_inside_a_disk_decides_whether_it_is_eligible(change: str, reason: str | None) -> None:
    xml = f"<disk type='file'><driver type='raw'/><source file='/a.raw'/>{change}<target dev='vda'/></disk>"
    (disk,) = disks(domain(xml))
    assert_reason(disk, reason)


@pytest.mark.parametrize(
    ("attributes", "image_format", "source", "reason"),
    [
        ("type='file' device='disk'", "qcow2", "file='/a'", None),
        ("type='block' device='disk'", "raw", "dev='/dev/a'", None),
        ("type='file' device='cdrom'", "raw", "file='/a'", "is a cdrom"),
        ("type='file' device='floppy'", "raw", "file='/a'", "is a floppy"),
        ("type='block' device='lun'", "raw", "dev='/dev/a'", "is passed through as a LUN"),
        ("type='vhostuser' device='disk'", "raw", "type='unix' path='/s'", "is served by vhost-user"),
        ("type='network' device='disk'", "raw", "protocol='rbd' name='p/i'", "has a network source"),
        ("type='volume' device='disk'", "raw", "pool='p' volume='v'", "has a source of type volume"),
        ("type='file' device='disk'", "vmdk", "file='/a'", "has the format vmdk"),
        ("type='file' device='disk'", "raw", "startupPolicy='optional'", "has no image"),
    ],
)
def test_the_kind_of_a_disk_decides_whether_it_is_eligible(
    attributes: str, image_format: str, source: str, reason: str | None
) -> None:
    xml = f"<disk {attributes}><driver type='{image_format}'/><source {source}/><target dev='vda'/></disk>"
    assert_reason(disks(domain(xml))[0], reason)


def test_an_image_in_a_slice_is_not_eligible() -> None:
    source = "<source file='/a'><slices><slice type='storage' offset='1' size='2'/></slices></source>"
    assert_reason(disks(domain(f"<disk type='file'>{source}<target dev='vda'/></disk>"))[0], "uses a slice")


def assert_reason(disk: Disk, reason: str | None) -> None:
    found = ineligible(disk)
    assert found is None if reason is None else (found or "").startswith(reason)


@pytest.mark.parametrize(
    ("disk", "directory", "path"),
    [
        (Disk("vda", "disk", "file", "/images/web.raw", "raw"), None, OVERLAY),
        (Disk("vda", "disk", "file", "/images/web", "raw"), None, OVERLAY),
        (Disk("vda", "disk", "file", "/images/web.raw", "raw"), "/fast", "/fast/web.vmb-0123abcd-vda.qcow2"),
        (Disk("sdaa", "disk", "block", "/dev/vg/data", "raw"), "/fast", "/fast/data.vmb-0123abcd-sdaa.qcow2"),
    ],
)
def test_an_overlay_is_named_after_its_base_the_backup_and_the_disk(
    disk: Disk, directory: str | None, path: str
) -> None:
    assert overlay_path(disk, "0123abcd", directory) == path
    assert parse_overlay(path) == ("0123abcd", disk.target)


def test_the_overlay_of_a_block_device_needs_a_directory() -> None:
    with pytest.raises(RefusedError, match=r"disk vda is the block device /dev/vg/data: .*--overlay-dir"):
        overlay_path(Disk("vda", "disk", "block", "/dev/vg/data", "raw"), "0123abcd")


@pytest.mark.parametrize(
    "path", ["/images/web.raw", "/images/web.vmb-0123.qcow2", "/images/web.vmb-0123abcd-vda.raw", ""]
)
def test_other_files_are_not_taken_for_our_overlays(path: str) -> None:
    assert parse_overlay(path) is None


def test_facts_of_a_domain() -> None:
    facts = domain_facts(PERSISTENT)
    assert (facts.name, facts.uuid) == ("web", "6f0a1d4e-0c3b-4b58-9a3e-5f2f7c1f0a11")
    assert facts.nvram == "/var/lib/libvirt/qemu/nvram/web_VARS.fd"


def test_nvram_in_the_newer_form_of_libvirt_or_none_at_all() -> None:
    newer = "<domain><os><nvram type='file'>\n<source file='/nvram/a.fd'/>\n</nvram></os></domain>"
    assert domain_facts(newer).nvram == "/nvram/a.fd"
    assert domain_facts("<domain><os/></domain>").nvram is None


def test_a_disk_is_remembered_as_it_stands_in_the_xml() -> None:
    remembered = disk_xml(PERSISTENT, "vda")
    assert remembered in PERSISTENT
    assert (remembered[:6], remembered[-7:]) == ("<disk ", "</disk>")
    assert "/images/web.raw" in remembered


def test_a_disk_that_is_not_there_any_more() -> None:
    with pytest.raises(PermanentError, match="no longer has a disk vdz"):
        disk_xml(PERSISTENT, "vdz")


def test_a_disk_goes_to_its_overlay_and_all_else_stays() -> None:
    base = disk_xml(PERSISTENT, "vda")
    there = with_images(PERSISTENT, {"vda": on_overlay(base, OVERLAY)})
    before, after = PERSISTENT.split(base)
    assert there.startswith(before)
    assert there.endswith(after)
    disk = disks(there)[0]
    assert (disk.source, disk.format, disk.kind) == (OVERLAY, "qcow2", "file")
    assert disk.chain == (ChainImage("/images/web.raw", "raw", "file"),)
    for kept in ('cache="none"', 'io="native"', 'discard="unmap"', "<serial>S1</serial>", '<boot order="1"'):
        assert kept in disk_xml(there, "vda")


@pytest.mark.parametrize("target", ["vda", "vdb"])
def test_there_and_back_is_where_it_began(target: str) -> None:
    base = disk_xml(PERSISTENT, target)
    there = with_images(PERSISTENT, {target: on_overlay(base, "/fast/x.vmb-0123abcd-vdb.qcow2")})
    back = with_images(there, {target: base})
    assert disks(back) == disks(PERSISTENT)
    assert with_images(there, {target: on_base(disk_xml(there, target))}) == back


def test_a_block_device_with_a_template_keeps_its_whole_chain_under_the_overlay() -> None:
    there = with_images(PERSISTENT, {"vdb": on_overlay(disk_xml(PERSISTENT, "vdb"), "/fast/b.qcow2")})
    disk = disks(there)[1]
    assert (disk.kind, disk.source) == ("file", "/fast/b.qcow2")
    assert disk.chain == (
        ChainImage("/dev/vg/b", "qcow2", "block"),
        ChainImage("/images/template.qcow2", "qcow2", "file"),
    )


def test_edits_that_the_user_made_meanwhile_are_kept() -> None:
    base = disk_xml(PERSISTENT, "vda")
    there = with_images(PERSISTENT, {"vda": on_overlay(base, OVERLAY)})
    edited = there.replace("<serial>S1</serial>", "<serial>S2</serial>").replace('cache="none"', 'cache="writeback"')
    back = disk_xml(with_images(edited, {"vda": base}), "vda")
    assert "<serial>S2</serial>" in back
    assert 'cache="writeback"' in back
    assert "/images/web.raw" in back


def test_several_disks_at_once_each_to_its_own_image() -> None:
    vda, vdb = disk_xml(PERSISTENT, "vda"), disk_xml(PERSISTENT, "vdb")
    there = with_images(PERSISTENT, {"vda": on_overlay(vda, "/o/a.qcow2"), "vdb": vdb})
    assert [disk.source for disk in disks(there)] == ["/o/a.qcow2", "/dev/vg/b", None]


def test_the_base_and_its_format_are_found_in_the_xml_of_the_overlay() -> None:
    base = on_base(ON_OVERLAY.format(mirror="<mirror type='file' job='active-commit' ready='yes'/>"))
    (disk,) = disks(domain(base))
    assert (disk.source, disk.format, disk.mirror, disk.chain) == ("/images/web.raw", "raw", Mirror.NONE, ())
    assert "index=" not in base


def test_no_base_is_made_up() -> None:
    with pytest.raises(PermanentError, match="disk vda names no backing image"):
        on_base(disk_xml(PERSISTENT, "vda"))


def test_labels_of_the_base_hold_for_its_overlay_too() -> None:
    base = (
        "<disk type='file'><driver name='qemu' type='raw'/>"
        "<source file='/a'><seclabel model='dac' relabel='no'/></source><target dev='vda'/></disk>"
    )
    assert on_overlay(base, OVERLAY).count("<seclabel") == 2


def test_a_disk_without_a_driver_gets_one_that_says_qcow2() -> None:
    base = "<disk type='file'><source file='/a'/><target dev='vda'/></disk>"
    (disk,) = disks(with_images(domain(base), {"vda": on_overlay(base, OVERLAY)}))
    assert (disk.source, disk.format, disk.chain) == (OVERLAY, "qcow2", (ChainImage("/a", "raw", "file"),))


def test_xml_with_entities_is_refused() -> None:
    bomb = '<!DOCTYPE d [<!ENTITY a "b">]><domain><name>&a;</name></domain>'
    for read in (disks, domain_facts, lambda xml: disk_xml(xml, "vda")):
        with pytest.raises(ValueError, match="EntitiesForbidden"):
            read(bomb)
