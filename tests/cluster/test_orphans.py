"""Overlays that nobody waits for are told, counted and brought home, as the policy says; those of others stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.agents import SECONDS, Agent, CatchBackup, assert_home, assert_stored
from tests.support.domains import Domain, DomainFactory, wait_until
from tests.support.stopwatch import Stopwatch
from tests.support.tiers import in_chaos
from vmbackup.hypervisor.mark import Mark, MarkedDisk
from vmbackup.imaging.locks import hold_reader_lock
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.domain_lock import domain_lock

COUNT = "vmbackup_orphan_overlays"


def node_events(agent: Agent) -> list[tuple[str, str]]:
    """Reason and note of the events about its node, oldest first."""
    found = agent.kube.get("events.v1.events.k8s.io", "-n", "default")["items"]
    mine = [each for each in found if each["regarding"] == {**each["regarding"], "kind": "Node", "name": agent.node}]
    return [(each["reason"], each["note"]) for each in sorted(mine, key=lambda each: each["eventTime"])]


def told(agent: Agent, reason: str, path: str) -> bool:
    return any(each == reason and path in note for each, note in node_events(agent))


def lose_the_journal(agent: Agent) -> None:
    agent.kill()
    shutil.rmtree(agent.state_dir)


@contextmanager
def commits_fail(guest: Domain) -> Generator[None]:
    """Somebody reads the base, with QEMU's lock."""
    with ExitStack() as stack:
        for base in guest.bases.values():
            hold_reader_lock(stack.enter_context(Path(base).open("rb")).fileno())
        yield


def looks_like(guest: Domain, path: str) -> tuple[object, ...]:
    """All that a hand on it would change."""
    status = Path(path).stat()
    return guest.guest.live_xml(), guest.guest.persistent_xml(), status.st_ino, status.st_mtime_ns


def wait_for_another_look(agent: Agent, domain: DomainFactory) -> None:
    """An orphan that is made now is found by a look that has seen all others too."""
    other = domain(size="8M").snapshot(uid8="0ddba110")["vda"]
    wait_until(lambda: told(agent, "OrphanOverlay", other), "another look", SECONDS)


