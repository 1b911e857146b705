"""A guest agent that hangs blocks nothing, and leaves nothing frozen.

The real qemu-ga of a real Linux guest, behind a proxy on its channel that swallows, or holds back, what libvirt asks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from sandbox.guest import Guest, make_disk
from sandbox.libvirtd import Libvirtd
from tests.support.agent_channel import Channel, ProxiedGuest
from tests.support.backups import BackupFactory
from tests.support.domains import at_work, wait_until
from tests.support.kill_points import Driving, Moment, Task, When, guardians
from vmbackup.api.status import Outcome
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.protocol.record import Freeze
from vmbackup.reconcile.steps import guest_hold

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
SECONDS = 2  # spec.snapshot.freezeTimeoutSeconds
IN_TIME = 15  # seconds: a freeze and up to two attempts to thaw, and a machine that is busy; nobody waits for ever
QUIESCE_TRY = {"quiesce": "Try", "freezeTimeoutSeconds": SECONDS}
QUIESCE = {"quiesce": "Require", "freezeTimeoutSeconds": SECONDS}


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    made = Channel(tmp_path / "agent.sock")
    yield made
    made.close()


@pytest.fixture
def guest(libvirtd: Libvirtd, tmp_path: Path, channel: Channel) -> Iterator[Guest]:
    disk = make_disk("vda", tmp_path / "vda.raw", size_mib=64)
    made = ProxiedGuest(libvirtd.virsh, "deaf", tmp_path, [disk], agent=True)
    made.channel = channel.path
    with at_work(made, libvirtd):
        yield made


def frozen(libvirtd: Libvirtd) -> bool:
    answer = libvirtd.virsh("qemu-agent-command", "deaf", '{"execute": "guest-fsfreeze-status"}')
    return json.loads(answer)["return"] == "frozen"


def assert_it_writes(libvirtd: Libvirtd, guest: Guest, channel: Channel) -> None:
    """It is not frozen, and goes on."""
    channel.pass_all()
    assert not frozen(libvirtd)
    guest.wait_for_more()
    guest.assert_only_rising()


@pytest.mark.misfortune("the guest agent hangs")
@pytest.mark.parametrize("commands", [(), (FREEZE,)], ids=["answers nothing", "answers all but a freeze"])
def test_a_backup_goes_on_without_an_agent_that_hangs(
    guest: Guest, channel: Channel, backup: BackupFactory, libvirtd: Libvirtd, commands: tuple[str, ...]
) -> None:
    channel.swallow(*commands)
    started = time.monotonic()
    running = backup("deaf", snapshot=QUIESCE_TRY)
    running.wait_for(lambda report: report.snapshot_time is not None, "its snapshot")
    took = time.monotonic() - started
    assert took < IN_TIME, f"the snapshot waited {took:.1f} s for a guest agent that hangs"
    channel.pass_all()
    report = running.end()
    assert report.outcome is Outcome.SUCCEEDED
    assert report.quiesced is False
    assert "NotQuiesced" in running.told.reasons
    assert running.record.freeze is Freeze.TRIED
    assert_it_writes(libvirtd, guest, channel)


def test_a_freeze_that_comes_late_is_thawed(
    guest: Guest, channel: Channel, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    channel.fate = lambda command: SECONDS + 0.5 if command == FREEZE else 0.0
    running = backup("deaf", snapshot=QUIESCE_TRY)
    assert running.end().quiesced is False
    assert {FREEZE, THAW} <= set(channel.asked)
    assert_it_writes(libvirtd, guest, channel)


def test_a_required_quiesce_fails_and_leaves_the_guest_as_it_was(
    guest: Guest, channel: Channel, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    channel.swallow(FREEZE)
    running = backup("deaf", snapshot=QUIESCE)
    running.wait_for(lambda report: report.backup_complete is False, "its failure", IN_TIME)
    report = running.end()
    assert report.reason == "QuiesceFailed"
    assert report.chain_clean
    assert_it_writes(libvirtd, guest, channel)


def test_an_agent_that_freezes_and_does_not_answer_the_thaw_is_asked_again(
    guest: Guest, channel: Channel, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    channel.swallow(THAW)
    running = backup("deaf", snapshot=QUIESCE_TRY)
    wait_until(lambda: channel.asked.count(THAW) >= 2, "a second attempt to thaw", 30)
    assert not running.told.timeline[-1][1].outcome, "it has ended with the guest frozen"
    channel.pass_all()
    report = running.end()
    assert report.outcome is Outcome.SUCCEEDED
    assert report.quiesced
    assert_it_writes(libvirtd, guest, channel)


@pytest.mark.chaos
def test_killed_while_it_waits_for_an_agent_that_hangs_nothing_is_left_frozen(
    guest: Guest, channel: Channel, libvirtd: Libvirtd, tmp_path: Path
) -> None:
    channel.fate = lambda command: SECONDS if command == FREEZE else 0.0
    task = Task(
        libvirtd.uri,
        libvirtd.config_dir,
        tmp_path,
        "deaf",
        (),
        str(uuid4()),
        {"snapshot": QUIESCE_TRY},
        moment=Moment(When.DURING, "freezing the file systems"),
        guarded=True,
    )
    assert Driving(task).killed()
    wait_until(lambda: not guardians(task.state_dir), "the end of the guardian", 60)
    assert not frozen(libvirtd)
    report, _, reasons = Driving(replace(task, moment=None, guarded=False)).end()
    assert report.outcome is Outcome.SUCCEEDED, reasons
    assert_it_writes(libvirtd, guest, channel)


def test_a_guest_left_frozen_whose_agent_never_answers_is_refused_and_later_thawed(
    guest: Guest,
    channel: Channel,
    backup: BackupFactory,
    libvirtd: Libvirtd,
    hypervisor: Hypervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backup that froze it is lost."""
    monkeypatch.setattr(guest_hold, "_THAW_ATTEMPTS", 2)
    hypervisor.guest("deaf").mark(Mark("uid-of-a-lost-one", frozen=True, disks=(MarkedDisk("vda", "/gone.qcow2"),)))
    libvirtd.virsh("domfsfreeze", "deaf")
    channel.swallow()
    refused = backup("deaf", snapshot=QUIESCE_TRY).end()
    assert (refused.outcome, refused.reason) == (Outcome.REFUSED, "GuestFrozen")
    assert "virsh domfsthaw deaf" in refused.message
    channel.pass_all()
    assert backup("deaf", snapshot=QUIESCE_TRY).end().outcome is Outcome.SUCCEEDED
    assert_it_writes(libvirtd, guest, channel)
