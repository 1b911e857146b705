"""`vmbackup top`: what agents do at this moment, from their /metrics.

It judges with the alerts' thresholds, but by one look: no waiting time, no trend of free space.
"""

from __future__ import annotations

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

ALL_WELL, LOOK, NO_ANSWER = 0, 1, 2  # exit codes

_WIDE = 200  # columns where there is no terminal
_ANSWER_SECONDS = 5.0
_HOUR = 3600.0
_LATE = 300.0  # seconds that a status may wait for the API server
_COLUMNS = ("NODE", "DOMAIN", "PHASE", "DONE", "RATE", "OVERLAY", "FREE", "FOR", "LAST BACKUP", "")


@dataclass(frozen=True)
class TopSettings:
    """The flags of `vmbackup top`. `interval`: seconds."""

    url: tuple[str, ...]
    interval: float
    once: bool


@dataclass
class Guest:
    """What an agent tells of one domain: its samples by name, those of its disks added up or the worst of them."""

    domain: str
    phase: str = ""
    reason: str = ""
    samples: dict[str, float] = field(default_factory=dict[str, float])

    def get(self, name: str) -> float:
        """The value of a sample of it, 0 if there is none."""
        return self.samples.get(f"vmbackup_{name}", 0.0)

    @property
    def moved(self) -> float:
        """Bytes that its running backup has copied and merged."""
        return self.get("backup_copied_bytes") + self.get("backup_merged_bytes")


@dataclass(frozen=True)
class Look:
    """What one agent said at a moment (seconds since the epoch), or why it said nothing."""

    node: str
    at: float
    guests: Mapping[str, Guest] = field(default_factory=dict[str, Guest])
    orphans: float = 0.0
    lag: float = 0.0
    version: str = ""
    error: str = ""


def top(settings: TopSettings) -> int:
    """Show it, once or until Ctrl-C; the exit code."""
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
    """What /metrics of an agent says. Raises ValueError where that is not what Prometheus reads."""
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
    """What an alert would say of a guest, the worst first."""
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
    return [words for words, so in found.items() if so]


def render(looks: Iterable[Look], before: Iterable[Look] = ()) -> RenderableType:
    """A table of guests, the ones in trouble first, and a line for each agent. `before`: the look before this one."""
    earlier = {look.node: look for look in before}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _COLUMNS[3:8] else "left", no_wrap=column != "")
    guests = [(look, guest) for look in looks for guest in look.guests.values()]
    for look, guest in sorted(guests, key=lambda pair: _order(*pair)):
        table.add_row(*_row(look, guest, earlier.get(look.node)))
    lines = [Text.assemble(("vmbackup top  ", "bold"), (time.strftime("%H:%M:%S"), "dim")), Text(), table]
    if not guests:
        lines.append(Text("no domain is being backed up, or was", style="dim"))
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
    """Of the agent with our environment, its very certificate, whatever name that is for; None: as everywhere."""
    if not (certificate := flags.own_certificate()) or url != flags.own_metrics():
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # it is asked by the address of its pod, which no certificate names
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # who has signed it need not be known here
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
