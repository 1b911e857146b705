"""Flags, each of which has an environment variable too, and the values that they accept."""

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
    """One flag. `kind` parses its text, raising ValueError with the cure; `default` is such a text, or None.

    `default_says` is shown as the default where the default is not a fixed text. The value of a `switch` may be left
    out. A flag that `gathers` may be repeated: its kind returns tuples, which are joined.
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
        """The environment variable of the same meaning. The flag takes precedence. Empty counts as not set."""
        return "VMBACKUP_" + self.name.removeprefix("--").upper().replace("-", "_")

    def add_to(self, parser: ArgumentParser) -> None:
        """Add this flag to `parser`."""
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
        """Argparse calls this for a value, and also for a default that is a text unless the flag is set."""
        try:
            return self.kind(text)
        except ValueError as error:
            origin = f"{self.variable} is {text!r}" if isinstance(text, _FromEnvironment) else repr(text)
            raise ArgumentTypeError(f"{origin}: {error}") from None


class _Gather(Action):
    """Adds to the values set before, but replaces the default."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Argparse calls this for each use of the flag; at the first one the default is still a text."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, (given if isinstance(given, tuple) else ()) + values)


class _FromEnvironment(str):
    """The text of an environment variable."""


def path(text: str) -> Path:
    """An absolute path."""
    return Path(text).expanduser().absolute()


def urls(text: str) -> tuple[str, ...]:
    """URLs, separated by commas or blanks."""
    found = tuple(text.replace(",", " ").split())
    if not found or not all(url.startswith(("http://", "https://")) for url in found):
        raise ValueError("must be a URL such as http://127.0.0.1:9777/metrics")
    return found


def own_metrics() -> str:
    """The URL at which an agent with this environment serves /metrics. In the pod of an agent, `top` needs no flag."""
    host = os.environ.get("VMBACKUP_METRICS_HOST") or "127.0.0.1"
    port = os.environ.get("VMBACKUP_METRICS_PORT") or "9777"
    scheme = "https" if own_certificate() else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/metrics"


def own_certificate() -> str:
    """The certificate file that the agent with this environment serves /metrics with; empty without TLS."""
    return os.environ.get("VMBACKUP_METRICS_TLS_CERT", "")


def paths(text: str) -> tuple[Path, ...]:
    """Paths, separated by ':'."""
    return tuple(path(each) for each in text.split(":") if each)


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise ValueError("must be a port from 1 to 65535")
    return int(text)


def at_least_one(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number, 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """A duration in seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86400:
        raise ValueError("must be a number of seconds above 0, at most 86400 (a day)")
    return value


def boolean(text: str) -> bool:
    """True or false."""
    if text.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return text.lower() == "true"


def one_of(*choices: str) -> Callable[[str], str]:
    """One of these words."""

    def choose(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return choose


def node_name(text: str) -> str:
    """The name of a node, in the form of spec.nodeName."""
    if OBJECT_NAME.fullmatch(text) is None:
        raise ValueError("must be made of lower-case letters, digits, '-' and '.', like spec.nodeName")
    return text


def no_libvirtd(uri: str) -> str:
    """What to tell somebody whose --libvirt-uri does not answer."""
    return f"no libvirtd answers at {uri}: start it, or set --libvirt-uri"


HYPERVISOR = (
    Flag("--libvirt-uri", "the libvirtd to connect to", default="qemu:///system", metavar="URI"),
    Flag(
        "--libvirt-config-dir",
        "libvirt's configuration directory, used to verify that definitions reached the disk",
        path,
        metavar="DIR",
        default_says="that of the URI, /etc/libvirt/qemu for the system's",
    ),
    Flag(
        "--state-dir",
        "directory for backup journals; must survive reboots",
        path,
        default="/var/lib/vmbackup/state",
        metavar="DIR",
    ),
    Flag(
        "--overlay-dir",
        "directory for overlays, which take the guest's writes during a backup; required for disks that are block "
        "devices",
        path,
        metavar="DIR",
        default_says="beside each disk's image",
    ),
    Flag(
        "--image-roots",
        "only back up disks whose images and backing images are below these directories (links are resolved)",
        paths,
        metavar="DIR[:DIR]",
        default_says="any image that the domain's XML names",
    ),
)
"""The flags of every command that works on the guests of this hypervisor."""
