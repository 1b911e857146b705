"""/metrics and /healthz on a network: no other path or method, TLS with a certificate that is renewed, slow clients."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.certificates import Authority
from vmbackup.errors import PermanentError
from vmbackup.telemetry.health import HealthServer
from vmbackup.telemetry.metrics import Metrics
from vmbackup.telemetry.server import Certificate


@pytest.fixture(scope="module")
def server() -> Iterator[HealthServer]:
    with HealthServer(Metrics().registry, {}, host="127.0.0.1", port=0) as started:
        yield started


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and its key, where the agent has them."""
    here = tmp_path / "tls.crt", tmp_path / "tls.key"
    renew(authority, here, "first")
    return here


def renew(authority: Authority, files: tuple[Path, Path], name: str) -> None:
    """Put a certificate for `name` there, as a renewal does it: each file by rename."""
    for new, place in zip(authority.issue(name, user=name, addresses=["IP:127.0.0.1"]), files, strict=True):
        shutil.copy(new, place.with_suffix(".new"))
        place.with_suffix(".new").rename(place)


def ask(server: HealthServer, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, server.port, timeout=10)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def whose(server: HealthServer, authority: Authority) -> str:
    """The name in the certificate that is shown, having asked by TLS for /healthz."""
    context = ssl.create_default_context(cafile=str(authority.certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=context)
    connection.request("GET", "/healthz")
    assert isinstance(connection.sock, ssl.SSLSocket)
    shown = connection.sock.getpeercert()
    assert connection.getresponse().read() == b"ok\n"
    connection.close()
    found = re.search(r"'commonName', '(\w+)'", str((shown or {}).get("subject")))
    assert found
    return found[1]


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/metrics/../etc/passwd", "/healthz/x", "/%2e%2e/x", "/debug/pprof"]
)
def test_nothing_else_is_there(server: HealthServer, path: str) -> None:
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("path", ["/metrics", "/healthz"])
def test_only_what_reads_is_answered(server: HealthServer, path: str) -> None:
    assert ask(server, path)[0] == 200
    assert ask(server, path, "HEAD") == (200, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "X"):
        assert ask(server, path, method)[0] == 405


@pytest.mark.parametrize("host", ["::1", "::"])
def test_it_serves_on_an_ipv6_address_as_a_pod_may_have_no_other(host: str) -> None:
    with HealthServer(Metrics().registry, {}, host=host, port=0) as server:
        assert ask(server, "/healthz", host="::1") == (200, b"ok\n")


def test_clients_that_say_nothing_or_stop_in_the_middle_keep_nobody_waiting(server: HealthServer) -> None:
    threads = threading.active_count()
    address = ("127.0.0.1", server.port)
    slow = [socket.create_connection(address, timeout=10) for _ in range(100)]
    try:
        for each in slow[1::2]:
            try:
                each.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow:")
            except OSError:  # closed already, to make room
                continue
        for path in ("/healthz", "/metrics"):
            assert ask(server, path)[0] == 200
        assert threading.active_count() - threads < 40
        assert slow[0].recv(1) == b""  # the oldest had to go
    finally:
        for each in slow:
            each.close()


def test_by_tls_it_is_served_to_who_trusts_its_authority_and_to_nobody_without_tls(
    authority: Authority, files: tuple[Path, Path]
) -> None:
    with HealthServer(Metrics().registry, {}, host="127.0.0.1", port=0, tls=Certificate(*files)) as server:
        assert whose(server, authority) == "first"
        with pytest.raises((http.client.HTTPException, OSError)):
            ask(server, "/metrics")
        stranger = ssl.create_default_context()
        with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", server.port)) as plain:
            stranger.wrap_socket(plain, server_hostname="127.0.0.1")


def test_a_renewed_certificate_is_taken_up_and_one_half_renewed_is_not(
    authority: Authority, files: tuple[Path, Path]
) -> None:
    with HealthServer(Metrics().registry, {}, host="127.0.0.1", port=0, tls=Certificate(*files)) as server:
        assert whose(server, authority) == "first"
        renew(authority, files, "second")
        assert whose(server, authority) == "second"
        third, _ = authority.issue("third", user="third", addresses=["IP:127.0.0.1"])
        shutil.copy(third, files[0])  # its key is still the second's
        assert whose(server, authority) == "second"
        renew(authority, files, "third")
        assert whose(server, authority) == "third"


def test_who_connects_and_never_shakes_hands_keeps_nobody_waiting(
    authority: Authority, files: tuple[Path, Path]
) -> None:
    with HealthServer(Metrics().registry, {}, host="127.0.0.1", port=0, tls=Certificate(*files)) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        assert whose(server, authority) == "first"
        for each in silent:
            each.close()


def test_files_that_are_no_certificate_are_named_at_the_start(files: tuple[Path, Path]) -> None:
    for spoiled in (lambda: files[1].write_text("none"), files[1].unlink):
        spoiled()
        with pytest.raises(PermanentError, match=r"tls\.key are not a certificate.*--metrics-tls-cert"):
            HealthServer(Metrics().registry, {}, host="127.0.0.1", port=0, tls=Certificate(*files))
