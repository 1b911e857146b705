"""The annotation vmbackup.dev/cancel: no copy is wanted any more, and the guest comes home."""

from __future__ import annotations

from pathlib import Path

from tests.support.agents import SECONDS, Agent, CatchBackup, VMBackup, assert_home
from tests.support.domains import DomainFactory, wait_until

CANCELLED = ("False", "Cancelled")


def ends_cancelled(made: VMBackup) -> None:
    status = made.wait("False")
    assert status["phase"] == "Failed"
    assert made.condition("Ready") == made.condition("BackupComplete") == CANCELLED
    assert made.condition("ChainClean")[0] == "True"
    assert made.condition("Stalled") == ("True", "Cancelled")
    assert "cancelled" in status["message"]


def test_cancelled_in_the_middle_of_copying_the_guest_comes_home_and_the_backup_has_failed(
    agent: Agent, copying: CatchBackup
) -> None:
    made, guest = copying(agent)
    made.annotate(cancel="true")
    ends_cancelled(made)
    assert_home(guest)
    assert not list((Path(agent.state_dir).parent / "store").glob(f"**/{made.name}*"))
    assert (agent.metric('vmbackup_backups_total{result="cancelled"}') or 0) >= 1
    wait_until(lambda: "finalizers" not in made.get()["metadata"], "no finalizer", SECONDS)


def test_cancelled_while_it_waits_for_its_turn_it_ends_at_once_and_touches_nothing(
    agent: Agent, copying: CatchBackup
) -> None:
    first, guest = copying(agent)
    second = agent.apply(guest.name)
    wait_until(lambda: second.condition("Ready") == ("Unknown", "Queued"), "queued", SECONDS)
    second.annotate(cancel="true")
    ends_cancelled(second)
    assert first.condition("Ready")[0] == "Unknown"
    assert "Snapshotting" not in second.events()


def test_cancelled_while_its_guest_is_off_on_its_overlay_it_still_brings_it_home(
    agent: Agent, copying: CatchBackup
) -> None:
    made, guest = copying(agent)
    guest.libvirtd.kill_guest(guest.name)
    made.annotate(cancel="true")
    wait_until(lambda: made.condition("BackupComplete") == CANCELLED, "no copy", SECONDS)
    assert made.condition("ChainClean")[0] == "False"
    guest.libvirtd.virsh("start", guest.name, "--paused")
    ends_cancelled(made)
    assert_home(guest)


def test_cancelled_in_the_middle_of_the_commit_is_too_late_and_the_good_copy_stays(
    agent: Agent, committing: CatchBackup
) -> None:
    made, guest = committing(agent)
    wait_until(lambda: made.condition("BackupComplete")[0] == "True", "a copy", SECONDS)
    made.annotate(cancel="true")
    made.patch({"commit": {"bandwidth": None}})
    made.wait()
    assert_home(guest, 0x22)


def test_a_cancel_survives_the_death_of_the_agent_and_is_no_failure_to_the_next_one(
    own_agent: Agent, copying: CatchBackup, domain: DomainFactory
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    own_agent.kill()
    made.annotate(cancel="true")
    own_agent.start()
    ends_cancelled(made)
    assert_home(guest)
    other = domain(size="8M")
    own_agent.apply(other.name).wait()  # listed after the other one
    own_agent.kill()
    own_agent.start()
    succeeded = f'vmbackup_last_success_timestamp_seconds{{domain="{other.name}"}}'
    wait_until(lambda: own_agent.metric(succeeded) is not None, "what it has read of the API server", SECONDS)
    assert own_agent.metric(f'vmbackup_last_failure_timestamp_seconds{{domain="{guest.name}"}}') is None


def test_made_with_the_annotation_it_never_begins_and_any_other_value_says_nothing(
    agent: Agent, domain: DomainFactory
) -> None:
    guest = domain(size="8M")
    made = agent.apply(guest.name, annotations={"vmbackup.dev/cancel": "true"})
    ends_cancelled(made)
    assert "Snapshotting" not in made.events()
    agent.apply(guest.name, annotations={"vmbackup.dev/cancel": "false"}).wait()
