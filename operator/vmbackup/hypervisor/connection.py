"""The connection to libvirtd: one event loop thread, events, keepalive, and automatic reconnection.

It consists of several libvirt connections, each with one call at a time. libvirt's client library crashes the process
when the keepalive closes a connection on which several threads wait for answers (9.0, virNetClientIOEventLoop).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import libvirt

from vmbackup.errors import TransientError, VMBackupError
from vmbackup.hypervisor.errors import away, classify

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 5, 3  # a silent connection is closed after 20 s (measured)
_SLOTS = 8  # concurrent calls, each on a connection of its own
_FREEZE_SLOTS, _THAW_SLOTS = 3, 2  # of these, for guest agents: a hanging agent blocks no resume and no thaw
_SLOT_SECONDS = 30.0  # to wait for a slot: hanging QEMUs (a dead NFS server) may occupy all
_FIRST_OPEN_SECONDS = 5.0
_REOPEN_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
_ALIVE_POLL_SECONDS = 2.0
_EVENTS = (
    libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
    libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2,
    libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE,
)


class Connection:
    """A connection to libvirtd until `close`. Any thread may call any method.

    The constructor succeeds also while libvirtd is away: calls raise TransientError until it answers. `config_dir` is
    where libvirtd keeps the persistent XML of its domains. `generation` rises each time the connection is opened:
    earlier observations are then in doubt (PROTOCOL R3).
    """

    def __init__(self, uri: str, *, config_dir: Path | None = None) -> None:
        self.uri = uri
        self.config_dir = config_dir or _default_config_dir(uri)
        self.generation = 0
        self._opened = 0.0
        self._connections: tuple[libvirt.virConnect, ...] = ()  # the first one is for events only
        self._free: deque[libvirt.virConnect] = deque()  # those of the others without a call
        self._held = threading.local()
        self._event_ids: list[int] = []
        self._slots = threading.BoundedSemaphore(_SLOTS)
        self._freeze_slots = threading.BoundedSemaphore(_FREEZE_SLOTS)
        self._thaw_slots = threading.BoundedSemaphore(_THAW_SLOTS)
        self._lock = threading.Lock()
        self._wakes: dict[str, list[Callable[[], None]]] = {}
        self._lost = threading.Event()
        self._closing = threading.Event()
        self._tried = threading.Event()
        _run_event_loop()
        self._keeper = threading.Thread(target=self._keep_open, name="libvirt-keeper", daemon=True)
        self._keeper.start()
        self._tried.wait(_FIRST_OPEN_SECONDS)

    def close(self) -> None:
        """Close the connection. Calls made later raise TransientError."""
        self._closing.set()
        self._lost.set()
        self._keeper.join(timeout=_FIRST_OPEN_SECONDS)  # it cannot be stopped while opening a silent libvirtd

    @property
    def answering_since(self) -> float | None:
        """CLOCK_BOOTTIME in seconds since when libvirtd has answered without a break; None while it does not."""
        connections, opened = self._connections, self._opened
        return opened if _are_alive(connections) else None

    def ping(self) -> bool:
        """Whether libvirtd answers now. Takes at most the keepalive limit of 20 s."""
        try:
            self.call("asking libvirtd for its version", lambda connection: connection.getLibVersion())
        except VMBackupError:
            return False
        return True

    def subscribe(self, domain_uuid: str, wake: Callable[[], None]) -> Callable[[], None]:
        """Call `wake` whenever something may have happened to the domain; returns the function that unsubscribes.

        The events are those of its lifecycle, block jobs and guest agent, and the loss or return of the connection.
        `wake` runs in the one event thread, so it must return at once and must not call this object.
        """
        with self._lock:
            self._wakes.setdefault(domain_uuid, []).append(wake)

        def unsubscribe() -> None:
            with self._lock:
                wakes = self._wakes.get(domain_uuid, [])
                if wake in wakes:
                    wakes.remove(wake)
                if not wakes:
                    self._wakes.pop(domain_uuid, None)

        return unsubscribe

    def call(self, doing: str, function: Callable[[libvirt.virConnect], Result], *, mutating: bool = False) -> Result:
        """Run `function` on a connection, with libvirt's errors classified. Used inside hypervisor/ only."""
        with self.one_connection(doing) as connection:
            if not _is_alive(connection):
                self._lost.set()
                raise away(doing, self.uri)
            try:
                return function(connection)
            except libvirt.libvirtError as error:
                raise classify(error, doing, mutating=mutating) from error

    @contextmanager
    def waiting_for_an_agent(self, *, thaws: bool) -> Generator[None]:
        """Limits how many calls wait for guest agents at the same time, so that other calls keep their slots."""
        with self._thaw_slots if thaws else self._freeze_slots:
            yield

    @contextmanager
    def one_connection(self, doing: str) -> Generator[libvirt.virConnect]:
        """Keep this thread on one connection: a domain object is valid only on the connection that returned it."""
        held: libvirt.virConnect | None = getattr(self._held, "connection", None)
        if held is not None:
            yield held
            return
        with self._slot(doing):
            free = self._free
            try:
                self._held.connection = free.pop()
            except IndexError:
                self._lost.set()
                raise away(doing, self.uri) from None
            try:
                yield self._held.connection
            finally:
                free.append(self._held.connection)
                self._held.connection = None

    @contextmanager
    def _slot(self, doing: str) -> Generator[None]:
        if not self._slots.acquire(timeout=_SLOT_SECONDS):
            message = (
                f"{doing}: all {_SLOTS} libvirt connections are waiting for unresponsive QEMU processes; "
                "check the storage of their disks"
            )
            raise TransientError(message, reason="HypervisorBusy")
        try:
            yield
        finally:
            self._slots.release()

    # -- the keeper: the only thread that opens, replaces and closes the connections

    def _keep_open(self) -> None:
        attempt = 0
        while not self._closing.is_set():
            try:
                self._open()
            except libvirt.libvirtError as error:
                if attempt == 0:
                    _log.warning("%s", classify(error, f"connecting to {self.uri}", mutating=False))
                self._tried.set()
                self._closing.wait(_REOPEN_SECONDS[min(attempt, len(_REOPEN_SECONDS) - 1)])
                attempt += 1
                continue
            attempt = 0
            self._tried.set()
            self._wait_for_loss()
            self._drop()

    def _open(self) -> None:
        events, *others = connections = [libvirt.open(self.uri) for _ in range(1 + _SLOTS)]
        for connection in connections:
            connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
        events.registerCloseCallback(self._on_close, None)
        self._event_ids = [events.domainEventRegisterAny(None, e, self._on_event, None) for e in _EVENTS]
        self.generation += 1
        self._opened = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._connections, self._free = tuple(connections), deque(others)
        _log.info("connected to %s", self.uri)
        self._wake_all()

    def _wait_for_loss(self) -> None:
        while not self._closing.is_set() and _are_alive(self._connections):
            self._lost.wait(_ALIVE_POLL_SECONDS)
            self._lost.clear()

    def _drop(self) -> None:
        connections, self._connections, self._free = self._connections, (), deque()
        if not self._closing.is_set():
            _log.warning("lost the connection to %s", self.uri)
        self._wake_all()
        # Each is closed when its last call ends: close() here would free it under that call.
        for events in connections[:1]:
            for event_id in self._event_ids:
                with suppress(libvirt.libvirtError):
                    events.domainEventDeregisterAny(event_id)
            with suppress(libvirt.libvirtError):
                events.unregisterCloseCallback()

    def _on_close(self, _connection: libvirt.virConnect, _reason: int, _opaque: object) -> None:
        self._lost.set()

    def _on_event(self, _connection: libvirt.virConnect, domain: libvirt.virDomain, *_: Any) -> None:
        self._wake(domain.UUIDString())

    def _wake_all(self) -> None:
        with self._lock:
            uuids = list(self._wakes)
        for uuid in uuids:
            self._wake(uuid)

    def _wake(self, uuid: str) -> None:
        with self._lock:
            wakes = list(self._wakes.get(uuid, ()))
        for wake in wakes:
            try:
                wake()
            except Exception:
                _log.exception("a subscriber of domain %s failed", uuid)


@cache
def _run_event_loop() -> None:
    """Run libvirt's event loop in a thread, once in this process and before any connection is opened."""
    libvirt.registerErrorHandler(_ignore, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()


def _ignore(_context: object, _error: object) -> None:
    """Replaces libvirt's handler, which writes to stderr every error that is raised as well."""


def _are_alive(connections: Iterable[libvirt.virConnect]) -> bool:
    """Whether there are connections and all of them are alive."""
    alive = [_is_alive(connection) for connection in connections]
    return bool(alive) and all(alive)


def _is_alive(connection: libvirt.virConnect) -> bool:
    try:
        return connection.isAlive() == 1
    except libvirt.libvirtError:
        return False


def _default_config_dir(uri: str) -> Path:
    if urlsplit(uri).path != "/session":
        return Path("/etc/libvirt/qemu")
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "libvirt/qemu"
