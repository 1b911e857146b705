"""An HTTP server that is safe on a network: a limited number of connections, and optional TLS."""

from __future__ import annotations

import logging
import socket
import socketserver
import ssl
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from vmbackup.errors import PermanentError

_log = logging.getLogger(__name__)

_MOST_CONNECTIONS = 16


class Certificate:
    """A certificate and its key, PEM files that may be replaced at any time: the next connection has the new ones."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._lock = threading.Lock()
        self._stamp: object = None
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """The current context. While the files are unusable: the previous one, or PermanentError if there is none."""
        with self._lock:
            try:
                stamp = [(found.st_mtime_ns, found.st_ino, found.st_size) for found in map(Path.stat, self._files)]
                if self._context is None or stamp != self._stamp:
                    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                    context.load_cert_chain(*self._files)
                    self._context, self._stamp = context, stamp
            except OSError as error:  # ssl.SSLError is one
                if self._context is None:
                    files = " and ".join(map(str, self._files))
                    raise PermanentError(
                        f"{files} are not a certificate and its key: {error}; correct --metrics-tls-cert and "
                        "--metrics-tls-key",
                        reason="BadCertificate",
                    ) from error
                _log.warning("the new certificate of /metrics cannot be used; keeping the old one: %s", error)
            return self._context


class Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each connection. At the limit, a new connection closes the oldest.

    So clients that open connections and send nothing, or send slowly, cannot block a probe or a scrape.
    """

    daemon_threads = True
    request_queue_size = 128  # socketserver's 5 lets the kernel drop the next one, which tries again a second later

    def __init__(self, address: tuple[str, int], tls: Certificate | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET  # a pod may have no IPv4
        self._tls = tls
        self._connections: deque[socket.socket] = deque()
        self._lock = threading.Lock()
        if tls is not None:
            tls.context()
        super().__init__(address, _QuietHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection."""
        with self._lock:
            self._connections.append(request)
            oldest = self._connections.popleft() if len(self._connections) > _MOST_CONNECTIONS else None
        if oldest is not None:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The TLS handshake runs in the thread of the connection, so that it delays no other connection."""
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_QuietHandler.timeout)
        with self._tls.context().wrap_socket(request.dup(), server_side=True) as encrypted:
            super().finish_request(encrypted, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection that has ended."""
        with self._lock, suppress(ValueError):
            self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log aborted connections."""
        _log.debug("a request of %s failed", client_address, exc_info=True)

    def server_bind(self) -> None:
        """Listen."""
        # HTTPServer's own also asks DNS for the name of this host, which can hang a start-up for many seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()


class _QuietHandler(WSGIRequestHandler):
    timeout = 10  # seconds: a silent client does not keep its thread for ever

    def log_message(self, format: str, *args: Any) -> None:
        """No line for each probe and scrape."""
