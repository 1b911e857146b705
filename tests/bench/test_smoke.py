"""Each benchmark runs to its end, in a size that takes no time. What it measures here means nothing."""

from __future__ import annotations

import pytest

from bench import __main__ as bench
from bench import copy


def test_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_cool_down", lambda: None)  # it empties the machine's page cache
    assert bench.main(["copy", "--size", "1Mi", "--rounds", "1"]) in (0, 1)


def test_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["window", "--rounds", "1", "--bulk", "8"]) in (0, 1)
    assert "suspended, each time" in capsys.readouterr().out


@pytest.mark.chaos  # an API server and an agent of its own
def test_latency() -> None:
    assert bench.main(["latency", "--rounds", "1"]) in (0, 1)
