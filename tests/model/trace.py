"""A violation as a readable trace: one line per step with its actor, then the final state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import wrap

from tests.model.world import Disk, Setting, World, needed
from vmbackup.protocol.terms import Action

AGENT = "agent: "  # does something at once; or it decides, asks libvirt, and is told the outcome
DECIDES, ASKS, TOLD = "agent decides: ", "agent asks libvirt: ", "agent is told: "
_SETTLES = "redefine, sync"
_BY_ITSELF = ("libvirt", "QEMU")
_IMAGE = {"B": "base", "O": "overlay", "-": "nothing", "X": "an image above", "Y": "another image"}


def trace(setting: Setting, what: str, labels: Sequence[str], end: World, action: Action) -> str:
    """The trace of one violation."""
    lines = [line for n, text in enumerate(_folded(_shortened(labels)), 1) for line in _wrapped(f"{n:5}. {text}")]
    return "\n".join([f"  {what}  [{setting}]", *lines, *_state(end, action)])


def _shortened(labels: Sequence[str]) -> Iterator[str]:
    """Without decisions that are followed by their act; a call that nothing interrupts in one line."""
    n = 0
    while n < len(labels):
        label = labels[n]
        n += 1
        if label.startswith(DECIDES) and n < len(labels):
            continue
        if label.startswith(ASKS):
            after = n
            while after < len(labels) and labels[after].startswith(_BY_ITSELF) and "FAILS" not in labels[after]:
                after += 1
            if after < len(labels) and labels[after].startswith(TOLD):
                yield AGENT + labels[after].removeprefix(TOLD).removesuffix(": ok")
                n = after + 1
                continue
        yield label


def _folded(lines: Iterable[str]) -> Iterator[str]:
    """What the agent does without anything coming between, in one line."""
    for ours, run in groupby(lines, key=lambda line: line.startswith(AGENT)):
        if ours:
            yield AGENT + ", ".join(line.removeprefix(AGENT) for line in run).replace(_SETTLES, "settle P")
        else:
            yield from run


def _wrapped(line: str) -> list[str]:
    return wrap(line, width=118, subsequent_indent=" " * 7)


def _state(world: World, action: Action) -> Iterator[str]:
    record = world.record.it
    said = [f"snapshot {record.snapshot}", f"guard {record.guard}", f"copy {record.copy}"]
    said += ["quarantined"] * bool(record.quarantined) + ["orphan"] * record.orphan
    said += [f"pivot of {d.target} intended" for d in record.disks if d.pivot_intended]
    yield f"   => guest {world.guest}; journal: {', '.join(said)}; the agent would decide: {action.do}"
    for name, disk in zip("abcd", world.disks, strict=False):
        yield f"      disk {name}: {_disk(disk)}"


def _disk(disk: Disk) -> str:
    file = "is gone" if disk.overlay is None else "holds data that base lacks" if needed(disk) else "holds nothing new"
    return (
        f"QEMU writes {_IMAGE[disk.writes]}, L={_IMAGE[disk.live]}, P={_IMAGE[disk.persistent]} "
        f"(durable: {_IMAGE[disk.durable]}); the overlay {file}"
    )
