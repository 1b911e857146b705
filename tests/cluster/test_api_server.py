"""Events during a backup that come from the API server, its users or a second agent: the guest still comes home."""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.kube import KubeApi, KubectlError
from tests.support.agents import SECONDS, Agent, CatchBackup, assert_home, assert_stored
from tests.support.domains import Domain, DomainFactory, wait_until
from tests.support.stopwatch import Stopwatch
from vmbackup.protocol.record import Guard, Snapshot
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.journal import Journal

AWAY = "3Mi"  # bytes per second: a copy of 16 MiB takes its time, and yet ends


@pytest.fixture
def kube_away(kube: KubeApi) -> Iterator[KubeApi]:
    """The API server, to be stopped by the test; it is back afterwards."""
    yield kube
    kube.start_apiserver()


def is_home(guest: Domain) -> bool:
    return guest.live().source == guest.bases["vda"] and not list(guest.directory.glob("*.vmb-*"))


@pytest.mark.scenario(25)
def test_the_guest_comes_home_without_an_api_server_and_the_status_says_so_later(
    own_agent: Agent, kube_away: KubeApi, domain: DomainFactory
) -> None:
    """The API server is away for the whole backup."""
    own_agent.start()
    guest = domain(size="64M")
    guest.write("vda", 0x11, length="16M")
    made = own_agent.apply(guest.name, **{"copy.bandwidth": AWAY})
    wait_until(lambda: any(each.snapshot is not Snapshot.NONE for each in own_agent.records()), "begun", SECONDS)
    kube_away.apiserver.stop()
    wait_until(lambda: is_home(guest) and own_agent.records()[0].finished, "home", SECONDS)
    assert_home(guest)
    kube_away.start_apiserver()
    assert_stored(made.wait())


def test_an_agent_that_starts_while_the_api_server_is_away_continues_what_had_begun(
    own_agent: Agent, kube_away: KubeApi, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent, **{"copy.bandwidth": AWAY})
    own_agent.kill()
    kube_away.apiserver.stop()
    own_agent.start()
    wait_until(lambda: is_home(guest) and own_agent.records()[0].finished, "home", SECONDS)
    assert_home(guest)
    kube_away.start_apiserver()
    assert_stored(made.wait())


def test_when_the_api_server_is_back_the_agent_follows_a_backup_that_it_continued_without_it(
    own_agent: Agent, kube_away: KubeApi, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)  # too slow to end meanwhile
    own_agent.kill()
    kube_away.apiserver.stop()
    own_agent.start()
    wait_until(lambda: "continuing it without the API server" in own_agent.log, "it continues", SECONDS)
    kube_away.start_apiserver()
    made.patch({"copy": {"bandwidth": None}})
    assert_stored(made.wait())
    assert made.status["disks"][0]["attempts"] == 1
    assert_home(guest)


def test_a_guest_that_a_killed_agent_had_suspended_runs_again_though_the_api_server_is_away(
    own_agent: Agent, kube_away: KubeApi, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    guest.libvirtd.virsh("resume", guest.name)
    own_agent.kill()
    guest.libvirtd.virsh("suspend", guest.name)
    journal = Journal.of(own_agent.state_dir, made.uid)
    assert journal is not None
    journal.write(replace(journal.record, guard=Guard.OURS), durable=True)  # as if killed right after it suspended it
    journal.close()
    kube_away.apiserver.stop()
    own_agent.start()
    watch = Stopwatch()
    wait_until(lambda: guest.guest.state()[0] is Power.RUNNING, "running", SECONDS)
    assert watch.within(5), watch
    kube_away.start_apiserver()
    made.patch({"copy": {"bandwidth": None}})
    assert_stored(made.wait())


@pytest.mark.misfortune("409 Conflict")
def test_while_others_write_to_the_same_object_all_the_time_their_writes_and_its_status_both_arrive(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    over = threading.Event()
    written = 0

    def meddle() -> None:
        nonlocal written
        while not over.is_set():
            found = made.get()
            found["metadata"].setdefault("labels", {})["count"] = str(written + 1)
            with suppress(KubectlError):  # 409: read and written in between
                made.kube.kubectl("replace", "-f", "-", stdin=json.dumps(found))
                written += 1

    meddler = threading.Thread(target=meddle, daemon=True)
    meddler.start()
    made.patch({"copy": {"bandwidth": AWAY}})
    assert_stored(made.wait())
    over.set()
    meddler.join()
    assert written > 3
    assert made.get()["metadata"]["labels"]["count"] == str(written)
    assert_home(guest)
    made.delete()
    assert not made.exists()


@pytest.mark.misfortune("deleted and made again")
def test_deleted_and_made_again_with_the_same_name_each_is_itself(own_agent: Agent, copying: CatchBackup) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    first = made.uid
    with own_agent.suspended():
        made.delete("--wait=false")
        made.strip_finalizers()
    wait_until(lambda: not made.exists(), "gone", SECONDS)
    again = own_agent.apply(guest.name, name=made.name)
    folder = assert_stored(again.wait())
    assert again.uid != first
    assert again.uid in folder.name
    assert not list(folder.parent.glob(f"*{first}*"))
    assert_home(guest)
    wait_until(lambda: [each.uid for each in own_agent.records()] == [again.uid], "one journal", SECONDS)


@pytest.mark.misfortune("two agents")
def test_a_second_agent_for_the_same_node_touches_neither_guest_nor_status_nor_finalizer(
    own_agent: Agent, second_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    second_agent.start()
    wait_until(lambda: "AlreadyRunning" in made.events(), "the second one has noticed", SECONDS)
    assert made.status["phase"] == "Copying"
    made.patch({"copy": {"bandwidth": None}})
    folder = assert_stored(made.wait())
    time.sleep(3)  # the second one had its chance to spoil it
    assert made.condition("Ready") == ("True", "Succeeded")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert_home(guest)


def test_with_a_second_agent_for_the_same_node_a_deleted_backup_comes_home_before_it_vanishes(
    own_agent: Agent, second_agent: Agent, committing: CatchBackup
) -> None:
    own_agent.start()
    made, guest = committing(own_agent)
    second_agent.start()
    wait_until(lambda: "AlreadyRunning" in made.events(), "the second one has noticed", SECONDS)
    made.delete("--wait=false")
    time.sleep(3)  # long enough for the second one to release it by mistake
    assert made.exists()
    assert guest.live().source != guest.bases["vda"]
    made.patch({"commit": {"bandwidth": None}})
    made.wait_until_gone()
    assert_home(guest, 0x22)


@pytest.mark.misfortune("the agent is upgraded")
def test_an_agent_of_a_newer_version_carries_on_what_the_older_one_had_begun(
    own_agent: Agent, copying: CatchBackup
) -> None:
    own_agent.start()
    made, guest = copying(own_agent)
    own_agent.stop()
    as_an_older_version_wrote_it(own_agent.state_dir / f"{made.uid}.journal")
    made.patch({"copy": {"bandwidth": None}})
    own_agent.start()
    assert_stored(made.wait())
    assert_home(guest)


def as_an_older_version_wrote_it(journal: Path) -> None:
    """Without the fields that came later, and with one that is no longer used."""
    _, _, text = journal.read_bytes().splitlines()[-1].partition(b" ")
    record: dict[str, Any] = json.loads(text)
    del record["store"]
    record["was_of_use_once"] = {"to": "somebody"}
    old = json.dumps(record).encode()
    journal.write_bytes(b"%08x %s\n" % (zlib.crc32(old), old))
