"""How the agent reaches the API server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import incluster_config

from vmbackup.api.names import BACKUPS
from vmbackup.cluster.client import Cluster, authorization, load_client
from vmbackup.errors import TransientError


class Greeter(BaseHTTPRequestHandler):
    """What a proxy, or a hotel, may put in the place of an API server."""

    def do_GET(self) -> None:
        """Answer that all is well, in a page for people."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Welcome!</html>")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def greeter() -> Iterator[str]:
    """The URL of one."""
    with HTTPServer(("127.0.0.1", 0), Greeter) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_in_a_pod_requests_carry_the_token_of_its_service_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, authority = tmp_path / "token", tmp_path / "ca.crt"
    token.write_text("s3cret")
    authority.write_text("-----BEGIN CERTIFICATE-----")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))

    assert authorization(load_client()) == "bearer s3cret"


def test_an_answer_that_is_none_of_an_api_server_is_worth_a_retry(greeter: str) -> None:
    cluster = Cluster(ApiClient(Configuration(host=greeter)))
    with pytest.raises(TransientError, match=r"not from an API server.*Welcome") as caught:
        cluster.get(BACKUPS, "default", "web")
    assert caught.value.reason == "ServerAway"
