"""How a scenario gets to its moment: into the middle of a copy, or of a commit."""

from __future__ import annotations

from tests.chaos.proof import Witness
from tests.support.backups import SLOW, BackupFactory, RunningBackup
from vmbackup.api.status import Outcome

PATTERN = 0x5A


def in_a_copy(witness: Witness, backup: BackupFactory, **spec: object) -> RunningBackup:
    """A backup in the middle of its copy, which goes on slowly."""
    running = backup(witness.name, copy={"bandwidth": SLOW}, commit={"bandwidth": SLOW}, **spec)
    running.wait_for_copying()
    return running


def in_a_commit(witness: Witness, backup: BackupFactory, **spec: object) -> RunningBackup:
    """A backup in the middle of its commits, which go on slowly."""
    running = in_a_copy(witness, backup, **spec)
    witness.write_tail("vda", PATTERN)
    witness.write_tail("vdb", PATTERN)
    running.edit("copy", bandwidth="10Gi")
    running.wait_for(lambda report: all(disk.merged_bytes for disk in report.disks), "committing")
    return running


def hurry(running: RunningBackup) -> None:
    """No step is slow any more."""
    running.edit("copy", bandwidth="10Gi")
    running.edit("commit", bandwidth="10Gi")


def comes_home(witness: Witness, running: RunningBackup, outcome: Outcome = Outcome.SUCCEEDED) -> None:
    """It ends like that, and nothing is lost."""
    hurry(running)
    assert running.end().outcome is outcome, running.report
    witness.prove(running)
