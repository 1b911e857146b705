"""Scenario 21: a guest is migrated, live, from one libvirt to another that sees the same files, and nothing is lost."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sandbox.libvirtd import Libvirtd
from tests.chaos.proof import Witness, make_guest
from tests.chaos.steps import comes_home, hurry, in_a_commit, in_a_copy
from tests.support.backups import BackupFactory, RunningBackup, make_node
from tests.support.domains import wait_until
from tests.support.tiers import in_chaos
from vmbackup.api.identity import BackupId
from vmbackup.api.status import Outcome, Report
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.imaging.locks import is_locked
from vmbackup.reconcile.leftovers.reader import read_all
from vmbackup.reconcile.leftovers.takeover import take_over_lost
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.steps.step import Ending

UNDEFINED, STILL_DEFINED = ("--undefinesource",), ()
CRAWLING, AT_FULL_SPEED = "1", "10000"  # MiB/s, of the guest's memory


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Libvirtd]:
    """Another host, which sees the same files."""
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))
    with Libvirtd(directory, host_uuid=str(uuid.uuid4())) as running:
        yield running
    shutil.rmtree(directory)


@pytest.fixture
def node_elsewhere(elsewhere: Libvirtd, tmp_path: Path) -> Iterator[Node]:
    """The node of that host: of what is known here it knows nothing, as it has neither our journals nor our locks."""
    hypervisor = Hypervisor(elsewhere.uri, config_dir=elsewhere.config_dir)
    directory = tmp_path / "elsewhere"
    yield make_node(hypervisor, directory / "state", directory / "locks")
    hypervisor.close()


@pytest.fixture
def mover(
    libvirtd: Libvirtd, elsewhere: Libvirtd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Witness]:
    """A Linux guest of this host that writes, and its witness; it is gone afterwards, wherever it is."""
    guest = make_guest(libvirtd, tmp_path, "mover", dirty_kib_per_second=128)
    made = Witness(libvirtd, guest)
    try:
        guest.wait_for_agent()
        guest.wait_for_more(3)
        made.watch_snapshots(monkeypatch)
        yield made
    finally:
        for host in (libvirtd, elsewhere):
            with suppress(KeyError):
                host.kill_guest(guest.name)
            with suppress(RuntimeError):
                host.virsh("undefine", guest.name)


def migration_of(witness: Witness, to: Libvirtd, *options: str) -> list[str]:
    """What virsh is told; the guest's memory goes through a socket in the file system."""
    memory = to.directory / "migration.sock"
    return ["migrate", "--live", "--persistent", "--unsafe", *options, witness.name, to.uri, f"unix:{memory}"]


def migrate(witness: Witness, to: Libvirtd, *options: str) -> Witness:
    """Migrate the guest; returns its witness there."""
    witness.libvirtd.virsh(*migration_of(witness, to, *options))
    assert witness.name not in witness.libvirtd.guest_pids()
    return Witness(to, witness.guest)


@contextmanager
def being_migrated(witness: Witness, to: Libvirtd, *options: str) -> Generator[None]:
    """A migration that takes longer than anybody waits; it is over afterwards."""
    virsh = witness.libvirtd.virsh
    virsh("migrate-setspeed", witness.name, CRAWLING)
    command = ["virsh", "--quiet", "--connect", witness.libvirtd.uri, *migration_of(witness, to, *options)]
    with subprocess.Popen(command, env=witness.libvirtd.environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: "Memory processed" in virsh("domjobinfo", witness.name), "it is being migrated")
            yield
        finally:
            with suppress(RuntimeError):
                virsh("domjobabort", witness.name)
            process.wait()
            with suppress(RuntimeError):
                virsh("migrate-setspeed", witness.name, AT_FULL_SPEED)


