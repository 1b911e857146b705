"""The connection to a real libvirtd, through its death, its silence and its return."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.support.domains import DomainFactory, wait_until
from tests.support.stopwatch import Stopwatch
from vmbackup.errors import RefusedError, TransientError, UnknownOutcomeError
from vmbackup.hypervisor import connection
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.terms import Power

ROUNDS = 3


@pytest.fixture
def mortal(libvirtd: Libvirtd, hypervisor: Hypervisor) -> Iterator[Libvirtd]:
    """The libvirtd, for tests that kill or stop it: it is back at the end, and connected."""
    yield libvirtd
    libvirtd.cont()
    libvirtd.start()
    wait_until(hypervisor.ping, "libvirtd is back")


def test_a_domain_is_found_by_name_and_by_uuid(hypervisor: Hypervisor, domain: DomainFactory) -> None:
    guest = domain(start=False).guest
    assert hypervisor.guest(guest.name).uuid == guest.uuid
    assert hypervisor.guest(guest.uuid).name == guest.name
    assert guest.uuid in [each.uuid for each in hypervisor.guests()]


@pytest.mark.parametrize("name", ["nobody", "0f074bcf-0ce3-4590-8c9e-811d6ebfb6dc"])
def test_a_domain_that_is_not_here_is_refused_with_the_cure(hypervisor: Hypervisor, name: str) -> None:
    with pytest.raises(RefusedError, match=rf"'{name}' is not defined .* correct spec.domain") as refusal:
        hypervisor.guest(name)
    assert refusal.value.reason == "DomainNotFound"


def test_what_happens_to_a_domain_wakes_only_its_subscribers(hypervisor: Hypervisor, domain: DomainFactory) -> None:
    mine, other = domain(), domain()
    woken, others_woken = threading.Event(), threading.Event()
    unsubscribe = hypervisor.subscribe(mine.guest.uuid, woken.set)
    hypervisor.subscribe(other.guest.uuid, others_woken.set)

    mine.guest.resume()
    assert woken.wait(5)
    mine.guest.suspend()

    mine.snapshot()
    woken.clear()
    mine.guest.commit("vda", mine.bases["vda"])
    assert woken.wait(5)
    mine.wait_ready()

    unsubscribe()
    unsubscribe()
    woken.clear()
    second = threading.Event()
    hypervisor.subscribe(mine.guest.uuid, second.set)
    mine.guest.pivot("vda")
    assert second.wait(5)
    assert not woken.is_set()
    assert not others_woken.is_set()


def test_a_subscriber_that_fails_does_not_stop_the_others(hypervisor: Hypervisor, domain: DomainFactory) -> None:
    guest = domain().guest
    woken = threading.Event()
    ends = [hypervisor.subscribe(guest.uuid, lambda: 1 / 0), hypervisor.subscribe(guest.uuid, woken.set)]
    guest.resume()
    assert woken.wait(5)
    for end in ends:
        end()


def test_many_threads_call_at_once(hypervisor: Hypervisor, domain: DomainFactory) -> None:
    guest = domain().guest
    generation = hypervisor.generation
    with ThreadPoolExecutor(32) as pool:
        states = list(pool.map(lambda _: guest.state(), range(320)))
    assert {state for state, _ in states} == {Power.PAUSED}
    assert hypervisor.generation == generation


def test_a_libvirtd_that_is_killed_and_started_again_is_connected_to_again(
    mortal: Libvirtd, hypervisor: Hypervisor, domain: DomainFactory
) -> None:
    guest = domain().guest
    generation, since = hypervisor.generation, hypervisor.answering_since
    woken = threading.Event()
    hypervisor.subscribe(guest.uuid, woken.set)

    mortal.kill()
    assert woken.wait(5), "the loss of the connection wakes"
    assert not hypervisor.ping()
    assert hypervisor.answering_since is None
    with pytest.raises(TransientError, match=r"no libvirtd answers at .*start libvirtd") as away:
        guest.suspend()
    assert away.value.reason == "HypervisorAway"

    woken.clear()
    mortal.start()
    assert woken.wait(5), "the return of the connection wakes"
    wait_until(hypervisor.ping, "a new connection")
    assert hypervisor.generation == generation + 1
    assert since is not None
    assert hypervisor.answering_since is not None
    assert since < hypervisor.answering_since <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert guest.state()[0] is Power.PAUSED

    woken.clear()
    guest.resume()
    assert woken.wait(5), "events arrive on the new connection"


def test_a_libvirtd_that_starts_later_is_connected_to_then(libvirtd: Libvirtd, mortal: Libvirtd) -> None:
    mortal.kill()
    early = Hypervisor(libvirtd.uri, config_dir=libvirtd.config_dir)
    try:
        assert (early.generation, early.answering_since) == (0, None)
        with pytest.raises(TransientError):
            early.guests()
        mortal.start()
        wait_until(early.ping, "the first connection")
        assert early.generation == 1
    finally:
        early.close()
    with pytest.raises(TransientError):
        early.guests()


def test_the_outcome_is_unknown_when_libvirtd_falls_silent_and_the_call_happens_later(
    mortal: Libvirtd, hypervisor: Hypervisor, domain: DomainFactory
) -> None:
    """docs/protocol.md, really do, item 5: what a client gave up on is carried out when libvirtd goes on."""
    made = domain()
    generation = hypervisor.generation
    qemu = mortal.guest_pids()[made.name]
    watch = Stopwatch()
    with ThreadPoolExecutor(1) as pool:
        os.kill(qemu, signal.SIGSTOP)
        resuming = pool.submit(made.guest.resume)
        wait_until(lambda: not made.guest.control_idle(), "the resume is in flight")
        mortal.stop_signal()
        os.kill(qemu, signal.SIGCONT)
        with pytest.raises(UnknownOutcomeError, match="may still be carried out"):
            resuming.result()
    assert watch.seconds > 15, "the keepalive limit"
    assert watch.within(30), watch
    assert hypervisor.answering_since is None
    with pytest.raises(TransientError):
        made.guest.suspend()

    mortal.cont()
    wait_until(hypervisor.ping, "a new connection")
    assert hypervisor.generation == generation + 1
    wait_until(lambda: made.guest.state()[0] is Power.RUNNING, "the resume that was given up")


def test_a_change_that_was_never_sent_is_merely_to_be_tried_again(
    mortal: Libvirtd, hypervisor: Hypervisor, domain: DomainFactory
) -> None:
    made = domain()
    mortal.stop_signal()
    killer = threading.Timer(0.5, mortal.kill)
    killer.start()
    with pytest.raises(TransientError) as error:
        made.guest.resume()
    killer.join()
    assert error.value.reason == "HypervisorAway"


def test_a_libvirtd_that_falls_silent_on_many_calls_at_once_does_not_take_this_process_along(
    mortal: Libvirtd, domain: DomainFactory
) -> None:
    """libvirt's client library crashes where several threads wait on one connection that its keepalive closes."""
    name = domain().name
    spawn = multiprocessing.get_context("spawn")
    asked = spawn.Event()
    process = spawn.Process(target=ask_until_lost, args=(mortal.uri, mortal.config_dir, name, asked), daemon=True)
    process.start()
    for _ in range(ROUNDS):
        assert asked.wait(20)
        asked.clear()
        mortal.stop_signal()
        assert asked.wait(20), f"it has ended: {process.exitcode}"
        asked.clear()
        mortal.cont()
    process.join(20)
    assert process.exitcode == 0


