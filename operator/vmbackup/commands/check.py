"""`vmbackup check`: shows what would be backed up, what would be refused, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmbackup.commands import flags
from vmbackup.commands.flags import Flag
from vmbackup.commands.verb import Argument, Verb, settings_of
from vmbackup.errors import TransientError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.admission.plan import Planner
from vmbackup.reconcile.admission.survey import DiskSurvey, DomainSurvey, Verdict, survey
from vmbackup.reconcile.state import journal

ALL_CAN_BE, SOME_REFUSED = 0, 1  # exit codes

FLAGS = (
    Flag(
        "--output",
        "table or json",
        flags.one_of("table", "json"),
        default="table",
        metavar="FORMAT",
        short="-o",
    ),
)

_EXAMPLES = """\
examples:
  vmbackup check                 # every domain
  vmbackup check web-01
  vmbackup check -o json | jq '.domains[] | select(.refused != []) | .domain'
"""
_EXIT_CODES = """\
exit codes:
  0    every domain could be backed up
  1    at least one would be refused
  2    usage error, no such domain, or libvirtd does not answer
"""

_WIDE = 200  # columns without a terminal: grep cannot find a path that is wrapped
_VERDICTS = {
    Verdict.BACKED_UP: ("backed up", "green"),
    Verdict.LEFT_OUT: ("left out", "dim"),
    Verdict.REFUSED: ("refused", "red"),
    Verdict.ON_OVERLAY: ("on overlay", "yellow"),
}


@dataclass(frozen=True)
class CheckSettings:
    """The flags of `vmbackup check`, and its argument."""

    domain: str | None
    output: str
    libvirt_uri: str
    libvirt_config_dir: Path | None
    state_dir: Path
    overlay_dir: Path | None
    image_roots: tuple[Path, ...] | None


def check(settings: CheckSettings) -> int:
    """Inspect the domains and print the result; the exit code. Raises VMBackupError if they cannot be inspected."""
    hypervisor = Hypervisor(settings.libvirt_uri, config_dir=settings.libvirt_config_dir)
    try:
        if not hypervisor.ping():
            raise TransientError(flags.no_libvirtd(settings.libvirt_uri))
        guests = [hypervisor.guest(settings.domain)] if settings.domain else hypervisor.guests()
        planner = Planner(hypervisor, settings.overlay_dir, settings.image_roots or ())
        records = list(journal.records(settings.state_dir))
        found = sorted(survey(planner, guests, records), key=lambda domain: domain.name)
    finally:
        hypervisor.close()
    if settings.output == "json":
        print(json.dumps({"domains": [_as_json(domain) for domain in found]}, indent=2))
    else:
        _print(found)
    return SOME_REFUSED if any(domain.refusals for domain in found) else ALL_CAN_BE


def _as_json(domain: DomainSurvey) -> dict[str, Any]:
    return {
        "domain": domain.name,
        "domainUUID": domain.uuid,
        "state": domain.state,
        "persistent": domain.persistent,
        "guestAgent": domain.guest_agent,
        "refused": [asdict(refusal) for refusal in domain.refusals],
        "notes": list(domain.notes),
        "disks": [asdict(disk) for disk in domain.disks],
    }


def _print(domains: Sequence[DomainSurvey]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)
    if not domains:
        console.print("There are no domains.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("DOMAIN", "STATE", "DISK", "IMAGE", "FORMAT", "BACKUP"):
        table.add_column(column, overflow="fold")
    for domain in domains:
        first = (domain.name, str(domain.state))
        for disk in domain.disks or (None,):
            table.add_row(*first, *_cells(disk))
            first = ("", "")
    console.print(table)
    for domain in domains:
        for refusal in domain.refusals:
            console.print(Text.assemble(("refused ", "red"), (domain.name, "bold"), f": {refusal.message}"))
        for note in domain.notes:
            console.print(Text.assemble(("note    ", "yellow"), (domain.name, "bold"), f": {note}"))


def _cells(disk: DiskSurvey | None) -> tuple[str | Text, ...]:
    if disk is None:
        return ()
    word, style = _VERDICTS[disk.verdict]
    shown = "" if disk.verdict is Verdict.REFUSED else disk.message
    return disk.target, disk.image, disk.format, Text.assemble((word, style), f": {shown}" if shown else "")


def _start(parsed: argparse.Namespace) -> int:
    return check(settings_of(CheckSettings, parsed))


VERB = Verb(
    _start,
    (*FLAGS, *flags.HYPERVISOR),
    _EXAMPLES,
    log_level="error",
    exit_codes=_EXIT_CODES,
    arguments=(Argument("DOMAIN", "name or UUID; default: every domain"),),
)
