"""A commit that does not converge: what is done about it, and that it is undone."""

from __future__ import annotations

import time

import pytest

from tests.backups import SLOW, BackupFactory
from tests.domains import DomainFactory
from vmbackup.api.status import Outcome, Phase

YEAR = 31_536_000.0  # seconds


@pytest.mark.parametrize("jump", [YEAR, -YEAR], ids=["a year ahead", "a year back"])
def test_a_clock_that_jumps_neither_fails_a_copy_nor_escalates_a_commit(
    domain: DomainFactory, backup: BackupFactory, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    guest = domain(size="4M")
    guest.write("vda", 0x11, "0", "2M")
    running = backup(guest.name, copy={"bandwidth": SLOW}, commit={"bandwidth": SLOW})
    running.wait_for_copying()
    guest.write("vda", 0x22, "0", "2M")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    running.wait_for_phase(Phase.COMMITTING)
    monkeypatch.setattr(time, "time", lambda: real() + 3 * jump)
    report = running.end()

    assert report.outcome is Outcome.SUCCEEDED, report
    assert "CommitDeadlineExceeded" not in running.told.reasons
    seconds = report.disks[0].commit_seconds
    assert seconds is not None
    assert 0 < seconds < 60