def ask_until_lost(uri: str, config_dir: Path, name: str, asked: Event) -> None:
    """In a process of its own: eight threads ask for the guest's state, through each loss of the connection."""
    connection._KEEPALIVE_SECONDS, connection._KEEPALIVE_COUNT = 1, 2
    hypervisor = Hypervisor(uri, config_dir=config_dir)
    guest = hypervisor.guest(name)

    def ask(generation: int) -> None:
        while hypervisor.generation == generation and hypervisor.answering_since is not None:
            with suppress(TransientError):
                guest.state()

    for _ in range(ROUNDS):
        wait_until(hypervisor.ping, "the connection")
        with ThreadPoolExecutor(8) as pool:
            asking = pool.map(ask, [hypervisor.generation] * 8)
            asked.set()
            list(asking)
        asked.set()
        time.sleep(0.5)
    hypervisor.close()


def test_guest_agents_that_hang_when_they_are_to_freeze_leave_room_for_thaws_and_for_all_else(
    hypervisor: Hypervisor,
) -> None:
    hang, entered = threading.Event(), threading.Semaphore(0)

    def wait_for_an_agent() -> None:
        with hypervisor.waiting_for_an_agent(thaws=False), hypervisor.one_connection("freezing"):
            entered.release()
            hang.wait(30)

    several = [threading.Thread(target=wait_for_an_agent, daemon=True) for _ in range(connection._SLOTS)]
    for each in several:
        each.start()
    try:
        assert all(entered.acquire(timeout=10) for _ in range(connection._FREEZE_SLOTS))
        assert not entered.acquire(timeout=0.5)
        with ThreadPoolExecutor(1) as pool, hypervisor.waiting_for_an_agent(thaws=True):
            assert pool.submit(hypervisor.call, "asking", lambda libvirtd: libvirtd.getVersion()).result(5)
    finally:
        hang.set()
    assert all(entered.acquire(timeout=10) for _ in range(connection._SLOTS - connection._FREEZE_SLOTS))


def test_where_every_call_waits_for_a_qemu_that_hangs_the_next_one_says_so(
    hypervisor: Hypervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_SLOT_SECONDS", 0.1)
    with ExitStack() as hanging, ThreadPoolExecutor(1) as pool:
        for _ in range(connection._SLOTS):
            hanging.enter_context(hypervisor._slot("asking for a block job"))
        with pytest.raises(TransientError, match="unresponsive QEMU processes") as refused:
            pool.submit(hypervisor.call, "asking", lambda libvirtd: libvirtd.getVersion()).result(5)
        assert refused.value.reason == "HypervisorBusy"
    assert hypervisor.ping()
