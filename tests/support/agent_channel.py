"""The channel between libvirt and the real qemu-ga of a Linux guest, on which words can be late, or get lost."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sandbox.guest import Guest


class Channel:
    """Between libvirt and guest agent: both connect to it. `fate` says what becomes of each command of libvirt's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[str] = []
        self.fate: Callable[[str], float | None] = lambda _: 0.0  # seconds by which it is late; None: swallowed
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._guest: socket.socket | None = None
        self._libvirt: socket.socket | None = None
        self._held: list[tuple[float, bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def swallow(self, *commands: str) -> None:
        """From now on these never arrive; without any: whatever it is."""
        self.fate = lambda command: None if not commands or command in commands else 0.0

    def pass_all(self) -> None:
        self.fate = lambda _: 0.0

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for each in (self._listener, self._guest, self._libvirt):
            if each is not None:
                each.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            ends = [end for end in (self._listener, self._guest, self._libvirt) if end is not None]
            for end in select.select(ends, [], [], 0.05)[0]:
                self._take(end)
            while self._held and time.monotonic() >= self._held[0][0]:  # in order, as a channel keeps it
                self._send(self._guest, self._held.pop(0)[1])

    def _take(self, end: socket.socket) -> None:
        if end is self._listener:
            newcomer, _ = end.accept()
            if self._guest is None:  # QEMU connects when the domain starts, libvirt once the agent is up
                self._guest = newcomer
            else:
                self._libvirt = newcomer
            return
        data = b""
        with suppress(OSError):
            data = end.recv(65536)
        if not data:
            self._guest = None if end is self._guest else self._guest
            self._libvirt = None if end is self._libvirt else self._libvirt
            end.close()
        elif end is self._guest:
            self._send(self._libvirt, data)
        else:
            for line in data.splitlines(keepends=True):
                self._ask(line)

    def _ask(self, line: bytes) -> None:
        command = json.loads(line.strip(b"\xff\n \r"))["execute"]
        self.asked.append(command)
        late = self.fate(command)
        if late is not None:
            self._held.append((time.monotonic() + late, line))

    @staticmethod
    def _send(end: socket.socket | None, data: bytes) -> None:
        with suppress(OSError):
            if end is not None:
                end.sendall(data)


class ProxiedGuest(Guest):
    """A writing guest whose agent is behind a channel."""

    channel: Path

    def xml(self) -> str:
        source = f"<channel type='unix'><source mode='connect' path='{self.channel}'/>"
        return super().xml().replace("<channel type='unix'>", source)
