"""The journal of a backup is lost while its guest is suspended or on its overlay: the domain tells enough."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support import own_libvirtd
from tests.support.backups import BackupFactory
from tests.support.domains import Domain, DomainFactory, GuestFactory
from tests.support.kill_points import Driving, Interruption, Moment, When
from tests.support.stopwatch import Stopwatch
from tests.support.survival import SUSPENDED_SECONDS, longest_suspension, task_of, what_is_wrong
from vmbackup.api.status import Outcome
from vmbackup.hypervisor.mark import URI, Mark
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.leftovers.takeover import take_over_lost
from vmbackup.reconcile.node import Node

# Without its journal, a driver may define a domain while the snapshot of a killed one is in flight.
libvirtd, hypervisor = own_libvirtd.libvirtd, own_libvirtd.hypervisor

GUARDED = {"switchPolicy": "Guarded"}
SPEC = {"nodeName": "here", "domain": "any", "storeRef": {"name": "none"}}

# While the guest is suspended, or just before or after that.
STILL = [
    Moment(When.AFTER, "marking", 1),
    Moment(When.DURING, "suspending", 1),
    Moment(When.AFTER, "suspending", 1),
    Moment(When.DURING, "taking the snapshot", 1),
    Moment(When.AFTER, "taking the snapshot", 1),
    Moment(When.AFTER, "redefining", 2),
    Moment(When.DURING, "resuming", 1),
    Moment(When.AFTER, "resuming", 1),
    Moment(When.AFTER, "suspending", 2),
    Moment(When.DURING, "pivoting vda", 1),
    Moment(When.AFTER, "pivoting vda", 1),
    Moment(When.AFTER, "pivoting vdb", 1),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("same", [True, False], ids=["the same backup", "the next backup"])
def test_of_a_lost_journal_the_guest_runs_again_at_once_and_lost_nothing(guests: GuestFactory, same: bool) -> None:
    moments: Sequence[Moment] = STILL if same else STILL[1::3]
    several = guests(len(moments))

    def survive(guest: Domain, moment: Moment) -> list[str]:
        task = task_of(guest, GUARDED, moment)
        if not Driving(task).killed():
            return [f"{moment}: did not come by"]
        left = f"left {guest.guest.state()[0]} with {Mark.of(guest.guest.live_xml() or '<domain/>')}"
        shutil.rmtree(task.state_dir)
        again = replace(task, uid=task.uid if same else str(uuid.uuid4()), moment=None)
        driving = Driving(again)
        watch = Stopwatch()
        suspended = longest_suspension(guest, driving)
        report, _, reasons = driving.end(0)
        wrong = list(what_is_wrong(guest, again, report))
        if not watch.allows(suspended, SUSPENDED_SECONDS):
            wrong.append(f"suspended for {suspended:.1f} s")
        stored = report.reason == "AlreadyStored"  # complete before its journal was lost: never made again
        if report.outcome is not Outcome.SUCCEEDED and not stored:
            wrong.append(f"it ended {report.outcome}: {report.reason}: {report.message}")
        if Mark.of(guest.guest.live_xml() or "") is not None:
            wrong.append("its mark is left")
        return [f"{moment}: {each}; {left}; {reasons}" for each in wrong]

    with ThreadPoolExecutor(6) as pool:
        wrong = [each for found in pool.map(survive, several, moments) for each in found]
    assert not wrong, "\n".join(wrong)


def test_the_mark_is_there_while_the_guest_is_suspended_and_never_in_its_definition(
    guests: GuestFactory, libvirtd: Libvirtd
) -> None:
    (guest,) = guests(1)
    task = task_of(guest, GUARDED, Moment(When.AFTER, "redefining", 2), interruption=Interruption.HOLD)
    driving = Driving(task)
    assert driving.wait_until_held()
    assert guest.guest.state()[0] is Power.PAUSED
    mark = Mark.of(guest.guest.live_xml() or "")
    assert mark is not None
    assert mark.uid == task.uid
    assert {disk.target: disk.overlay for disk in mark.disks} == {
        target: guest.live(target).source for target in guest.bases
    }
    assert URI not in (guest.guest.persistent_xml() or "")
    assert URI not in (libvirtd.config_dir / f"{guest.name}.xml").read_text()
    driving.let_go()
    report, _, _ = driving.end()
    assert report.outcome is Outcome.SUCCEEDED
    assert Mark.of(guest.guest.live_xml() or "") is None
    assert URI not in (guest.guest.persistent_xml() or "")


def test_a_mark_dies_with_its_guest(domain: DomainFactory, libvirtd: Libvirtd) -> None:
    guest = domain(size="4M")
    guest.guest.mark(Mark("01234567-89ab"))
    libvirtd.virsh("destroy", guest.name)
    libvirtd.virsh("start", guest.name, "--paused")
    assert Mark.of(guest.guest.live_xml() or "") is None


def test_a_guest_that_somebody_else_suspended_is_never_resumed(
    domain: DomainFactory, backup: BackupFactory, node: Node
) -> None:
    guest = domain(size="4M")
    assert backup(guest.name).end().outcome is Outcome.SUCCEEDED
    assert guest.guest.state()[0] is Power.PAUSED
    assert take_over_lost(node, guest.guest, [], SPEC) is None
    assert guest.guest.state()[0] is Power.PAUSED


def test_a_mark_that_was_only_left_is_taken_away_and_means_nothing(
    domain: DomainFactory, backup: BackupFactory, node: Node, libvirtd: Libvirtd
) -> None:
    """The guest was resumed, and the driver killed before it took its mark away; then somebody suspended the guest."""
    guest = domain(size="4M")
    ended = backup(guest.name)
    assert ended.end().outcome is Outcome.SUCCEEDED
    guest.guest.mark(Mark(ended.record.uid))
    assert take_over_lost(node, guest.guest, [], SPEC) is None
    assert Mark.of(guest.guest.live_xml() or "") is None

    guest.guest.mark(Mark("01234567-of-a-lost-one"))
    libvirtd.virsh("resume", guest.name)
    assert take_over_lost(node, guest.guest, [], SPEC) is None
    assert Mark.of(guest.guest.live_xml() or "") is None


def test_a_next_start_on_an_overlay_that_is_home_is_put_right_and_the_overlay_kept(
    domain: DomainFactory, backup: BackupFactory, libvirtd: Libvirtd
) -> None:
    """The journal is lost, and so is the save of the configuration after the pivot: it would boot a stale image."""
    guest = domain(size="4M")
    on_base = guest.guest.persistent_xml() or ""
    overlay = guest.snapshot()["vda"]
    on_overlay = guest.guest.persistent_xml() or ""
    guest.write("vda", 0x11)
    guest.guest.commit("vda", guest.bases["vda"])
    guest.wait_ready()
    guest.guest.pivot("vda")
    assert overlay in on_overlay
    assert overlay not in on_base
    guest.guest.define(on_overlay)
    running = backup(guest.name)
    report = running.wait_for(lambda report: report.reason == "Quarantined", "quarantine")
    assert overlay in report.chain_message
    assert guest.persistent().source == guest.live().source == guest.bases["vda"]
    assert libvirtd.config_dir.joinpath(f"{guest.name}.xml").read_text().count(overlay) == 0
    assert guest.holds("vda", 0x11)


def test_a_guest_without_an_agent_is_left_without_a_mark(domain: DomainFactory, backup: BackupFactory) -> None:
    """One that said "frozen" was taken for a guest to be thawed, by each later backup that did not know this one."""
    guest = domain(size="4M")
    guest.libvirtd.virsh("resume", guest.name)
    assert backup(guest.name, switchPolicy="Live").end().outcome is Outcome.SUCCEEDED
    assert Mark.of(guest.guest.live_xml() or "") is None
