"""The command line: `vmbackup agent | run | check | top`.

The commands are imported when they are called: `run` and `check` start without kopf and the Kubernetes client, and
`--help` without libvirt.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from vmbackup.commands import flags
from vmbackup.commands.flags import Flag
from vmbackup.errors import VMBackupError
from vmbackup.output import StderrLog
from vmbackup.version import __version__

USAGE, INTERRUPTED = 2, 130  # exit codes

_COMMON = (
    Flag("--libvirt-uri", "the libvirtd to connect to", default="qemu:///system", metavar="URI"),
    Flag(
        "--libvirt-config-dir",
        "where that libvirtd keeps the definitions of its domains, to prove them durable",
        flags.path,
        metavar="DIR",
        default_says="that of the URI, /etc/libvirt/qemu for the system's",
    ),
    Flag(
        "--state-dir",
        "where the journals of backups are: keep it, on a disk",
        flags.path,
        default="/var/lib/vmbackup/state",
        metavar="DIR",
    ),
    Flag(
        "--overlay-dir",
        "where overlays go, which take the guest's writes meanwhile; needed for disks that are block devices",
        flags.path,
        metavar="DIR",
        default_says="beside each disk's image",
    ),
    Flag(
        "--image-roots",
        "only back up disks whose images, including backing images, are below these directories (links resolved)",
        flags.paths,
        metavar="DIR[:DIR]",
        default_says="any image that libvirt's XML names",
    ),
)
_AGENT = (
    Flag(
        "--node-name",
        "run the VMBackups whose spec.nodeName is this",
        flags.node_name,
        default=socket.gethostname().lower(),
        metavar="NAME",
    ),
    Flag(
        "--kubeconfig",
        "how to reach the API server",
        metavar="FILE",
        default_says="the pod's service account, else as kubectl finds it",
    ),
    Flag(
        "--metrics-host",
        "address to serve /metrics and /healthz on; they need no login and name the domains, so on loopback unless "
        "told otherwise: in a pod give its IP",
        default="127.0.0.1",
        metavar="IP",
    ),
    Flag("--metrics-port", "port to serve them on", flags.port, default="9777", metavar="PORT"),
    Flag(
        "--metrics-tls-cert",
        "serve them by TLS with this certificate, PEM, read again when it was renewed",
        flags.path,
        metavar="FILE",
    ),
    Flag("--metrics-tls-key", "the key of that certificate, PEM", flags.path, metavar="FILE"),
    Flag(
        "--max-concurrent-backups",
        "how many domains to back up at once; others wait",
        flags.at_least_one,
        default="2",
        metavar="N",
    ),
    Flag(
        "--commit-backoff",
        "pause after the first failure of a commit, doubled for each further one, 5 minutes at most",
        flags.seconds,
        default="5",
        metavar="SECONDS",
    ),
    Flag(
        "--relist-interval",
        "how often VMBackups, journals and domains are compared, for what a watch or a deletion has missed",
        flags.seconds,
        default="300",
        metavar="SECONDS",
    ),
    Flag(
        "--orphan-policy",
        "what to do with one of vmbackup's overlays that nobody waits for, say since a journal was lost: Commit it, or "
        "only Report it",
        flags.one_of("Commit", "Report"),
        default="Commit",
        metavar="POLICY",
    ),
)
_RUN = (
    Flag(
        "--file",
        "manifest of one VMBackup, and of its VMBackupStore unless --store or --store-path is given; - for stdin",
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
_CHECK = (
    Flag(
        "--output",
        "table or json",
        flags.one_of("table", "json"),
        default="table",
        metavar="FORMAT",
        short="-o",
    ),
)

_TOP = (
    Flag(
        "--url",
        "the /metrics of an agent; give it once for each, or several with commas between them",
        flags.urls,
        default=flags.own_metrics(),
        metavar="URL",
        gathers=True,
        default_says="that of the agent with this environment, http://127.0.0.1:9777/metrics",
    ),
    Flag("--interval", "how often to look", flags.seconds, default="2", metavar="SECONDS"),
    Flag(
        "--once",
        "print one look and exit; also when the output is not a terminal",
        flags.boolean,
        default="false",
        metavar="BOOL",
        switch=True,
    ),
)

_RUN_EXITS = """\
exit codes:
  0    Ready: the backup is stored, and every disk is on its own image again
  1    the backup failed, and every disk is on its own image again
  2    usage, or refused: nothing was touched
  3    the guest is still on its overlay, or quarantined: it lost nothing, but needs you
  130  interrupted: run again to carry on

