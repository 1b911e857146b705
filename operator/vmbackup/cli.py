"""The command line: `vmbackup agent | run | check | top`.

A command is a module of commands/ and a line in the table here. Only the module of the command that is called is
imported: `run` and `check` start without kopf and the Kubernetes client, and `vmbackup --help` without libvirt.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Container, Sequence
from importlib import import_module

from vmbackup.commands.verb import Verb
from vmbackup.errors import VMBackupError
from vmbackup.output import StderrLog
from vmbackup.version import __version__

USAGE, INTERRUPTED = 2, 130  # exit codes

VERBS = {
    "agent": "run the VMBackups of this hypervisor that an API server holds",
    "run": "take one backup now, from its manifest, without a cluster",
    "check": "show which domains and disks would be backed up, which would be refused, and why; changes nothing",
    "top": "show what the agents are doing now: backups, overlays, and guests in trouble",
}
"""The commands: the name of each, which is also that of its module in commands/, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = next((each for each in given if each in VERBS), "")
    parsed = _parser((chosen,)).parse_args(given)
    _log_to_stderr(parsed.log_level)
    try:
        return _verb(parsed.command).start(parsed)
    except VMBackupError as error:
        print(f"vmbackup {parsed.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _verb(name: str) -> Verb:
    verb: Verb = import_module(f"vmbackup.commands.{name}").VERB
    return verb


def _parser(complete: Container[str] = VERBS) -> argparse.ArgumentParser:
    """Parses the commands in `complete`; the other commands are only listed."""
    parser = argparse.ArgumentParser(
        prog="vmbackup",
        description="Live backup of libvirt/QEMU virtual machines, by snapshot, copy and active blockcommit.",
        epilog="Every flag can also be set by the environment variable shown beside it; the flag takes precedence.",
    )
    parser.add_argument("--version", action="version", version=f"vmbackup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, about in VERBS.items():
        command = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in complete:
            _verb(name).add_to(command)
    return parser


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[StderrLog()]
    )


if __name__ == "__main__":
    sys.exit(main())
