"""`vmbackup top`: shows what the agents are doing now, from their /metrics.

It uses the thresholds of the alerts, but judges a single sample: no waiting time, no trend of free space.
"""

from __future__ import annotations

import argparse
import ssl
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vmbackup.api.status import GUEST_AWAY
from vmbackup.commands import flags
from vmbackup.commands.amounts import size, span
from vmbackup.commands.flags import Flag
from vmbackup.commands.verb import Verb, settings_of

ALL_WELL, LOOK, NO_ANSWER = 0, 1, 2  # exit codes

FLAGS = (
    Flag(
        "--url",
        "the /metrics URL of an agent; repeat the flag, or separate several URLs with commas",
        flags.urls,
        default=flags.own_metrics(),
        metavar="URL",
        gathers=True,
        default_says="that of the agent with this environment, http://127.0.0.1:9777/metrics",
    ),
    Flag("--interval", "time between two refreshes", flags.seconds, default="2", metavar="SECONDS"),
    Flag(
        "--once",
        "print the table once and exit; the default when the output is not a terminal",
        flags.boolean,
        default="false",
        metavar="BOOL",
        switch=True,
    ),
)

_EXAMPLES = """\
examples:
  vmbackup top                                             # the agent of this host
  vmbackup top --url http://hv-01:9777/metrics --url http://hv-02:9777/metrics
  kubectl -n vmbackup-system exec ds/vmbackup-agent -- vmbackup top --once
"""
_EXIT_CODES = """\
exit codes with --once:
  0    no problems
  1    a guest or an agent has a problem: see the last column and the lines below the table
  2    usage error, or no agent answers

Without --once, Ctrl-C ends it, with exit code 0.
"""

_WIDE = 200  # columns without a terminal
_ANSWER_SECONDS = 5.0
_HOUR = 3600.0
_LATE = 300.0  # seconds: a status that waits longer for the API server is a problem
_COLUMNS = ("NODE", "DOMAIN", "PHASE", "DONE", "RATE", "OVERLAY", "FREE", "FOR", "LAST BACKUP", "")


@dataclass(frozen=True)
class TopSettings:
    """The flags of `vmbackup top`. `interval`: seconds."""

    url: tuple[str, ...]
    interval: float
    once: bool


@dataclass
class Guest:
    """One domain in the metrics of an agent: its samples by name; for its disks, the sum or the worst of them."""

    domain: str
    phase: str = ""
    reason: str = ""
    samples: dict[str, float] = field(default_factory=dict[str, float])

    def get(self, name: str) -> float:
        """The value of one of its samples, 0 if there is none."""
        return self.samples.get(f"vmbackup_{name}", 0.0)

    @property
    def moved(self) -> float:
        """Bytes that its running backup has copied and merged so far."""
        return self.get("backup_copied_bytes") + self.get("backup_merged_bytes")


@dataclass(frozen=True)
class Look:
    """The answer of one agent at a moment (`at`, seconds since the epoch), or the error."""

    node: str
    at: float
    guests: Mapping[str, Guest] = field(default_factory=dict[str, Guest])
    orphans: float = 0.0
    lag: float = 0.0
    version: str = ""
    error: str = ""


def top(settings: TopSettings) -> int:
    """Show the table once, or until Ctrl-C; the exit code."""
    console = Console(highlight=False)
    if settings.once or not console.is_terminal:
        looks = _look(settings.url)
        Console(width=None if console.is_terminal else _WIDE, highlight=False).print(render(looks))
        if all(look.error for look in looks):
            return NO_ANSWER
        return LOOK if any(_wrong(look) for look in looks) else ALL_WELL
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        before: Sequence[Look] = ()
        while True:
            looks = _look(settings.url)
            live.update(render(looks, before), refresh=True)
            before = looks
            time.sleep(settings.interval)
    return ALL_WELL


def read(text: str, node: str, at: float) -> Look:
    """Parse the /metrics of an agent. Raises ValueError if the text is not in the format of Prometheus."""
    guests: dict[str, Guest] = {}
    single: dict[str, float] = {}
    version = ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.labels.get("domain")
            if name is None:
                single[sample.name] = sample.value
                version = sample.labels.get("version", version)
                continue
            guest = guests.setdefault(name, Guest(name))
            if sample.name == "vmbackup_backup_state":
                guest.phase, guest.reason = sample.labels["phase"], sample.labels["reason"]
            known = guest.samples.get(sample.name)
            merge = {"vmbackup_overlay_bytes": sum, "vmbackup_overlay_free_bytes": min}.get(sample.name, max)
            guest.samples[sample.name] = sample.value if known is None else merge((known, sample.value))
    orphans, lag = single.get("vmbackup_orphan_overlays", 0.0), single.get("vmbackup_report_lag_seconds", 0.0)
    return Look(node, at, guests, orphans, lag, version)


