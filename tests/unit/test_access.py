"""How the agent reaches the API server."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubernetes.config import incluster_config

from vmbackup.report.cluster import authorization, load_client


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