def swept(node: Node, domain: str, store: Path) -> RunningBackup:
    """Bring home what no journal of this node knows, as its agent does when it looks (agent/leftovers.py)."""
    (look,) = [look for look in read_all(node.hypervisor.guests()) if look.guest.name == domain]
    overlays = [overlay.path for overlay in look.overlays]
    spec = {"nodeName": "elsewhere", "domain": look.guest.uuid, "storeRef": {"name": "none"}}
    record = take_over_lost(node, look.guest, overlays, spec)
    assert record is not None
    assert sorted(disk.overlay for disk in record.disks) == sorted(overlays)
    sweep = RunningBackup(node, record.identity, spec, store, retry="sweep")
    sweep.ask(deleted=True)
    return sweep


def looks_like(overlays: list[Path]) -> list[tuple[int, int]]:
    """What nobody but QEMU may change of them: which files they are. And that they are in use."""
    assert all(is_locked(overlay) for overlay in overlays)
    return [(overlay.stat().st_ino, overlay.stat().st_dev) for overlay in overlays]


def migrated_in_a_copy(
    mover: Witness, elsewhere: Libvirtd, backup: BackupFactory, *options: str
) -> tuple[RunningBackup, Witness, Report]:
    """Migrate the guest on its overlays; the backup fails, and does not merge them here though it may do so offline.

    Returns the backup, the witness there, and what is reported here when it has failed.
    """
    running = in_a_copy(mover, backup)
    running.edit("commit", offline=True)
    overlays = mover.overlays()
    there = migrate(mover, elsewhere, *options)
    report = running.wait_for(lambda report: report.backup_complete is False, "it has failed")
    before = looks_like(overlays)
    hurry(running)
    mover.guest.wait_for_more()
    assert looks_like(overlays) == before
    assert not any("start the guest" in message for _, message in running.told.events), "there it would run twice"
    return running, there, report


@pytest.mark.misfortune("migrated in the commit")
def test_a_migration_in_the_middle_of_the_commit_is_refused_and_the_backup_comes_home(
    witness: Witness, elsewhere: Libvirtd, backup: BackupFactory
) -> None:
    """By libvirt: a block job pins its guest."""
    running = in_a_commit(witness, backup)
    with pytest.raises(RuntimeError, match="block job"):
        migrate(witness, elsewhere, *UNDEFINED)
    assert witness.name not in elsewhere.virsh("list", "--all", "--name").split()
    comes_home(witness, running)


@pytest.mark.scenario(21)
def test_a_guest_that_is_migrated_on_its_overlay_and_stays_defined_comes_home_by_the_sweep_there(
    mover: Witness, elsewhere: Libvirtd, node_elsewhere: Node, backup: BackupFactory, tmp_path: Path
) -> None:
    running, there, report = migrated_in_a_copy(mover, elsewhere, backup, *STILL_DEFINED)
    assert report.reason == "DomainMigrated"
    for words in (f"domain {mover.name} was migrated", "the agent on that host", "virsh undefine"):
        assert words in report.message
    assert (report.backup_reason, report.chain_clean) == ("DomainMigrated", False)
    assert there.written() == {target: there.source(target, inactive=True) for target in there.bases}
    assert sorted(there.written().values()) == [str(overlay) for overlay in mover.overlays()]

    sweep = swept(node_elsewhere, there.name, tmp_path / "none")
    sweep.end()
    assert not node_elsewhere.records()
    there.prove(running)

    mover.libvirtd.virsh("undefine", mover.name)
    report = running.end()
    assert (report.outcome, report.reason, report.chain_clean) == (Outcome.FAILED, "DomainMigrated", True)
    there.prove(running)


@pytest.mark.misfortune("migrated, and libvirtd has forgotten it")
def test_the_overlay_of_a_migrated_guest_is_not_merged_here_while_it_is_off_there(
    mover: Witness, elsewhere: Libvirtd, node_elsewhere: Node, backup: BackupFactory, tmp_path: Path
) -> None:
    """libvirtd here has forgotten that the guest was migrated.

    Its definition there names the overlay, which it must find at its next start.
    """
    running = in_a_copy(mover, backup)
    there = migrate(mover, elsewhere, *STILL_DEFINED)
    running.wait_for(lambda report: report.backup_complete is False, "it has failed")
    running.ask(stop=True)
    assert running.ending is Ending.INTERRUPTED
    mover.libvirtd.kill()
    mover.libvirtd.start()
    elsewhere.virsh("destroy", there.name)
    overlays = mover.overlays()
    again = backup(mover.name, again=running, commit={"offline": True})
    again.wait_for(lambda report: report.reason == "DomainMigrated", "it has looked")
    assert mover.overlays() == overlays

    elsewhere.virsh("start", there.name)
    mover.guest.wait_for_more()
    swept(node_elsewhere, there.name, tmp_path / "none").end()
    mover.libvirtd.virsh("undefine", mover.name)
    assert again.end().outcome is Outcome.FAILED
    there.prove(again)