The first Ctrl-C ends it at the next safe point, the second at once. After either, and after kill -9 or a power cut,
run the same again and it carries on where it was. spec.nodeName is ignored.
"""
_CHECK_EXITS = """\
exit codes:
  0    all could be backed up
  1    something would be refused
  2    usage, no such domain, or libvirtd does not answer
"""


_TOP_EXITS = """\
exit codes, where it looks once:
  0    all is well
  1    a guest or an agent needs a look: see the last column and the lines below the table
  2    usage, or no agent answers

Where it looks again and again, Ctrl-C ends it, with 0.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parsed = _parser().parse_args(arguments)
    _log_to_stderr(parsed.log_level)
    try:
        return _COMMANDS[parsed.command](parsed)
    except VMBackupError as error:
        print(f"vmbackup {parsed.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _agent(parsed: argparse.Namespace) -> int:
    from vmbackup.agent import operator as agent

    return agent.run(_settings(agent.AgentSettings, parsed))


def _run(parsed: argparse.Namespace) -> int:
    from vmbackup.commands import run

    return run.run(_settings(run.RunSettings, parsed))


def _check(parsed: argparse.Namespace) -> int:
    from vmbackup.commands import check

    return check.check(_settings(check.CheckSettings, parsed))


def _top(parsed: argparse.Namespace) -> int:
    from vmbackup.commands import top

    return top.top(_settings(top.TopSettings, parsed))


_COMMANDS = {"agent": _agent, "run": _run, "check": _check, "top": _top}

Settings = TypeVar("Settings")


def _settings(kind: type[Settings], parsed: argparse.Namespace) -> Settings:
    """The settings of a command: its fields are named as the flags are."""
    names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: getattr(parsed, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vmbackup",
        description="Live backup of libvirt/QEMU virtual machines, by snapshot, copy and active blockcommit.",
        epilog="Every flag can also be set by the environment variable shown beside it; the flag takes precedence.",
    )
    parser.add_argument("--version", action="version", version=f"vmbackup {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    about_agent = "run the VMBackups of this hypervisor that an API server holds"
    _command(commands, "agent", about_agent, (*_AGENT, *_COMMON), log_level="info")
    about_run = "run one backup now, from its manifest, without a cluster"
    _command(commands, "run", about_run, (*_RUN, *_COMMON), log_level="warning", epilog=_RUN_EXITS)
    about_check = "say which domains and disks would be backed up, which would not, and why; changes nothing"
    check = _command(commands, "check", about_check, (*_CHECK, *_COMMON), log_level="error", epilog=_CHECK_EXITS)
    about_top = "show what agents do at this moment: backups, overlays, and guests in trouble"
    _command(commands, "top", about_top, _TOP, log_level="error", epilog=_TOP_EXITS)
    check.add_argument("domain", nargs="?", metavar="DOMAIN", help="name or UUID; default: every domain")
    return parser


def _command(
    commands: Any, name: str, about: str, its_flags: Sequence[Flag], *, log_level: str, epilog: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    levels = flags.one_of(*flags.LOG_LEVELS)
    metavar = "|".join(flags.LOG_LEVELS)
    log_flag = Flag("--log-level", "what to log on stderr", levels, default=log_level, metavar=metavar)
    for flag in (*its_flags, log_flag):
        flag.add_to(command)
    return command


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[StderrLog()]
    )


if __name__ == "__main__":
    sys.exit(main())
