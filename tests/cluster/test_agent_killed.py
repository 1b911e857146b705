"""An agent may be killed at any moment, or stopped: the next one finds each backup where it is, and ends it well."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.agents import SECONDS, SLOW, Agent, CatchBackup, assert_home, assert_stored
from tests.support.domains import DomainFactory, wait_until
from tests.support.stopwatch import Stopwatch
from vmbackup.protocol.record import Snapshot
from vmbackup.protocol.terms import Power

BARRIER = 31  # seconds (PROTOCOL R4), after an agent that died with a libvirt call in flight


def test_killed_while_one_is_queued_both_become_ready(
    own_agent: Agent, copying: CatchBackup, domain: DomainFactory
) -> None:
    own_agent.start()
    first, guest = copying(own_agent)
    second = own_agent.apply(guest.name, name=f"a-{own_agent.node}")  # the API server lists it first
    wait_until(lambda: second.condition("Ready")[1] == "Queued", "queued", SECONDS)
    own_agent.kill()
    first.patch({"copy": {"bandwidth": None}})
    own_agent.start()
    assert_stored(first.wait())
    assert_stored(second.wait())
    assert second.events().count("AdoptingOverlay") == 0
    assert_home(guest)


def test_killed_in_the_snapshot_the_guest_is_resumed_and_the_backup_becomes_ready(
    own_agent: Agent, domain: DomainFactory
) -> None:
    own_agent.start()
    guest = domain(size="16M")
    guest.write("vda", 0x11)
    guest.libvirtd.virsh("resume", guest.name)
    made = own_agent.apply(guest.name)
    wait_until(lambda: any(each.snapshot is Snapshot.INTENDED for each in own_agent.records()), "snapshot intended")
    own_agent.kill()
    own_agent.start()
    assert_stored(made.wait(seconds=SECONDS + BARRIER))
    assert guest.guest.state()[0] is Power.RUNNING
    assert_home(guest)


@pytest.mark.scenario(7)
def test_killed_while_copying_it_copies_again(own_agent: Agent, copying: CatchBackup) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    own_agent.kill()
    guest.write("vda", 0x33, offset="48M")
    made.patch({"copy": {"bandwidth": None}})
    own_agent.start()
    folder = assert_stored(made.wait())
    assert_home(guest)
    assert guest.holds("vda", 0x33, offset="48M")
    with (folder / "vda.raw").open("rb") as copy:
        assert copy.read(4) == b"\x11" * 4
        copy.seek(48 << 20)
        assert copy.read(4) == bytes(4)


def test_killed_while_committing_the_job_goes_on_and_is_taken_up(own_agent: Agent, committing: CatchBackup) -> None:
    own_agent.start()
    made, guest = committing(own_agent)
    wait_until(lambda: guest.guest.block_job("vda") is not None, "a commit job")
    own_agent.kill()
    before = guest.guest.block_job("vda")
    made.patch({"commit": {"bandwidth": None}})
    own_agent.start()
    status = made.wait(seconds=SECONDS + BARRIER)
    assert before is not None
    assert status["disks"][0]["attempts"] == 1
    assert_stored(status)
    assert_home(guest, 0x22)


def test_killed_while_shipping_the_copy_is_completed(own_agent: Agent, xfs: Path, domain: DomainFactory) -> None:
    own_agent.use_store(xfs / "store")
    own_agent.start()
    guest = domain(directory=xfs, size="64M")
    guest.write("vda", 0x11, length="16M")
    made = own_agent.apply(guest.name, **{"copy.bandwidth": SLOW})
    made.wait_for_phase("Pivoted")
    own_agent.kill()
    assert made.condition("Ready") == ("Unknown", "Shipping")
    assert_home(guest)
    made.patch({"copy": {"bandwidth": None}})
    own_agent.start()
    assert_stored(made.wait())


def test_stopped_while_copying_it_ends_soon_and_the_next_agent_carries_on(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    watch = Stopwatch()
    own_agent.stop()
    assert watch.within(8), watch
    assert "Traceback" not in own_agent.log
    assert guest.live().source != guest.bases["vda"]
    made.patch({"copy": {"bandwidth": None}})
    own_agent.start()
    assert_stored(made.wait())
    assert_home(guest)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_the_finalizer_of_a_deleted_backup_outlives_the_agent(
    own_agent: Agent, committing: CatchBackup, end: str
) -> None:
    own_agent.start()
    made, guest = committing(own_agent)
    made.delete("--wait=false")
    getattr(own_agent, end)()
    assert made.exists()
    own_agent.start()
    wait_until(lambda: guest.guest.block_job("vda") is not None, "a commit job", SECONDS)
    assert made.exists()
    made.patch({"commit": {"bandwidth": None}})
    made.wait_until_gone(SECONDS + BARRIER)
    assert_home(guest, 0x22)
    wait_until(lambda: not own_agent.records(), "its journal is gone")


def test_deleted_and_stripped_of_its_finalizer_while_no_agent_runs_its_chain_still_comes_home(
    own_agent: Agent, vanished: CatchBackup
) -> None:
    _, guest = vanished(own_agent)
    own_agent.start()
    wait_until(lambda: not own_agent.records(), "its journal is gone", SECONDS)
    assert_home(guest)


def test_an_orphan_is_recorded_when_home_is_impossible_and_brought_home_later(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    guest.libvirtd.kill_guest(guest.name)
    wait_until(lambda: made.condition("Ready")[1] == "DomainOff", "DomainOff", SECONDS)
    made.delete()
    assert [record.orphan for record in own_agent.records()] == [True]
    wait_until(lambda: own_agent.metric("vmbackup_orphan_overlays") == 1, "the orphan counts", SECONDS)
    own_agent.kill()
    own_agent.start()
    wait_until(lambda: own_agent.metric("vmbackup_orphan_overlays") == 1, "the orphan counts", SECONDS)
    guest.libvirtd.virsh("start", guest.name, "--paused")
    wait_until(lambda: not own_agent.records(), "its journal is gone", SECONDS)
    assert_home(guest)
    wait_until(lambda: own_agent.metric("vmbackup_orphan_overlays") == 0, "no orphan is left", SECONDS)


def test_what_alerts_depend_on_is_there_again_after_a_restart(
    own_agent: Agent, copying: CatchBackup, domain: DomainFactory
) -> None:
    own_agent.start()
    good = domain(size="8M")
    own_agent.apply(good.name).wait()
    sample = f'vmbackup_last_success_timestamp_seconds{{domain="{good.name}"}}'
    success = own_agent.metric(sample)
    assert success is not None
    _, guest = copying(own_agent)
    own_agent.kill()
    own_agent.start()
    wait_until(lambda: own_agent.metric(sample) is not None, "the last success")
    assert own_agent.metric(sample) == pytest.approx(success, abs=1)  # a status has whole seconds
    overlay = f'{{domain="{guest.name}",target="vda"}}'
    assert own_agent.metric(f"vmbackup_overlay_bytes{overlay}")
    assert own_agent.metric(f"vmbackup_overlay_age_seconds{overlay}")