@pytest.mark.misfortune("migrated on the overlay, and undefined")
def test_a_guest_that_is_migrated_on_its_overlay_and_undefined_comes_home_by_the_next_backup_there(
    mover: Witness,
    elsewhere: Libvirtd,
    node_elsewhere: Node,
    backup: BackupFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here nothing tells a domain that was migrated from one that was undefined: the images are not touched."""
    running, there, report = migrated_in_a_copy(mover, elsewhere, backup, *UNDEFINED)
    overlays = mover.overlays()
    assert (report.outcome, report.reason, report.chain_clean) == (Outcome.FAILED, "Quarantined", False)
    for words in ("disk vda", str(overlays[0]), "keep that file", "If the domain was migrated"):
        assert words in report.message

    there.watch_snapshots(monkeypatch)
    spec = {"nodeName": "elsewhere", "domain": there.name, "storeRef": {"name": "store"}}
    (look,) = [look for look in read_all(node_elsewhere.hypervisor.guests()) if look.guest.name == there.name]
    assert sorted(overlay.path for overlay in look.overlays) == [str(overlay) for overlay in overlays]
    following = RunningBackup(
        node_elsewhere, BackupId("tests", "next", str(uuid.uuid4())), spec, tmp_path / "store-elsewhere"
    )
    assert following.end().outcome is Outcome.SUCCEEDED, following.report
    assert "AdoptedOverlayHome" in following.told.reasons
    there.prove(running, following)

    report = running.end()
    assert "QuarantineLifted" in running.told.reasons
    assert (report.outcome, report.chain_clean) == (Outcome.FAILED, True)
    there.prove(running, following)


@pytest.mark.misfortune("a migration that is aborted")
def test_a_backup_of_a_guest_that_is_being_migrated_begins_when_that_was_aborted(
    witness: Witness, elsewhere: Libvirtd, backup: BackupFactory
) -> None:
    with being_migrated(witness, elsewhere, *UNDEFINED):
        running = backup(witness.name)
        report = running.wait_for(lambda report: report.reason == "WaitingForOthers", "WaitingForOthers")
        assert f"domain {witness.name} is being migrated" in report.message
        assert "virsh domjobinfo" in report.message
        assert not witness.overlays()
        witness.guest.wait_for_more()
        witness.libvirtd.virsh("domjobabort", witness.name)
    comes_home(witness, running)


@pytest.mark.misfortune("migrated before the snapshot")
@pytest.mark.parametrize("options", [UNDEFINED, in_chaos(STILL_DEFINED)], ids=["undefined here", "still defined here"])
def test_a_backup_that_has_waited_for_a_migration_is_refused_when_its_guest_has_gone(
    mover: Witness, elsewhere: Libvirtd, backup: BackupFactory, options: tuple[str, ...]
) -> None:
    there = Witness(elsewhere, mover.guest)
    with being_migrated(mover, elsewhere, *options):
        running = backup(mover.name)
        running.wait_for(lambda report: report.reason == "WaitingForOthers", "WaitingForOthers")
        mover.libvirtd.virsh("migrate-setspeed", mover.name, AT_FULL_SPEED)
        report = running.end()
    assert (report.outcome, report.reason, report.chain_clean) == (Outcome.REFUSED, "DomainNotRunning", True)
    for words in (f"domain {mover.name} is no longer on this host", "spec.nodeName"):
        assert words in report.message
    there.prove(running)
