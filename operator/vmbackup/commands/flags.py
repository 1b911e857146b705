"""Flags that can be given as environment variables too, and what their values may be."""

from __future__ import annotations

import os
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmbackup.api.names import OBJECT_NAME

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Flag:
    """One flag. `kind` makes its value of text, raising ValueError with the cure; `default` is such a text, or None.

    `default_says` is shown as the default where that is not a fixed text. A `switch` may be given without a value. Of
    one that `gathers`, whose kind makes tuples, each use adds to those before.
    """

    name: str
    help: str
    kind: Callable[[str], object] = str
    default: str | None = None
    metavar: str = ""
    short: str = ""
    required: bool = False
    switch: bool = False
    gathers: bool = False
    default_says: str = ""

    @property
    def variable(self) -> str:
        """The environment variable of the same meaning; the flag comes first. Empty counts as not set."""
        return "VMBACKUP_" + self.name.removeprefix("--").upper().replace("-", "_")

    def add_to(self, parser: ArgumentParser) -> None:
        """Let `parser` know this flag."""
        from_environment = os.environ.get(self.variable)
        default = _FromEnvironment(from_environment) if from_environment else self.default
        says = self.default_says or self.default
        note = f"{self.variable}; default: {says}" if says else self.variable
        parser.add_argument(
            *filter(None, (self.short, self.name)),
            help=f"{self.help} [{note}]".replace("%", "%%"),
            type=self._value,
            default=default,
            metavar=self.metavar or None,
            required=self.required and default is None,
            action=_Gather if self.gathers else "store",
            nargs="?" if self.switch else None,
            const=True if self.switch else None,
        )

    def _value(self, text: str) -> object:
        """Argparse calls this for a default that is a text too, unless the flag is given."""
        try:
            return self.kind(text)
        except ValueError as error:
            origin = f"{self.variable} is {text!r}" if isinstance(text, _FromEnvironment) else repr(text)
            raise ArgumentTypeError(f"{origin}: {error}") from None


class _Gather(Action):
    """Adds to what was given before, but takes the place of the default."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Argparse calls this for each use; the default is still a text then."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (given if isinstance(given, tuple) else ()) + values)


class _FromEnvironment(str):
    """A text that stands in an environment variable."""


def path(text: str) -> Path:
    """A path, absolute from here on."""
    return Path(text).expanduser().absolute()


def urls(text: str) -> tuple[str, ...]:
    """URLs, with commas or blanks between them."""
    found = tuple(text.replace(",", " ").split())
    if not found or not all(url.startswith(("http://", "https://")) for url in found):
        raise ValueError("give a URL such as http://127.0.0.1:9777/metrics")
    return found


def own_metrics() -> str:
    """Where an agent with this environment serves /metrics, as in the pod of one: so `top` needs no flag there."""
    host = os.environ.get("VMBACKUP_METRICS_HOST") or "127.0.0.1"
    port = os.environ.get("VMBACKUP_METRICS_PORT") or "9777"
    scheme = "https" if own_certificate() else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/metrics"


def own_certificate() -> str:
    """The certificate file by which it does so; nothing where that is without TLS."""
    return os.environ.get("VMBACKUP_METRICS_TLS_CERT", "")


def paths(text: str) -> tuple[Path, ...]:
    """Paths, one after the other with ':' between them."""
    return tuple(path(each) for each in text.split(":") if each)


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError("give a port from 1 to 65535")
    return int(text)


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("give a whole number, 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise ValueError("give seconds above 0, a day at most")
    return value


def boolean(text: str) -> bool:
    """True or false."""
    if text.lower() not in ("true", "false"):
        raise ValueError("give true or false")
    return text.lower() == "true"


def one_of(*choices: str) -> Callable[[str], str]:
    """One of these words."""

    def choose(text: str) -> str:
        if text not in choices:
            raise ValueError(f"give one of {', '.join(choices)}")
        return text

    return choose


def node_name(text: str) -> str:
    """The name of a node, as spec.nodeName has it."""
    if OBJECT_NAME.fullmatch(text) is None:
        raise ValueError("give lower-case letters, digits, '-' and '.', as spec.nodeName has it")
    return text
