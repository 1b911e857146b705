"""What must be true when a backup and all that happened to it are over. Each returns how many statements it proved."""

from __future__ import annotations

import fcntl
import json
import re
import time
from pathlib import Path
from typing import Any

from sandbox.oracle import Bounds, ProofError
from tests.chaos.soak.guests import Subject
from tests.support.proof import copies, not_on_base, sources_in, sources_on_disk, wrong_digests
from vmbackup.errors import VMBackupError
from vmbackup.protocol.record import Freeze, Guard
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.state.journal import records

_RUN_SECONDS = 10.0  # libvirt may show an event of QEMU late on a busy machine
_WRITE_SECONDS = 60.0  # a Linux boots meanwhile
_EDIT_SECONDS = 0.1
_NO_BACKING = re.compile(r"\s*<backingStore/>")
_BACKING = re.compile(r"\s*<backingStore.*</backingStore>", re.DOTALL)  # of one disk at most
_DESCRIPTION = re.compile(r"\s*<description>(.*?)</description>")


def is_home(subject: Subject) -> bool:
    """Whether live XML and persistent XML, also on disk, name the base of each disk, and no overlay is left."""
    return not _away_from_home(subject)


def _away_from_home(subject: Subject) -> list[str]:
    ask = subject.host.patiently
    try:
        live, persistent = ask(subject.guest.live_xml), ask(subject.guest.persistent_xml)
    except VMBackupError as error:
        return [str(error)]
    left = [f"{path} is left" for path in subject.overlays]
    named = {
        "live XML": sources_in(live),
        "persistent XML": sources_in(persistent),
        "XML on disk": sources_on_disk(subject.host.libvirtd, subject.name),
    }
    return [*left, *not_on_base(named, {target: str(base) for target, base in subject.bases.items()})]


def prove_guest(subject: Subject) -> int:
    """It runs and goes on writing, its disks are home, hold all that it has acknowledged, and are sound."""
    _wait_until_it_runs(subject)
    if wrong := _away_from_home(subject):
        raise ProofError(f"not home: {'; '.join(wrong)}")
    subject.assert_only_rising()
    before = subject.acknowledged()
    subject.host.virsh("suspend", subject.name)
    try:
        acknowledged = subject.acknowledged()
        subject.prove(subject.bases, acknowledged, subject.at_most())
    finally:
        subject.host.virsh("resume", subject.name)
    _wait_until_it_writes(subject, before)
    return 6 + len(subject.bases)


def _wait_until_it_runs(subject: Subject) -> None:
    deadline = time.monotonic() + _RUN_SECONDS
    while (state := subject.host.state(subject.guest)) is not Power.RUNNING:
        if time.monotonic() > deadline:
            guards = [(record.guard, record.freeze) for record in records(subject.state_dir)]
            why = subject.host.virsh("domstate", "--reason", subject.name)
            raise ProofError(f"the guest is {state} ({why}); guards in the journals: {guards}")
        time.sleep(0.1)


def _wait_until_it_writes(subject: Subject, before: dict[str, int]) -> None:
    deadline = time.monotonic() + _WRITE_SECONDS
    while any(number <= before[target] for target, number in subject.acknowledged().items()):
        if time.monotonic() > deadline:
            raise ProofError(f"the guest runs, but has written nothing for {_WRITE_SECONDS:.0f} s")
        time.sleep(0.1)


def prove_tidy(subject: Subject, marks: Path) -> int:
    """No journal holds the guest, no lock is left; the persistent XML and the limits of the disks are the user's."""
    for record in records(subject.state_dir):
        if record.guard is not Guard.NONE or record.freeze in (Freeze.FROZEN, Freeze.THAW_DUE) or record.call:
            raise ProofError(f"the journal of {record.uid} still works on the domain: {record}")
    if held := [path for path in (subject.directory / "locks").glob("*") if _is_held(path)]:
        raise ProofError(f"locks are held: {held}")
    xml = subject.host.patiently(subject.guest.persistent_xml) or ""
    description = described(xml)
    if description != subject.description and not _may_be_lost(subject, marks):
        raise ProofError(f"the description is {description!r}, and should be {subject.description!r}")
    subject.description = description
    rest = _DESCRIPTION.sub("", xml)
    if _without_backing(rest) != _without_backing(subject.defined):
        raise ProofError(f"the persistent XML is not the user's any more:\n{rest}\n-- it was\n{subject.defined}")
    for target in subject.bases:
        limits = subject.host.patiently(lambda target=target: subject.guest.byte_limits(target))
        if limits != subject.limits:
            raise ProofError(f"{target} is limited to {limits}, and should be to {subject.limits}")
    return 4 + len(subject.bases)


def described(xml: str | None) -> str:
    """The description in a definition."""
    return found[1] if xml and (found := _DESCRIPTION.search(xml)) else ""


def _without_backing(xml: str) -> str:
    """Without the images below: where the journal was lost, they are in the definition that the live XML gives."""
    return _BACKING.sub("", _NO_BACKING.sub("", xml))


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _may_be_lost(subject: Subject, marks: Path) -> bool:
    """Whether the user's last edit fell into a redefinition of ours, which no agent can close (docs/protocol.md)."""
    begun, ended = subject.edited
    at = [mark["at"] for mark in _marks(marks) if "at" in mark]
    return any(begun - _EDIT_SECONDS < when < ended + _EDIT_SECONDS for when in at)


def _marks(marks: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in marks.read_text().splitlines()] if marks.exists() else []


def bounds_of(marks: Path, subject: Subject, uid: str, *, certain: bool) -> Bounds:
    """What the snapshot of this backup may hold. `certain`: no call was carried out after its time was noted."""
    mine = [mark for mark in _marks(marks) if mark["uid"] == uid and "bytes" in mark]
    begun = [mark["bytes"] for mark in mine if mark["when"] == "before"]
    taken = [mark["bytes"] for mark in mine if mark["when"] == "after"]
    if not begun:
        return Bounds({})
    at_most: dict[str, int] = {}
    if certain and len(begun) == len(taken) == 1:
        at_most = subject.at_most(taken[0])
    return Bounds(subject.acknowledged(begun[0]), at_most)


def prove_copy(subject: Subject, uid: str, bounds: Bounds) -> int:
    """If it was published: it restores to exactly what the guest had written at its snapshot, all disks alike."""
    folder = subject.store / "soak" / f"backup.{uid}"
    if not folder.exists():
        return 0
    if not bounds.at_least:
        raise ProofError(f"{folder} was published, yet its snapshot was never taken")
    if wrong := list(wrong_digests(folder)):
        raise ProofError("; ".join(wrong))
    subject.prove(copies(folder), bounds.at_least, bounds.at_most)
    return 3 * len(copies(folder)) + 1


def prove_deleted(subject: Subject, uid: str, *, data_too: bool) -> int:
    """A deleted backup leaves no journal, and its data only where that is wanted."""
    if left := [path for path in subject.state_dir.glob(f"{uid}*") if path.suffix != ".garbled"]:
        raise ProofError(f"deleted, but it left {left}")
    if data_too and (left := list((subject.store / "soak").glob(f"*{uid}*"))):
        raise ProofError(f"deleted with its data, but it left {left}")
    return 2
