"""The proof at the end of each scenario can be trusted: what is lost, untold or of another moment, it finds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sandbox.oracle import ProofError
from tests.chaos.proof import Witness
from tests.support.backups import SLOW, BackupFactory
from vmbackup.api.status import Outcome
from vmbackup.imaging.locks import hold_reader_lock


def test_a_backup_of_a_writing_guest_is_proven_without_stopping_it(witness: Witness, backup: BackupFactory) -> None:
    running = backup(witness.name)
    assert running.end().outcome is Outcome.SUCCEEDED
    started = time.monotonic()
    witness.prove(running)
    print(f"proven in {time.monotonic() - started:.1f} s")
    assert len(witness.guest.starts("vda")) == 1


def test_a_copy_of_another_moment_than_its_snapshot_is_found(witness: Witness, backup: BackupFactory) -> None:
    running = backup(witness.name)
    assert running.end().outcome is Outcome.SUCCEEDED
    witness.guest.wait_for_more(3)
    witness.snapshot_begins(running.key.uid)
    with pytest.raises(ProofError, match="acknowledged writes are lost"):
        witness.prove(running)


def test_a_disk_that_is_left_on_its_overlay_must_be_told_and_still_holds_everything(
    witness: Witness, backup: BackupFactory
) -> None:
    running = backup(witness.name, copy={"bandwidth": SLOW}, commit={"backoffLimit": 0})
    running.wait_for_copying()
    with Path(witness.bases["vda"]).open("rb") as reader:
        hold_reader_lock(reader.fileno())
        running.edit("copy", bandwidth="10Gi")
        assert running.end().reason == "CommitLimitReached"
        with pytest.raises(AssertionError, match="vda: the live XML names"):
            witness.prove(running)
        witness.prove(running, left=["vda"])
        running.told.events.clear()
        with pytest.raises(AssertionError, match="no event names"):
            witness.prove(running, left=["vda"])
