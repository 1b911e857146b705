"""The calls of a backup on real libvirt and QEMU, one domain at a time."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.libvirtd import DiskSpec, Libvirtd, domain_xml
from tests.support.domains import DomainFactory, make_disk, wait_until
from tests.support.storage import mounted
from vmbackup.errors import PermanentError, TransientError, VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.chain import ChainImage
from vmbackup.hypervisor.guest import BlockJob
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.terms import Mirror, Power

AGENT = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
ALL_KINDS = {"vda": "raw", "vdb": "qcow2", "vdc": "chain"}


def test_the_states_of_a_guest_and_the_id_of_each_run(domain: DomainFactory) -> None:
    made = domain(start=False)
    guest = made.guest
    assert guest.state() == (Power.OFF, None)
    assert guest.live_xml() is None
    made.libvirtd.virsh("start", made.name, "--paused")
    paused, first = guest.state()
    guest.resume()
    assert guest.state() == (Power.RUNNING, first)
    guest.suspend()
    guest.suspend()
    assert guest.state() == (paused, first) == (Power.PAUSED, first)
    made.libvirtd.virsh("destroy", made.name)
    made.libvirtd.virsh("start", made.name, "--paused")
    _, second = guest.state()
    assert None not in (first, second)
    assert first != second


def test_nothing_can_be_asked_of_qemu_while_the_guest_is_off(domain: DomainFactory) -> None:
    guest = domain(start=False).guest
    assert guest.block_job("vda") is None
    assert guest.control_idle()
    assert not guest.migrating()
    with pytest.raises(TransientError):
        guest.written_images()


def test_a_guest_that_is_gone_altogether(domain: DomainFactory) -> None:
    made = domain(persistent=False)
    made.libvirtd.virsh("destroy", made.name)
    with pytest.raises(PermanentError) as gone:
        made.guest.state()
    assert gone.value.reason == "DomainNotFound"


def test_a_backup_of_every_kind_of_disk_comes_home(domain: DomainFactory) -> None:
    """Snapshot, commit, READY, pivot on raw, qcow2 and qcow2 with a template, seen from all sides at each step."""
    made = domain(ALL_KINDS)
    guest, bases = made.guest, dict(made.bases)
    template = made.live("vdc").chain[0].path
    template_before = Path(template).read_bytes()
    for target in bases:
        made.write(target, 0x11)
    assert guest.written_images() == bases

    overlays = made.snapshot()
    assert {target: made.live(target).source for target in bases} == overlays
    assert {target: made.persistent(target).source for target in bases} == overlays
    assert guest.written_images() == overlays
    assert guest.sync_config(overlays)
    assert not guest.sync_config(bases)
    assert made.live("vdc").chain[1] == ChainImage(template, "qcow2", "file")
    for target in bases:
        made.write(target, 0x22, "1M")

    for target, base in bases.items():
        guest.commit(target, base)
        made.wait_ready(target)
        job = guest.block_job(target)
        assert job is not None
        assert job.kind == "active-commit"
        assert guest.written_images()[target] == overlays[target], "until the pivot QEMU is on the overlay"
        guest.pivot(target)
        assert guest.block_job(target) is None
        assert made.live(target).mirror is Mirror.NONE

    assert {target: made.live(target).source for target in bases} == bases
    assert guest.written_images() == bases
    assert guest.sync_config(bases)
    assert not guest.sync_config(overlays)
    assert all(made.holds(target, 0x11) and made.holds(target, 0x22, "1M") for target in bases)
    assert made.live("vdc").chain == (ChainImage(template, "qcow2", "file"),)
    assert Path(template).read_bytes() == template_before


def test_disks_that_are_not_selected_are_not_touched(domain: DomainFactory, tmp_path: Path) -> None:
    cdrom = DiskSpec("sda", make_disk(tmp_path, "sda", "raw", "1M").path, device="cdrom", bus="sata")
    made = domain({"vda": "raw", "vdb": "qcow2"}, more_disks=(cdrom,))
    made.snapshot("vda")
    assert made.live("vda").source == made.persistent("vda").source == made.overlay("vda")
    assert made.live("vdb").source == made.bases["vdb"]
    assert made.live("sda").source == str(cdrom.path)


def test_a_file_that_is_there_already_is_not_made_an_overlay(domain: DomainFactory) -> None:
    made = domain({"vda": "raw", "vdb": "raw"})
    Path(made.overlay("vdb")).write_bytes(b"somebody's data")
    with pytest.raises(PermanentError, match="already exists"):
        made.snapshot()
    assert made.guest.written_images() == made.bases, "all or none"
    assert Path(made.overlay("vdb")).read_bytes() == b"somebody's data"
    assert not Path(made.overlay("vda")).exists()


def test_a_commit_goes_no_deeper_than_the_image_right_below(domain: DomainFactory) -> None:
    made = domain({"vda": "chain"})
    template = made.live().chain[0].path
    made.snapshot()
    with pytest.raises(TransientError, match="not immediately below"):
        made.guest.commit("vda", template)
    assert made.guest.block_job("vda") is None


def test_a_commit_is_ready_when_it_has_caught_up_and_not_before(domain: DomainFactory) -> None:
    made = domain()
    guest, base = made.guest, made.bases["vda"]
    made.snapshot()
    made.write("vda", 0x33, length="32M")
    guest.commit("vda", base, bandwidth=1 << 20)
    assert made.live().mirror is Mirror.PENDING
    job = guest.block_job("vda")
    assert job is not None
    assert (job.kind, job.end, job.bandwidth) == ("active-commit", 32 << 20, 1 << 20)
    assert job.current < job.end
    for too_early in (lambda: guest.pivot("vda"), lambda: guest.commit("vda", base)):
        with pytest.raises(TransientError) as refusal:
            too_early()
        assert refusal.value.reason == "BlockJobActive"

    guest.set_job_bandwidth("vda", None)
    made.wait_ready()
    job = guest.block_job("vda")
    assert job == BlockJob("active-commit", 32 << 20, 32 << 20, 0)
    guest.pivot("vda")
    assert made.holds("vda", 0x33, length="32M")


def test_a_pivot_without_a_job_is_observed_again(domain: DomainFactory) -> None:
    with pytest.raises(TransientError) as refusal:
        domain().guest.pivot("vda")
    assert refusal.value.reason == "StateChanged"


def test_a_job_of_somebody_else_is_told_apart(domain: DomainFactory) -> None:
    made = domain(persistent=False)
    copy = made.directory / "copy.raw"
    made.write("vda", 0x44, length="8M")
    arguments = ("vda", str(copy), "--transient-job", "--format", "raw", "--bandwidth", "1048576", "--bytes")
    made.libvirtd.virsh("blockcopy", made.name, *arguments)
    job = made.guest.block_job("vda")
    assert job is not None
    assert job.kind == "other"
    assert (made.live().foreign_job, made.live().mirror) == (True, Mirror.NONE)


def test_a_transient_domain_has_no_persistent_xml_and_comes_home_too(domain: DomainFactory) -> None:
    made = domain(persistent=False)
    assert made.guest.persistent_xml() is None
    made.snapshot()
    assert not made.guest.sync_config(made.bases)
    made.guest.commit("vda", made.bases["vda"])
    made.wait_ready()
    made.guest.pivot("vda")
    assert made.live().source == made.bases["vda"]
    with pytest.raises(TransientError, match="transient"):
        made.guest.define(made.guest.live_xml() or "")
    assert made.guest.persistent_xml() is None


def test_a_domain_that_was_undefined_meanwhile_is_not_defined_again(domain: DomainFactory) -> None:
    made = domain()
    xml = made.guest.persistent_xml()
    assert xml is not None
    made.libvirtd.virsh("undefine", made.name)
    with pytest.raises(TransientError):
        made.guest.define(xml)
    assert made.guest.persistent_xml() is None


def test_without_an_agent_in_the_xml_freezing_is_hopeless(domain: DomainFactory) -> None:
    guest = domain().guest
    guest.resume()
    for call in (guest.freeze, guest.thaw):
        with pytest.raises(PermanentError, match=r"org\.qemu\.guest_agent\.0") as error:
            call(2)
        assert error.value.reason == "AgentNotConfigured"


def test_an_agent_that_does_not_answer_may_answer_later(domain: DomainFactory) -> None:
    guest = domain(devices=AGENT).guest
    guest.resume()
    for call in (guest.freeze, guest.thaw):
        with pytest.raises(TransientError, match="qemu-guest-agent") as error:
            call(2)
        assert error.value.reason == "AgentUnresponsive"


def test_qemu_names_the_image_behind_every_bus(domain: DomainFactory, tmp_path: Path) -> None:
    buses = {"sda": "scsi", "hda": "ide", "sdb": "sata"}
    images = {target: str(make_disk(tmp_path, target, "raw").path) for target in buses}
    specs = tuple(DiskSpec(target, images[target], bus=bus) for target, bus in buses.items())
    empty = "<disk type='file' device='cdrom'><target dev='hdc' bus='ide'/><readonly/></disk>"
    made = domain(more_disks=specs, devices=f"<controller type='scsi' model='virtio-scsi'/>{empty}")
    assert made.guest.written_images() == {**made.bases, **images}


def test_an_overlay_with_a_strange_name_is_named_in_full_by_qemu(domain: DomainFactory) -> None:
    made = domain()
    overlay = str(made.directory / "a, b:ü'<&>.qcow2")
    made.guest.snapshot({"vda": overlay}, [])
    assert made.guest.written_images() == {"vda": overlay}
    assert made.live().source == overlay
    assert made.guest.sync_config({"vda": overlay})


def test_qemu_s_word_tells_of_a_pivot_that_libvirtd_died_in(domain: DomainFactory, hypervisor: Hypervisor) -> None:
    """docs/protocol.md, item 2: the mirror stays ready for ever, there is no job, and every XML names the overlay."""
    made = domain()
    overlay = made.snapshot()["vda"]
    made.guest.commit("vda", made.bases["vda"])
    made.wait_ready()
    made.libvirtd.kill()
    ((job,),) = made.libvirtd.qmp(made.name, ("query-jobs", {}))
    made.libvirtd.qmp(made.name, ("job-complete", {"id": job["id"]}))
    wait_until(
        lambda: made.libvirtd.qmp(made.name, ("query-jobs", {}))[0][0]["status"] == "concluded", "QEMU is on the base"
    )
    made.libvirtd.qmp(made.name, ("job-dismiss", {"id": job["id"]}))
    made.libvirtd.start()
    wait_until(hypervisor.ping, "a new connection")

    assert (made.live().source, made.live().mirror) == (overlay, Mirror.READY)
    assert made.guest.block_job("vda") is None
    assert made.guest.written_images() == made.bases
    with pytest.raises(TransientError):
        made.guest.pivot("vda")


def test_qemu_s_word_tells_of_a_snapshot_that_libvirtd_died_in(domain: DomainFactory, hypervisor: Hypervisor) -> None:
    """docs/protocol.md, item 1: every XML names the base, and QEMU writes the overlay."""
    made = domain()
    overlay = made.overlay()
    made.libvirtd.kill()
    ((device,),) = made.libvirtd.qmp(made.name, ("query-block", {}))
    arguments = {"node-name": device["inserted"]["node-name"], "snapshot-file": overlay, "format": "qcow2"}
    made.libvirtd.qmp(made.name, ("blockdev-snapshot-sync", {**arguments, "snapshot-node-name": "switched"}))
    made.libvirtd.start()
    wait_until(hypervisor.ping, "a new connection")

    assert made.live().source == made.persistent().source == made.bases["vda"]
    assert made.guest.written_images() == {"vda": overlay}


def test_a_call_in_flight_is_seen(domain: DomainFactory) -> None:
    made = domain()
    assert made.guest.control_idle()
    qemu = made.libvirtd.guest_pids()[made.name]
    os.kill(qemu, signal.SIGSTOP)
    try:
        resuming = threading.Thread(target=made.guest.resume)
        resuming.start()
        wait_until(lambda: not made.guest.control_idle(), "the resume is in flight")
    finally:
        os.kill(qemu, signal.SIGCONT)
    resuming.join(20)
    assert made.guest.control_idle()
    assert made.guest.state()[0] is Power.RUNNING


def test_a_job_of_the_whole_domain_is_seen(domain: DomainFactory) -> None:
    made = domain({"vda": "qcow2"})
    assert not made.guest.migrating()
    pull = made.directory / "pull.xml"
    pull.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{made.directory}/nbd'/><disks><disk name='vda' "
        f"type='file'><scratch file='{made.directory}/scratch.qcow2'/></disk></disks></domainbackup>"
    )
    made.libvirtd.virsh("backup-begin", made.name, str(pull))
    assert made.guest.migrating()
    made.libvirtd.virsh("domjobabort", made.name)
    wait_until(lambda: not made.guest.migrating(), "the end of the job")


def test_the_configuration_directory_must_be_there(domain: DomainFactory, tmp_path: Path) -> None:
    made = domain(start=False)
    elsewhere = Hypervisor(made.libvirtd.uri, config_dir=tmp_path / "not-mounted")
    try:
        with pytest.raises(PermanentError, match="mount it into the agent's container") as error:
            elsewhere.guest(made.name).sync_config(made.bases)
        assert error.value.reason == "ConfigDirectoryMissing"
    finally:
        elsewhere.close()


def test_the_file_of_another_domain_of_that_name_proves_nothing(domain: DomainFactory, tmp_path: Path) -> None:
    made = domain(start=False)
    xml = (made.libvirtd.config_dir / f"{made.name}.xml").read_text()
    (tmp_path / f"{made.name}.xml").write_text(xml.replace(made.guest.uuid, "00000000-0000-4000-8000-000000000000"))
    elsewhere = Hypervisor(made.libvirtd.uri, config_dir=tmp_path)
    try:
        assert made.guest.sync_config(made.bases)
        assert not elsewhere.guest(made.name).sync_config(made.bases)
    finally:
        elsewhere.close()


@pytest.fixture
def small_config(libvirtd: Libvirtd) -> Iterator[tuple[Libvirtd, Hypervisor]]:
    """A libvirtd whose configuration directory is a file system of 1 MiB, and our connection to it."""
    with tempfile.TemporaryDirectory(prefix="vmb-") as path:
        shutil.copytree(libvirtd.directory / "cache", Path(path) / "cache")  # what it knows of QEMU takes seconds
        (Path(path) / "libvirt").mkdir()
        with (
            mounted(Path(path) / "libvirt/qemu", "-t", "tmpfs", "-o", "size=1m", "tmpfs"),
            Libvirtd(path) as small,
        ):
            hypervisor = Hypervisor(small.uri, config_dir=small.config_dir)
            yield small, hypervisor
            hypervisor.close()


def test_a_configuration_that_libvirt_could_not_save_is_noticed(
    small_config: tuple[Libvirtd, Hypervisor], tmp_path: Path
) -> None:
    """docs/protocol.md, item 4: after the switch libvirt shows the overlay, but the file still names the base."""
    libvirtd, hypervisor = small_config
    disk = make_disk(tmp_path, "vda", "raw")
    xml = tmp_path / "domain.xml"
    xml.write_text(domain_xml("small", [disk]))
    libvirtd.virsh("define", str(xml))
    libvirtd.virsh("start", "small", "--paused")
    guest = hypervisor.guest("small")
    overlay = {"vda": str(tmp_path / "vda.vmb-01234567-vda.qcow2")}
    fill = libvirtd.config_dir / "fill"
    fill.write_bytes(bytes(shutil.disk_usage(libvirtd.config_dir).free))

    with pytest.raises(TransientError, match="No space left"):
        guest.snapshot(overlay, [])
    persistent = guest.persistent_xml()
    assert persistent is not None
    assert guest.written_images() == overlay
    assert chain.disks(persistent)[0].source == overlay["vda"]
    assert not guest.sync_config(overlay)
    with pytest.raises(TransientError, match="No space left"):
        guest.define(persistent)

    fill.unlink()
    guest.define(persistent)
    assert guest.sync_config(overlay)


def test_errors_say_which_domain_and_what_was_done(domain: DomainFactory) -> None:
    guest = domain().guest
    with pytest.raises(VMBackupError, match=rf"^{guest.name}: starting the commit of vda: "):
        guest.commit("vda", "/nowhere")
