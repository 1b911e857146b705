"""A network that can swallow everything, as a firewall does that has forgotten a connection."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from urllib.parse import urlsplit


class Blackhole:
    """Forwards TCP connections to `target`; those that are open can be made silent, without an end."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (str(parts.hostname), int(parts.port or 0))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._swallow = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]
        self.url = f"{parts.scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Blackhole:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def swallow_what_is_open(self) -> None:
        """From now on, data sent over open connections is lost; new connections work."""
        self._swallow.set()
        self._swallow = threading.Event()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink, self._swallow), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, swallow: threading.Event) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            if not swallow.is_set():
                sink.sendall(data)
        if not swallow.is_set():
            sink.shutdown(socket.SHUT_WR)