def troubles(guest: Guest, now: float) -> list[str]:
    """The problems of a guest that an alert would report, the worst first."""
    suspended = guest.get("guest_suspended_seconds")
    idle, age, free = not guest.phase, guest.get("overlay_age_seconds"), guest.get("overlay_free_bytes")
    last, failed = guest.get("last_success_timestamp_seconds"), guest.get("last_failure_timestamp_seconds")
    progressed = now - guest.get("backup_last_progress_timestamp_seconds")
    found = {
        f"SUSPENDED for {span(suspended)}": suspended - guest.get("guest_suspended_limit_seconds") > 20,
        "QUARANTINED": guest.get("quarantined") > 0,
        "OVERLAY SPACE LOW": bool(age) and free < 512 << 20 and "vmbackup_overlay_free_bytes" in guest.samples,
        "LEFT ON OVERLAY": age > 6 * _HOUR or (idle and age > 600),
        "COMMIT NOT CONVERGING": guest.get("commit_stalled") > 0,
        f"NO PROGRESS for {span(progressed)}": not idle and guest.reason not in GUEST_AWAY and progressed > 1800,
        f"FAILED {span(now - failed)} ago": failed > 0,
        "NO RECENT BACKUP": 0 < last < now - 36 * _HOUR,
    }
    return [problem for problem, present in found.items() if present]


def render(looks: Iterable[Look], before: Iterable[Look] = ()) -> RenderableType:
    """A table of guests, those with problems first, and a line for each agent. `before`: the previous answers."""
    earlier = {look.node: look for look in before}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _COLUMNS[3:8] else "left", no_wrap=column != "")
    guests = [(look, guest) for look in looks for guest in look.guests.values()]
    for look, guest in sorted(guests, key=lambda pair: _order(*pair)):
        table.add_row(*_row(look, guest, earlier.get(look.node)))
    lines = [Text.assemble(("vmbackup top  ", "bold"), (time.strftime("%H:%M:%S"), "dim")), Text(), table]
    if not guests:
        lines.append(Text("no domain is being backed up or has been backed up", style="dim"))
    return Group(*lines, Text(), *(_agent(look) for look in looks))


def _look(urls: Sequence[str]) -> list[Look]:
    with ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(_ask, urls))


def _ask(url: str) -> Look:
    node, now = urlsplit(url).netloc, time.time()
    try:
        encrypted = urllib.request.HTTPSHandler(context=_trust(url))
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), encrypted)
        with direct.open(url, timeout=_ANSWER_SECONDS) as answer:
            return read(answer.read().decode(), node, now)
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        return Look(node, now, error=str(getattr(cause, "strerror", None) or cause))


def _trust(url: str) -> ssl.SSLContext | None:
    """For the agent with our environment, trust exactly its certificate, under any name. None: the usual trust."""
    if not (certificate := flags.own_certificate()) or url != flags.own_metrics():
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the URL has the IP of the pod, which no certificate names
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer need not be known here
    context.load_verify_locations(certificate)
    return context


def _wrong(look: Look) -> bool:
    agent = look.error or look.orphans or look.lag > _LATE
    return bool(agent) or any(troubles(guest, look.at) for guest in look.guests.values())


def _order(look: Look, guest: Guest) -> tuple[bool, bool, str, str]:
    return not troubles(guest, look.at), not guest.phase, look.node, guest.domain


def _row(look: Look, guest: Guest, before: Look | None) -> tuple[RenderableType, ...]:
    overlay, last = guest.get("overlay_age_seconds"), guest.get("last_success_timestamp_seconds")
    total, copied = guest.get("backup_total_bytes"), guest.get("backup_copied_bytes")
    earlier = before.guests.get(guest.domain) if before else None
    moved = guest.moved - earlier.moved if earlier and before and guest.phase else 0.0
    rate = f"{size(moved / (look.at - before.at))}/s" if before and moved > 0 else ""
    merging = guest.phase == "Committing"
    done = f"{size(guest.get('backup_merged_bytes'))} merged" if merging else f"{copied / total:.0%}" if total else ""
    reason = "" if guest.reason in ("", guest.phase) else f" {guest.reason}"
    return (
        look.node,
        Text(guest.domain, style="bold"),
        Text.assemble((guest.phase or "-", "yellow" if guest.phase else "dim"), (reason, "dim")),
        done,
        rate,
        size(guest.get("overlay_bytes")) if overlay else "",
        size(guest.get("overlay_free_bytes")) if overlay else "",
        span(overlay) if overlay else "",
        f"{span(look.at - last)} ago" if last else "none known",
        Text(", ".join(troubles(guest, look.at)), style="bold red"),
    )


def _agent(look: Look) -> Text:
    if look.error:
        return Text.assemble((f"{look.node}  ", ""), (f"does not answer: {look.error}", "bold red"))
    line = Text.assemble((f"{look.node}  ", ""), (f"vmbackup {look.version}", "dim"))
    if look.orphans:
        line.append(f"  {look.orphans:.0f} orphan overlays", "bold red")
    if look.lag > _LATE:
        line.append(f"  status not written for {span(look.lag)}", "bold red")
    return line


def _start(parsed: argparse.Namespace) -> int:
    return top(settings_of(TopSettings, parsed))


VERB = Verb(_start, FLAGS, _EXAMPLES, log_level="error", exit_codes=_EXIT_CODES)
