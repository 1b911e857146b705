"""What a command is made of. Each module of a command exports one `VERB`; cli.py has the table of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

from vmbackup.commands import flags
from vmbackup.commands.flags import Flag

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Argument:
    """An optional positional argument."""

    name: str
    help: str


@dataclass(frozen=True)
class Verb:
    """One command. `start` runs it and returns its exit code; `log_level` is the default of --log-level."""

    start: Callable[[argparse.Namespace], int]
    flags: Sequence[Flag]
    examples: str
    log_level: str
    exit_codes: str = ""
    arguments: Sequence[Argument] = ()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add its flags and arguments, examples and exit codes to `parser`."""
        levels = flags.one_of(*flags.LOG_LEVELS)
        metavar = "|".join(flags.LOG_LEVELS)
        log_flag = Flag("--log-level", "what to log on stderr", levels, default=self.log_level, metavar=metavar)
        for flag in (*self.flags, log_flag):
            flag.add_to(parser)
        for argument in self.arguments:
            parser.add_argument(argument.name.lower(), nargs="?", metavar=argument.name, help=argument.help)
        parser.epilog = "\n".join(filter(None, (self.examples, self.exit_codes)))


def settings_of(kind: type[Settings], parsed: argparse.Namespace) -> Settings:
    """The settings of a command. Its fields have the names of the flags."""
    names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: getattr(parsed, name) for name in names})