def test_an_overlay_whose_journal_and_backup_are_gone_is_told_counted_and_brought_home(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    guest.write("vda", 0x22, offset="16M")
    overlay = guest.live().source or ""
    lose_the_journal(own_agent)
    made.vanish()
    with commits_fail(guest):
        own_agent.start()
        wait_until(lambda: own_agent.metric(COUNT) == 1, "it counts", SECONDS)
        wait_until(lambda: told(own_agent, "OrphanOverlay", overlay), "it is told", SECONDS)
    wait_until(lambda: told(own_agent, "OrphanHome", overlay), "it is home", SECONDS)
    assert_home(guest, 0x22)
    assert guest.holds("vda", 0x11, length="16M")
    wait_until(lambda: own_agent.metric(COUNT) == 0, "it counts no more", SECONDS)
    assert not own_agent.records()


def test_a_backup_whose_journal_is_lost_adopts_its_own_overlay_and_says_so(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    guest.write("vda", 0x22, offset="16M")
    overlay = guest.live().source or ""
    lose_the_journal(own_agent)
    made.patch({"copy": {"bandwidth": None}})
    with commits_fail(guest):
        own_agent.start()
        named = f"{overlay} of a backup with the uid {made.uid[:8]}"
        wait_until(lambda: named in made.chain_message(), "ChainClean names it", SECONDS)
        assert own_agent.metric(COUNT) == 0, "somebody waits for it"
    assert_stored(made.wait())
    assert {"AdoptingOverlay", "AdoptedOverlayHome"} <= set(made.events())
    assert_home(guest, 0x22)


def test_by_the_policy_report_nothing_is_touched_and_the_next_backup_still_adopts_it(
    own_agent: Agent, domain: DomainFactory
) -> None:
    guest = domain(size="16M")
    guest.write("vda", 0x11)
    overlay = guest.snapshot()["vda"]
    before = looks_like(guest, overlay)
    own_agent.start(orphan_policy="Report", relist_interval="1")
    wait_until(lambda: told(own_agent, "OrphanOverlay", overlay), "it is told", SECONDS)
    wait_for_another_look(own_agent, domain)
    assert looks_like(guest, overlay) == before
    assert [reason for reason, note in node_events(own_agent) if overlay in note] == ["OrphanOverlay"]
    assert own_agent.metric(COUNT) == 2
    made = own_agent.apply(guest.name)
    assert_stored(made.wait())
    assert "AdoptedOverlayHome" in made.events()
    assert_home(guest)
    wait_until(lambda: own_agent.metric(COUNT) == 1, "it counts no more", SECONDS)


def test_by_the_policy_report_a_backup_that_vanished_without_its_finalizer_stays_on_its_overlay(
    own_agent: Agent, vanished: CatchBackup, domain: DomainFactory
) -> None:
    made, guest = vanished(own_agent)
    overlay = guest.live().source or ""
    own_agent.start(orphan_policy="Report", relist_interval="1")
    wait_until(lambda: made.events().count("OrphanOverlay") == 1, "its own events tell it", SECONDS)
    wait_for_another_look(own_agent, domain)
    assert guest.live().source == guest.persistent().source == overlay
    assert own_agent.metric(COUNT) == 2
    own_agent.kill()
    own_agent.start()
    wait_until(lambda: "OrphanHome" in made.events(), "it is home", SECONDS)
    assert_home(guest)


def test_by_the_policy_report_the_next_backup_adopts_what_one_left_that_vanished_without_its_finalizer(
    own_agent: Agent, vanished: CatchBackup
) -> None:
    """Its journal keeps the domain for it at the start, but nobody comes any more."""
    _, guest = vanished(own_agent)
    own_agent.start(orphan_policy="Report", relist_interval="1")
    following = own_agent.apply(guest.name)
    assert_stored(following.wait())
    assert {"AdoptingOverlay", "AdoptedOverlayHome"} <= set(following.events())
    assert_home(guest)


def test_somebody_elses_overlay_is_told_and_never_touched(own_agent: Agent, domain: DomainFactory) -> None:
    guest = domain(size="16M")
    foreign = f"{guest.directory}/snap.qcow2"
    definition = guest.libvirtd.virsh("dumpxml", "--inactive", guest.name)
    guest.guest.snapshot({"vda": foreign}, [])
    file = guest.directory / "definition.xml"
    file.write_text(definition)
    guest.libvirtd.virsh("define", str(file))
    guest.write("vda", 0x11)
    before = looks_like(guest, foreign)
    own_agent.start(relist_interval="1")
    wait_until(lambda: told(own_agent, "ForeignOverlay", foreign), "it is told", SECONDS)
    wait_for_another_look(own_agent, domain)
    assert looks_like(guest, foreign) == before
    assert guest.live().source == foreign
    assert own_agent.metric(COUNT) in (0, 1), "only the other one is an orphan"


def test_a_domain_on_which_another_process_is_at_work_is_left_to_it(own_agent: Agent, domain: DomainFactory) -> None:
    guest = domain(size="16M")
    guest.write("vda", 0x11)
    overlay = guest.snapshot()["vda"]
    with domain_lock(guest.guest.uuid, lambda: pytest.fail("held by somebody else")):
        own_agent.start(relist_interval="1")
        wait_for_another_look(own_agent, domain)
        assert guest.live().source == overlay
        assert not told(own_agent, "OrphanOverlay", overlay)
        wait_until(lambda: own_agent.metric(COUNT) == 0, "the other one is home, and this one does not count", SECONDS)
    wait_until(lambda: told(own_agent, "OrphanHome", overlay), "it is home", SECONDS)
    assert_home(guest)


def seconds_to_import() -> float:
    """What an agent does first: measured when it is over."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import vmbackup.agent"], check=True)
    return time.monotonic() - started


@pytest.mark.misfortune("the journal is lost")
@pytest.mark.parametrize("policy", ["Commit", in_chaos("Report")])
def test_a_guest_that_a_lost_backup_left_suspended_runs_again_within_seconds_of_the_agents_start(
    own_agent: Agent, domain: DomainFactory, policy: str
) -> None:
    guest = domain(size="16M")
    overlay = suspended_on_its_overlay(guest)
    watch = Stopwatch()
    own_agent.start(orphan_policy=policy)
    wait_until(lambda: guest.guest.state()[0] is Power.RUNNING, "running again", SECONDS)
    took = watch.seconds
    assert watch.allows(took, 5 + seconds_to_import()), watch
    if policy == "Commit":
        wait_until(lambda: told(own_agent, "OrphanHome", overlay), "it is home", SECONDS)
        assert_home(guest)
    else:
        wait_until(lambda: told(own_agent, "OrphanOverlay", overlay), "it is told", SECONDS)
        assert guest.live().source == guest.persistent().source == overlay
        assert not own_agent.records()
    assert Mark.of(guest.guest.live_xml() or "") is None


def test_it_runs_again_also_while_the_api_server_is_away(
    own_agent: Agent, domain: DomainFactory, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere.kubeconfig"
    elsewhere.write_text(own_agent.kube.kubeconfig.read_text().replace(own_agent.kube.url, "https://127.0.0.1:1"))
    guest = domain(size="16M")
    suspended_on_its_overlay(guest)
    watch = Stopwatch()
    own_agent.start(kubeconfig=str(elsewhere))
    wait_until(lambda: guest.guest.state()[0] is Power.RUNNING, "running again", SECONDS)
    took = watch.seconds
    assert watch.allows(took, 5 + seconds_to_import()), watch


def suspended_on_its_overlay(guest: Domain) -> str:
    """What a backup leaves that dies after its snapshot, with its journal: the overlay."""
    overlay = guest.overlay()
    guest.libvirtd.virsh("resume", guest.name)
    guest.guest.mark(Mark("01234567-89ab", disks=(MarkedDisk("vda", overlay),)))
    guest.guest.suspend()
    guest.snapshot()
    guest.write("vda", 0x11)
    return overlay


def test_off_on_an_orphan_it_is_told_and_committed_after_the_next_start(
    own_agent: Agent, domain: DomainFactory
) -> None:
    guest = domain(size="16M")
    overlay = guest.snapshot()["vda"]
    guest.write("vda", 0x11)
    guest.libvirtd.virsh("destroy", guest.name)
    own_agent.start(relist_interval="1")
    wait_until(lambda: told(own_agent, "OrphanOverlay", overlay), "it is told", SECONDS)
    assert own_agent.metric(COUNT) == 1
    guest.libvirtd.virsh("start", guest.name, "--paused")
    wait_until(lambda: told(own_agent, "OrphanHome", overlay), "it is home", SECONDS)
    assert_home(guest)
