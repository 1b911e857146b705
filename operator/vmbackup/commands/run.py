"""`vmbackup run`: one backup on this hypervisor without a cluster, with the state machine and journal of the agent."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbackup.commands import flags
from vmbackup.commands.flags import Flag
from vmbackup.commands.running.backup_file import BackupFile, read
from vmbackup.commands.running.screen import LineConsole, Screen
from vmbackup.commands.running.session import Session, print_broken
from vmbackup.commands.verb import Verb, settings_of
from vmbackup.errors import RefusedError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.protocol.record import Record
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.rescue import guarded
from vmbackup.reconcile.state.journal import forget
from vmbackup.telemetry.metrics import Metrics

FLAGS = (
    Flag(
        "--file",
        "manifest of one VMBackup, and of its VMBackupStore unless --store or --store-path is set; - for stdin",
        short="-f",
        metavar="FILE",
        required=True,
    ),
    Flag("--store", "manifest of the VMBackupStore", metavar="FILE"),
    Flag("--store-path", "directory to store the backup in, instead of a VMBackupStore", flags.path, metavar="DIR"),
    Flag(
        "--retry",
        "resume a backup that gave up merging its overlay",
        flags.boolean,
        default="false",
        metavar="BOOL",
        switch=True,
    ),
)

_EXAMPLES = """\
examples:
  vmbackup run -f web-01.yaml                              # a VMBackup and its VMBackupStore in one file
  vmbackup run -f web-01.yaml --store-path /srv/backups    # a file with only a VMBackup
  vmbackup run -f web-01.yaml --retry                      # after exit code 3, when the cause is fixed
"""
_EXIT_CODES = """\
exit codes:
  0    Ready: the backup is stored, and every disk is on its own image again
  1    the backup failed, and every disk is on its own image again
  2    usage error, or refused: nothing was touched
  3    the guest is still on its overlay, or quarantined: it lost nothing, but you have to act
  130  interrupted: run again to continue

The first Ctrl-C stops the backup at the next safe point, the second one at once. After either, and after kill -9 or a
power cut, run the same command again: the backup continues. A spec.nodeName in the manifest is ignored.
"""


@dataclass(frozen=True)
class RunSettings:
    """The flags of `vmbackup run`."""

    file: str
    store: str | None
    store_path: Path | None
    retry: bool
    libvirt_uri: str
    libvirt_config_dir: Path | None
    state_dir: Path
    overlay_dir: Path | None
    image_roots: tuple[Path, ...] | None


def run(settings: RunSettings) -> int:
    """Run the backup until it ends or is interrupted; the exit code. Raises VMBackupError where nothing was begun."""
    file = read(settings.file, store_file=settings.store, store_path=settings.store_path)
    hypervisor = Hypervisor(settings.libvirt_uri, config_dir=settings.libvirt_config_dir)
    try:
        roots = settings.image_roots or ()
        node = Node(hypervisor, settings.state_dir, Metrics(), overlay_dir=settings.overlay_dir, image_roots=roots)
        records = node.records()
        earlier = earlier_run(file, records, retry=settings.retry)
        if not hypervisor.ping():
            return print_broken(flags.no_libvirtd(settings.libvirt_uri), earlier)
        if earlier is None:
            _forget_done(file, records, settings.state_dir)
        with guarded(node), Screen(LineConsole(highlight=False)) as screen:
            return Session(node, file, earlier, screen, retry=settings.retry).run()
    finally:
        hypervisor.close()


def earlier_run(file: BackupFile, records: Sequence[Record], *, retry: bool) -> Record | None:
    """The earlier run of this backup that is to be continued; None: this is a new backup. Raises RefusedError."""
    same = [record for record in records if (record.namespace, record.name) == (file.namespace, file.name)]
    if file.uid:
        same = [record for record in records if record.uid == file.uid]
    wanted = [record for record in same if not record.finished or (retry and record.gave_up) or file.uid]
    if not wanted:
        if retry:
            raise RefusedError(f"no backup {file} has given up here: leave out --retry, or correct --state-dir")
        return None
    record = max(wanted, key=lambda each: each.started or 0.0)
    if record.domain and file.spec.domain not in (record.domain, record.domain_uuid):
        raise RefusedError(
            f"an unfinished backup {file} exists for the domain {record.domain}: finish that one first, or choose "
            "another metadata.name"
        )
    return record


def _forget_done(file: BackupFile, records: Sequence[Record], state_dir: Path) -> None:
    """Remove the journals of earlier runs of this name that left nothing to do. Those of an agent have their spec."""
    for record in records:
        mine = (record.namespace, record.name) == (file.namespace, file.name) and not record.spec
        if mine and record.done:
            forget(state_dir, record.uid)


def _start(parsed: argparse.Namespace) -> int:
    return run(settings_of(RunSettings, parsed))


VERB = Verb(_start, (*FLAGS, *flags.HYPERVISOR), _EXAMPLES, log_level="warning", exit_codes=_EXIT_CODES)
