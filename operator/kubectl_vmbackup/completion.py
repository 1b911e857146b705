"""Kubectl's protocol of plugin completion.

For `kubectl vmbackup WORD… <TAB>` kubectl calls `kubectl_complete-vmbackup WORD…`, the last of which is being typed.
Each proposal is a line, with a description after a tab. The last line is `:` and a number, which says what else the
shell may complete (pkg/cmd/plugin_completion.go of kubectl; ShellCompDirective of cobra).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

from kubectl_vmbackup.backup import every
from kubectl_vmbackup.kubectl import Kubectl, PluginError
from kubectl_vmbackup.view import printable
from vmbackup.api.resource import BackupResource

_FILES, _NO_FILES = 0, 4

_FITTING: dict[str, Callable[[BackupResource], bool]] = {
    "retry": lambda backup: not backup.running and not backup.terminating,
    "cancel": lambda backup: backup.running and not backup.terminating,
    "forget": lambda backup: backup.held,
}


def complete(
    words: Sequence[str], commands: dict[str, argparse.ArgumentParser], kubectl_of: Callable[[Sequence[str]], Kubectl]
) -> Iterator[str]:
    """The lines for what has been typed. Never raises: an error would break the line in the shell."""
    *before, last = words or [""]
    command = next((word for word in before if word in commands), "")
    directive = _NO_FILES
    if not command:
        found = [f"{name}\t{parser.description}" for name, parser in commands.items()]
    else:
        flag = _flag(commands[command], before)
        if flag is not None and flag.dest == "file":
            found, directive = [], _FILES
        elif flag is not None:
            found = _or_nothing(lambda: _values(flag, kubectl_of(before)))
        elif last.startswith("-"):
            found = _flags(commands[command])
        else:
            found = _or_nothing(lambda: _names(command, before, kubectl_of(before)))
    yield from (line for line in found if line.startswith(last))
    yield f":{directive}"


def _flag(parser: argparse.ArgumentParser, before: Sequence[str]) -> argparse.Action | None:
    """The flag whose value is being typed."""
    known = {name: action for action in parser._actions for name in action.option_strings}  # pyright: ignore[reportPrivateUsage]
    action = known.get(before[-1])
    return action if action is not None and action.nargs != 0 else None


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    actions = parser._actions  # pyright: ignore[reportPrivateUsage]
    return [f"{name}\t{action.help}" for action in actions for name in action.option_strings if name.startswith("--")]


def _values(flag: argparse.Action, kubectl: Kubectl) -> list[str]:
    match flag.dest:
        case "namespace":
            names = kubectl.run("get", "namespaces", "-o", "name").split()
            return [name.partition("/")[2] for name in names]
        case "context":
            return kubectl.run("config", "get-contexts", "-o", "name").split()
        case "cluster":
            return [name for name in kubectl.run("config", "get-clusters").split("\n")[1:] if name]
        case _:
            return []


def _names(command: str, before: Sequence[str], kubectl: Kubectl) -> list[str]:
    fits = _FITTING.get(command, lambda _: True)
    backups = [backup for backup in every(kubectl) if fits(backup) and backup.name not in before]
    return [f"{backup.name}\t{_about(backup)}" for backup in backups]


def _about(backup: BackupResource) -> str:
    return printable(f"{backup.phase}, {backup.spec.get('domain')} on {backup.node}")


def _or_nothing(look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except PluginError:
        return []
