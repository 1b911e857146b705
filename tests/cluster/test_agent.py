"""`kubectl apply` a VMBackup, and the agent of its node takes it: to Ready, to a refusal, or home when deleted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi
from tests.support.agents import SECONDS, Agent, CatchBackup, VMBackup, assert_home, assert_stored, manifest
from tests.support.domains import DomainFactory, wait_until
from tests.support.stopwatch import Stopwatch
from vmbackup.api.resource import condition
from vmbackup.imaging.locks import hold_reader_lock


@pytest.mark.check
def test_a_backup_that_is_applied_becomes_ready_and_is_stored_with_its_digests(
    agent: Agent, domain: DomainFactory
) -> None:
    guest = domain({"vda": "raw", "vdb": "qcow2"}, size="16M")
    guest.write("vda", 0x11)
    made = agent.apply(guest.name)
    status = made.wait()
    folder = assert_stored(status)
    assert folder.name == f"{made.name}.{made.uid}"
    assert {disk["target"]: disk["state"] for disk in status["disks"]} == {"vda": "Home", "vdb": "Home"}
    assert status["progress"]["percent"] == 100
    assert_home(guest)
    assert made.events() == ["Pending", "Snapshotting", "Copying", "Committing", "Pivoted"]


@pytest.mark.parametrize(
    ("spec", "reason", "says"),
    [
        ({"domain": "nobody"}, "DomainNotFound", "spec.domain"),
        ({"disks": ["vdz"]}, "DiskNotFound", "vdz"),
        ({"storeRef.name": "nowhere"}, "StoreNotFound", "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    agent: Agent, domain: DomainFactory, spec: dict[str, Any], reason: str, says: str
) -> None:
    made = agent.apply(spec.pop("domain", None) or domain(size="8M").name, **spec)
    status = made.wait("False")
    assert made.condition("Ready") == ("False", reason)
    assert made.condition("BackupComplete")[0] == "False"
    assert made.condition("ChainClean")[0] == "True"
    assert made.condition("Stalled") == ("True", reason)
    assert says in status["message"]
    wait_until(lambda: reason in made.events() or "Failed" in made.events(), "an event")


def test_a_domain_that_is_off_is_refused(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(start=False, size="8M").name)
    made.wait("False")
    assert made.condition("Ready") == ("False", "DomainNotRunning")


def test_deleted_in_the_middle_of_copying_the_chain_comes_home_before_it_vanishes(
    agent: Agent, copying: CatchBackup
) -> None:
    made, guest = copying(agent)
    watch = Stopwatch()
    made.delete()
    assert watch.within(10), watch
    assert_home(guest)


def test_deleted_in_the_middle_of_the_commit_the_chain_comes_home_before_it_vanishes(
    agent: Agent, committing: CatchBackup
) -> None:
    made, guest = committing(agent)
    made.delete("--wait=false")
    time.sleep(1.0)
    assert made.exists()
    made.patch({"commit": {"bandwidth": None}})
    made.wait_until_gone()
    assert_home(guest, 0x22)


def test_a_bandwidth_that_is_changed_while_copying_takes_effect(agent: Agent, copying: CatchBackup) -> None:
    made, guest = copying(agent)
    assert made.status["progress"]["percent"] < 50
    watch = Stopwatch()
    made.patch({"copy": {"bandwidth": "500Mi"}})
    assert_stored(made.wait())
    assert watch.within(8), watch
    assert_home(guest)
    assert made.status["observedGeneration"] == made.get()["metadata"]["generation"]


def test_a_commit_that_gave_up_is_taken_up_again_by_a_retry(agent: Agent, copying: CatchBackup) -> None:
    made, guest = copying(agent, **{"commit.backoffLimit": 0})
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())
        made.patch({"copy": {"bandwidth": None}})
        made.wait("False")
        assert made.condition("Ready") == ("False", "CommitLimitReached")
        assert made.condition("ChainClean") == ("False", "CommitFailed")
        assert made.condition("BackupComplete")[0] == "True"
        assert guest.live().source != guest.bases["vda"]
    made.retry("1")
    assert made.wait()["lastHandledRetry"] == "1"
    assert made.condition("ChainClean")[0] == "True"
    assert_home(guest)
    assert_stored(made.status)


def test_the_next_backup_of_the_domain_brings_home_what_the_last_one_left(agent: Agent, copying: CatchBackup) -> None:
    left, guest = copying(agent, **{"commit.backoffLimit": 0})
    with Path(guest.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())
        left.patch({"copy": {"bandwidth": None}})
        left.wait("False")
    later = agent.apply(guest.name)
    assert_stored(later.wait())
    left.wait()
    assert left.condition("ChainClean")[0] == "True"
    assert_home(guest)


def test_twenty_backups_of_ten_domains_at_once_all_become_ready(
    kube: KubeApi, agent: Agent, domain: DomainFactory
) -> None:
    guests = [domain(size="8M") for _ in range(10)]
    for guest in guests:
        guest.write("vda", 0x11, length="2M")
    names = {f"{agent.node}-{guest.name}-{turn}": guest.name for guest in guests for turn in (1, 2)}
    slowly = {"copy.bandwidth": "1Mi"}  # so that the queue is seen
    kube.apply(*(manifest(name, agent.node, agent.node, domain, **slowly) for name, domain in names.items()))
    made = [VMBackup(kube, name) for name in names]

    def reasons() -> list[str]:
        """In one answer: while each is asked for its own, the last has begun."""
        mine = [each for each in kube.get("vmbackups")["items"] if each["metadata"]["name"] in names]
        return [condition(each.get("status", {}), "Ready").get("reason", "") for each in mine]

    wait_until(lambda: "Queued" in reasons(), "one that is queued")
    for each in made:
        each.wait()
    times = [assert_stored(each.status) for each in made]
    assert len(set(times)) == 20


def test_a_queued_backup_says_what_it_waits_for_and_vanishes_at_once_when_deleted(
    agent: Agent, copying: CatchBackup
) -> None:
    first, guest = copying(agent)
    second = agent.apply(guest.name)
    wait_until(lambda: second.condition("Ready") == ("Unknown", "Queued"), "queued", SECONDS)
    assert first.name in second.status["message"]
    assert second.status["phase"] == "Pending"
    watch = Stopwatch()
    second.delete()
    assert watch.within(2), watch
    assert first.condition("Ready")[0] == "Unknown"


def test_a_guest_that_is_off_on_its_overlay_keeps_nobody_waiting_but_its_own_domain(
    own_agent: Agent, copying: CatchBackup, domain: DomainFactory
) -> None:
    own_agent.start(max_concurrent_backups="1")
    made, guest = copying(own_agent)
    guest.libvirtd.kill_guest(guest.name)
    made.patch({"copy": {"bandwidth": None}})
    made.wait_for_phase("Committing")
    wait_until(lambda: made.condition("Ready")[1] == "DomainOff", "DomainOff", SECONDS)
    own_agent.apply(domain(size="8M").name).wait()
    assert made.condition("Ready") == ("Unknown", "DomainOff")
    guest.libvirtd.virsh("start", guest.name, "--paused")
    made.wait()
    assert_home(guest)


def test_a_finished_backup_has_no_finalizer_and_is_deleted_at_once_and_its_data_stays(
    agent: Agent, domain: DomainFactory
) -> None:
    made = agent.apply(domain(size="8M").name)
    folder = assert_stored(made.wait())
    wait_until(lambda: "finalizers" not in made.get()["metadata"], "no finalizer")
    watch = Stopwatch()
    made.delete()
    assert watch.within(2), watch
    assert folder.exists()
    wait_until(lambda: made.name not in [record.name for record in agent.records()], "its journal is gone")


def test_with_deletion_policy_delete_the_data_goes_with_it(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name, deletionPolicy="Delete")
    folder = assert_stored(made.wait())
    made.delete()
    assert not folder.exists()
    assert made.name not in [record.name for record in agent.records()]


def test_a_namespace_that_is_deleted_does_not_take_the_data_with_it(
    kube: KubeApi, agent: Agent, domain: DomainFactory
) -> None:
    namespace = f"{agent.node}-deleted"
    kube.kubectl("create", "namespace", namespace)
    made = VMBackup(kube, "kept", namespace)
    kube.apply(manifest("kept", agent.node, agent.node, domain(size="8M").name, namespace, deletionPolicy="Delete"))
    folder = assert_stored(made.wait())
    kube.kubectl("delete", "namespace", namespace, "--wait=false")  # no namespace controller runs here
    made.delete()
    assert folder.exists()


def test_its_time_to_live_counts_from_its_end(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name)
    folder = assert_stored(made.wait())
    made.patch({"ttlSecondsAfterFinished": 1})
    made.wait_until_gone()
    assert folder.exists()


def test_an_edit_after_the_end_is_noted_or_kstatus_would_wait_for_ever(agent: Agent, domain: DomainFactory) -> None:
    made = agent.apply(domain(size="8M").name)
    made.wait()
    made.patch({"copy": {"bandwidth": "10Mi"}})
    wait_until(lambda: made.status["observedGeneration"] == 2, "generation noted", SECONDS)
    assert made.condition("Ready")[0] == "True"
    made.retry("again")
    wait_until(lambda: made.status.get("lastHandledRetry") == "again", "retry noted", SECONDS)
    assert made.condition("Ready")[0] == "True"
