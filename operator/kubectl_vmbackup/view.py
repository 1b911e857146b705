"""Text from VMBackups. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from kubectl_vmbackup import advice
from kubectl_vmbackup.kubectl import Object, group
from vmbackup.api.resource import BackupResource, moment

_CONDITIONS = ("Ready", "BackupComplete", "ChainClean")
_MOST_EVENTS = 12
_QUIESCED = {"True": ", file systems frozen", "False": ", crash-consistent"}


def table(backups: Sequence[BackupResource], now: datetime, *, namespaces: bool) -> str:
    """A line for each; below them those that need somebody to act."""
    head = ["NAME", "DOMAIN", "NODE", "PHASE", "PROGRESS", "READY", "REASON", "CHAIN", "AGE"]
    rows = [_row(backup, now) for backup in backups]
    if namespaces:
        head.insert(0, "NAMESPACE")
        for backup, row in zip(backups, rows, strict=True):
            row.insert(0, backup.namespace)
    steps = [(backup, advice.next_step(backup, now)) for backup in backups]
    notes = [
        f"{backup.namespace}/{backup.name}: {backup.message}\n  next: {step.text}"
        for backup, step in steps
        if step.human
    ]
    return "\n\n".join([columns([head, *rows]), *map(printable, notes)])


def _row(backup: BackupResource, now: datetime) -> list[str]:
    status, metadata = backup.status, backup.metadata
    made = moment(metadata.get("creationTimestamp"))
    return [
        backup.name,
        str(backup.spec.get("domain", "")),
        backup.node,
        "Terminating" if backup.terminating else backup.phase,
        str(group(status, "progress").get("summary", "")),
        str(backup.condition("Ready").get("status", "")),
        backup.reason,
        "on overlay" if backup.left_on_overlay else "home" if backup.is_true("ChainClean") else "",
        advice.span(now - made) if made else "",
    ]


def details(backup: BackupResource, events: Sequence[Object], now: datetime) -> str:
    """One VMBackup in full."""
    parts = [_head(backup, now), _conditions(backup), _disks(backup), _events(events, now)]
    parts.append(f"Next: {advice.next_step(backup, now).text}.")
    return "\n\n".join(printable(part) for part in parts if part)


def outcome(backup: BackupResource) -> str:
    """Its state in one line."""
    return printable(f"{backup.name}: {backup.phase}, {backup.reason}: {backup.message}")


def _head(backup: BackupResource, now: datetime) -> str:
    status, spec = backup.status, backup.spec
    uuid = status.get("domainUUID")
    location = status.get("location")
    store = str(group(spec, "storeRef").get("name", ""))
    rows = [
        ["Backup", f"{backup.namespace}/{backup.name}" + (", being deleted" if backup.terminating else "")],
        ["Domain", f"{spec.get('domain', '')} on {backup.node}" + (f" ({uuid})" if uuid else "")],
        ["Store", store + (f": {location}" if location else "")],
        ["Phase", ", ".join(filter(None, (backup.phase, _progress(backup))))],
        ["Time", _times(backup, now)],
        ["Message", backup.message],
    ]
    return columns([row for row in rows if row[1]])


def _progress(backup: BackupResource) -> str:
    progress = group(backup.status, "progress")
    if not progress:
        return ""
    copied, total = int(progress.get("copiedBytes", 0)), int(progress.get("totalBytes", 0))
    merged = int(progress.get("mergedBytes", 0))
    words = [str(progress.get("summary", "")), f"{size(copied)} of {size(total)} copied" if total else ""]
    words.append(f"{size(merged)} merged back" if merged else "")
    return ", ".join(filter(None, words))


def _times(backup: BackupResource, now: datetime) -> str:
    status = backup.status
    words: list[str] = []
    if taken := moment(status.get("snapshotTime")):
        how = _QUIESCED.get(str(status.get("quiesced")), "")
        words.append(f"snapshot {taken:%Y-%m-%d %H:%M:%S} UTC{how}")
    started, ended = moment(status.get("startTime")), moment(status.get("completionTime"))
    if started and ended:
        words.append(f"took {advice.span(ended - started)}, ended {advice.span(now - ended)} ago")
    elif started:
        words.append(f"running for {advice.span(now - started)}")
    return "; ".join(words)


def _conditions(backup: BackupResource) -> str:
    rows = [["CONDITION", "STATUS", "REASON", "MESSAGE"]]
    for kind in _CONDITIONS:
        if found := backup.condition(kind):
            rows.append([kind, *(str(found.get(field, "")) for field in ("status", "reason", "message"))])
    return columns(rows) if len(rows) > 1 else ""


def _disks(backup: BackupResource) -> str:
    rows = [["DISK", "STATE", "FORMAT", "COPIED", "MERGED", "TRIES", "IMAGE IN USE, AND ERROR"]]
    for disk in backup.disks:
        total = int(disk.get("totalBytes", 0))
        copied = f"{size(int(disk.get('copiedBytes', 0)))} of {size(total)}" if total else ""
        merged, tries = int(disk.get("mergedBytes", 0)), int(disk.get("attempts", 0))
        image = disk.get("overlay") or disk.get("base") or ""
        wrong = disk.get("lastError") or disk.get("message") or ""
        rows.append([
            *(str(disk.get(field, "")) for field in ("target", "state", "format")),
            copied,
            size(merged) if merged else "",
            str(tries) if tries else "",
            ": ".join(filter(None, (str(image), str(wrong)))),
        ])  # fmt: skip
    return columns(rows) if len(rows) > 1 else ""


def _events(events: Sequence[Object], now: datetime) -> str:
    dated = [(when, event) for event in events if (when := _when(event))]
    dated.sort(key=lambda pair: pair[0])
    rows = [["AGO", "EVENT", "MESSAGE"]]
    for when, event in dated[-_MOST_EVENTS:]:
        reason = str(event.get("reason", "")) + (" (!)" if event.get("type") == "Warning" else "")
        message = str(event.get("message") or event.get("note") or "")
        rows.append([advice.span(now - when), reason, message])
    return columns(rows) if len(rows) > 1 else ""


def _when(event: Object) -> datetime | None:
    series = group(event, "series")
    last = series.get("lastObservedTime") or event.get("lastTimestamp")
    return moment(last or event.get("eventTime") or group(event, "metadata").get("creationTimestamp"))


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, without trailing spaces."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def printable(text: str) -> str:
    """The text without control characters for the terminal: users choose the names of domains and paths."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def size(count: int) -> str:
    """Bytes, for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
