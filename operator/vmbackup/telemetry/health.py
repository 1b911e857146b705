"""The HTTP server of an agent: /metrics for Prometheus, /healthz and /livez for its supervisor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from types import TracebackType
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, exposition

from vmbackup.telemetry.server import Certificate, Server

Check = Callable[[], str]
"""Returns the problem, '' if there is none. An exception counts as a problem too."""


class HealthServer:
    """Serves from its own threads, so that it can report that the event loop or libvirt hangs.

    `checks` run at each request of /healthz, in parallel, for at most `limit` seconds in total. A check that is
    still stuck at the next request is not started again. /livez runs only those that `restart_mends` names: a
    supervisor restarts the agent when one of them fails. With port 0 the system chooses one: see `port`.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        checks: Mapping[str, Check],
        *,
        host: str = "",
        port: int,
        tls: Certificate | None = None,
        limit: float = 5.0,
        restart_mends: Collection[str] = (),
    ) -> None:
        """Raises PermanentError if the certificate cannot be used."""
        self._checks = [_GuardedCheck(name, check) for name, check in checks.items()]
        self._vital = [check for check in self._checks if check.name in restart_mends]
        self._limit = limit
        self._metrics: Any = exposition.make_wsgi_app(registry)
        self._server = Server((host, port), tls)
        self._server.set_app(self._answer)
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return self._server.server_port

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _failures(self, checks: Iterable[_GuardedCheck]) -> dict[str, str]:
        """The problems by the name of their check; empty if there is none. Takes at most `limit` seconds."""
        deadline = time.monotonic() + self._limit
        for check in checks:
            check.start()
        answers = {check.name: check.answer(deadline - time.monotonic()) for check in checks}
        return {name: wrong for name, wrong in answers.items() if wrong}

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if (method := environ["REQUEST_METHOD"]) not in ("GET", "HEAD"):
            return _text(start_response, "405 Method Not Allowed", "use GET or HEAD", ("Allow", "GET, HEAD"))
        body = list(self._body({**environ, "REQUEST_METHOD": "GET"}, start_response))
        return body if method == "GET" else []

    def _body(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path in ("/healthz", "/livez"):
            failures = self._failures(self._checks if path == "/healthz" else self._vital)
            text = "\n".join(f"{name}: {wrong}" for name, wrong in failures.items()) or "ok"
            return _text(start_response, "503 Service Unavailable" if failures else "200 OK", text)
        return _text(start_response, "404 Not Found", "available: /metrics, /healthz, /livez")


def _text(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    body = f"{text}\n".encode()
    start_response(
        status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *headers]
    )
    return [body]


class _GuardedCheck:
    """A check with at most one thread of its own, even if it hangs and is requested again."""

    def __init__(self, name: str, check: Check) -> None:
        self.name = name
        self._check = check
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wrong = ""

    def start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name=f"check-{self.name}", daemon=True)
                self._thread.start()

    def answer(self, seconds: float) -> str:
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, seconds))
            if thread.is_alive():
                return "no answer in time"
        return self._wrong

    def _run(self) -> None:
        try:
            self._wrong = self._check()
        except Exception as error:
            self._wrong = f"{type(error).__name__}: {error}"
