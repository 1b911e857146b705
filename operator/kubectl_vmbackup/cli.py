"""The command line of the plugin."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import PurePath
from typing import Any

from kubectl_vmbackup import cancel, check, forget, retry, status
from kubectl_vmbackup.completion import complete
from kubectl_vmbackup.kubectl import INTERRUPTED, Kubectl, PluginError
from kubectl_vmbackup.view import printable
from vmbackup.version import __version__

_GLOBAL = {
    "namespace": ("-n", "NAMESPACE", "the namespace of the VMBackups"),
    "context": ("", "CONTEXT", "the context of the kubeconfig"),
    "kubeconfig": ("", "KUBECONFIG", "the kubeconfig file"),
    "cluster": ("", "CLUSTER", "the cluster of the kubeconfig"),
    "user": ("", "USER", "the user of the kubeconfig"),
    "server": ("-s", "URL", "the address of the API server"),
    "token": ("", "TOKEN", "a bearer token for the API server"),
    "client-certificate": ("", "FILE", "the file of a client certificate"),
    "client-key": ("", "FILE", "the file of its key"),
    "certificate-authority": ("", "FILE", "the certificate of the CA that has signed the API server's"),
    "tls-server-name": ("", "NAME", "the name to expect in the API server's certificate"),
    "as": ("", "USER", "the user to impersonate"),
    "as-group": ("", "GROUP", "a group to impersonate; can be repeated"),
    "as-uid": ("", "UID", "the UID to impersonate"),
    "request-timeout": ("", "TIME", "how long one request may take, such as 30s"),
}
_INSECURE = "insecure-skip-tls-verify"
_EXITS = """\
exit codes:
  0    done; check: no problem found
  1    not done, the message gives the reason; check: a problem was found; --wait: it ended without being Ready
  2    usage
  130  interrupted
"""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["__complete"]:
            return _complete(words[1:])
        if arguments is None and PurePath(sys.argv[0]).name.startswith("kubectl_complete-"):
            return _complete(words)
        parsed = _parser().parse_args(words)
        return _run(parsed, _kubectl(parsed))
    except PluginError as error:
        print(printable(f"kubectl vmbackup: {error}"), file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # of `| head`
        sys.stderr.close()
        return 0


def _run(parsed: argparse.Namespace, kubectl: Kubectl) -> int:
    match parsed.command:
        case "status":
            return status.status(kubectl, parsed.name, all_namespaces=parsed.all_namespaces)
        case "retry":
            return retry.retry(kubectl, parsed.name, new=parsed.new, waits=parsed.wait, timeout=parsed.timeout)
        case "cancel":
            return cancel.cancel(kubectl, parsed.name, waits=parsed.wait, timeout=parsed.timeout)
        case "check":
            return check.check(kubectl, parsed.name, parsed.file)
        case _:
            return forget.forget(kubectl, parsed.name, yes=parsed.yes, force=parsed.force, silent_for=parsed.silent_for)


def _kubectl(parsed: argparse.Namespace) -> Kubectl:
    """Kubectl with the flags for it; kubectl decides about one that is set twice."""
    given = ((name, getattr(parsed, name.replace("-", "_"), None) or ()) for name in (*_GLOBAL, _INSECURE))
    return Kubectl(tuple(f"--{name}={value}" for name, values in given for value in values))


def _complete(words: Sequence[str]) -> int:
    parser = _parser()
    commands: dict[str, argparse.ArgumentParser] = parser.get_default("commands")
    for line in complete(words, commands, _kubectl_of):
        print(line)
    return 0


def _kubectl_of(words: Sequence[str]) -> Kubectl:
    """Kubectl with the flags of an incomplete command line."""
    only = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    _add_global(only)
    try:
        return _kubectl(only.parse_known_args(words)[0])
    except argparse.ArgumentError:
        return Kubectl()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubectl vmbackup",
        description="Manages VMBackups: live backups of libvirt/QEMU guests.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kubectl-vmbackup {__version__}")
    commands: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    known: dict[str, argparse.ArgumentParser] = {}
    parser.set_defaults(commands=known)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        its: argparse.ArgumentParser = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=_EXITS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        known[name] = its
        return its

    one = command("status", "show one VMBackup in full, with the next step, or all in a table")
    one.add_argument("name", nargs="*", metavar="NAME", help="VMBackups [default: a table of all]")
    one.add_argument("-A", "--all-namespaces", action="store_true", help="those of all namespaces")
    one = command(
        "retry", "bring home a guest that a VMBackup has left on its overlay, or create the same backup again"
    )
    one.add_argument("name", metavar="NAME", help="a VMBackup that has failed")
    one.add_argument(
        "--new", action="store_true", help="create another VMBackup with the same spec, of the present moment"
    )
    _add_wait(one)
    one = command("cancel", "cancel the copy of a running VMBackup, and bring its guest home")
    one.add_argument("name", metavar="NAME", help="a VMBackup that is running")
    _add_wait(one)
    one = command("check", "check whether a backup can be taken, as far as the API server shows; changes nothing")
    one.add_argument("name", nargs="?", metavar="NAME", help="a VMBackup; without it and -f: the installation")
    one.add_argument("-f", "--file", metavar="FILE", help="a manifest with VMBackups; - for stdin")
    one = command("forget", "remove a VMBackup whose node is gone for good, unless there are signs of life")
    one.add_argument("name", metavar="NAME", help="a VMBackup that cannot be deleted because its agent is gone")
    one.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    one.add_argument("--force", action="store_true", help="even if there are signs of life: its guest may stay on an "
                     "overlay that nothing reports")  # fmt: skip
    one.add_argument("--silent-for", type=_duration, default="10m", metavar="TIME",
                     help="how long its node and agent must have been silent [default: 10m]")  # fmt: skip
    for each in known.values():
        _add_global(each)
    return parser


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", action="store_true", help="wait until it ends")
    parser.add_argument("--timeout", type=lambda text: _duration(text).total_seconds(), metavar="TIME",
                        help="for --wait, such as 30m [default: no limit]")  # fmt: skip


def _add_global(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("flags for kubectl")
    for name, (short, metavar, about) in _GLOBAL.items():
        flags = filter(None, (short, f"--{name}"))
        group.add_argument(*flags, metavar=metavar, action="append", help=about)
    trust = "do not verify the certificate of the API server"
    group.add_argument(f"--{_INSECURE}", action="append_const", const="true", help=trust)


def _duration(text: str) -> timedelta:
    """A time such as 90s, 10m, 1h30m."""
    if not re.fullmatch(r"(\d+[smhd])+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: set a time such as 90s, 10m, 1h30m")
    parts = re.findall(r"(\d+)([smhd])", text)
    return timedelta(seconds=sum(int(count) * _UNITS[unit] for count, unit in parts))
