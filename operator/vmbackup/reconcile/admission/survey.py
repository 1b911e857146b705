"""`vmbackup check`: what a backup of each domain would do and what prevents it, by the rules of plan.py."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from vmbackup.errors import Cause, PermanentError, RefusedError, VMBackupError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.imaging.sizes import allocated_bytes
from vmbackup.protocol.record import DiskRecord, Record
from vmbackup.protocol.terms import Power
from vmbackup.reconcile.admission.overlay_space import with_room
from vmbackup.reconcile.admission.plan import ImageUse, Planner, choose, image_uses, not_running, source_of
from vmbackup.reconcile.leftovers.reader import read_leftovers
from vmbackup.stores.base import Writes

_NO_UID = "00000000"


class Verdict(StrEnum):
    """What a backup of all disks would do with one of them."""

    BACKED_UP = "BackedUp"
    LEFT_OUT = "LeftOut"
    REFUSED = "Refused"
    ON_OVERLAY = "OnOverlay"  # of an earlier backup; it is merged first


@dataclass(frozen=True)
class Refusal:
    """Why a backup would be refused. The message names the cure."""

    reason: str
    message: str


@dataclass(frozen=True)
class DiskSurvey:
    """One disk. `message` says why it is left out or refused, or is a remark."""

    target: str
    image: str
    format: str
    verdict: Verdict
    message: str = ""
    reason: str = ""  # of a refusal


@dataclass(frozen=True)
class DomainSurvey:
    """One domain. `guest_agent` is the state of its channel, None without one. `notes` are remarks."""

    name: str
    uuid: str
    state: Power
    persistent: bool
    guest_agent: str | None
    disks: tuple[DiskSurvey, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]


def survey(planner: Planner, guests: Iterable[Guest], records: Sequence[Record]) -> Iterator[DomainSurvey]:
    """Inspect these domains; changes nothing. `records`: of all backups that have a journal here."""
    uses = image_uses(planner.hypervisor.guests())
    for guest in guests:
        mine = [record for record in records if record.domain_uuid == guest.uuid]
        try:
            yield _survey(planner, guest, mine, uses)
        except PermanentError as error:
            if error.reason != Cause.DOMAIN_NOT_FOUND:  # it was removed meanwhile
                raise


def _survey(planner: Planner, guest: Guest, records: Sequence[Record], uses: Sequence[ImageUse]) -> DomainSurvey:
    state, _ = guest.state()
    leftovers = read_leftovers(guest)
    live, persistent = leftovers.live, leftovers.persistent
    found = chain.disks(live or persistent or "<domain/>")
    agent = chain.guest_agent(live) if live else None
    domain_refusals: list[Refusal] = []
    left: dict[str, str] = {}
    try:
        left = {disk.target: disk.overlay for disk in leftovers.disks(records)}
        choose(found, ())
        _refuse_state(guest, state)
    except VMBackupError as error:
        domain_refusals.append(Refusal(error.reason, str(error)))
    admitted: list[DiskRecord] = []
    disks = [_disk(disk, left.get(disk.target), planner, guest, uses, admitted) for disk in found]
    try:
        with_room(admitted, {disk.target: _copied_whole(disk) for disk in admitted})
    except VMBackupError as error:
        domain_refusals.append(Refusal(error.reason, str(error)))
    return DomainSurvey(
        name=guest.name,
        uuid=guest.uuid,
        state=state,
        persistent=persistent is not None,
        guest_agent=agent,
        disks=tuple(disks),
        refusals=(*domain_refusals, *(Refusal(d.reason, d.message) for d in disks if d.verdict is Verdict.REFUSED)),
        notes=(
            *_overlay_notes(left, records),
            *_stray_notes(found, left, planner.overlay_dir),
            *_job_notes(found),
            *_config_notes(guest, persistent, planner),
            *_agent_notes(state, agent),
        ),
    )


def _refuse_state(guest: Guest, state: Power) -> None:
    if state is Power.OFF:
        raise not_running(guest.name)
    if state is Power.IO_ERROR:
        raise RefusedError("the guest is paused by an I/O error: fix its disk and resume it first", reason="IOError")


def _disk(
    disk: chain.Disk,
    overlay: str | None,
    planner: Planner,
    guest: Guest,
    uses: Sequence[ImageUse],
    admitted: list[DiskRecord],
) -> DiskSurvey:
    looked_at = DiskSurvey(disk.target, disk.source or "", disk.format, Verdict.BACKED_UP)
    if overlay is not None:
        message = "" if overlay == disk.source else f"its overlay {overlay} is left behind"
        return replace(looked_at, verdict=Verdict.ON_OVERLAY, message=message)
    if why := chain.ineligible(disk):
        return replace(looked_at, verdict=Verdict.LEFT_OUT, message=why)
    try:
        (record,) = planner.admit(guest, [disk], _NO_UID, uses)
    except VMBackupError as error:
        return replace(looked_at, verdict=Verdict.REFUSED, message=str(error), reason=error.reason)
    admitted.append(record)
    if not record.backing:
        return looked_at
    return replace(looked_at, message=f"with its {len(record.backing)} backing images")


def _copied_whole(disk: DiskRecord) -> Writes:
    """The bytes for a store that cannot clone: which store it will be is unknown here."""
    return Writes(sum(allocated_bytes(Path(image.path)) for image in source_of(disk).chain))


def _overlay_notes(left: Mapping[str, str], records: Sequence[Record]) -> Iterator[str]:
    """The backups of these overlays, and how they are merged."""
    for record in records:
        targets = [disk.target for disk in record.disks if left.get(disk.target) == disk.overlay]
        if not targets:
            continue
        cure = "its next retry, or the next backup of this domain, merges them"
        if not record.finished:
            cure = "it is still running, or continues when it is run again"
        yield f"{', '.join(targets)}: overlays of the backup {record.full_name}: {cure}"
    known = {disk.overlay for record in records for disk in record.disks}
    if unknown := [target for target, overlay in left.items() if overlay not in known]:
        yield f"{', '.join(unknown)}: overlays without a journal on this host: the next backup merges them first"


def _stray_notes(disks: Iterable[chain.Disk], left: Mapping[str, str], overlay_dir: Path | None) -> Iterator[str]:
    """Overlay files that no disk uses and no journal knows."""
    for disk in disks:
        if disk.kind != "file" or not disk.source or disk.target in left:
            continue
        base = Path(disk.source)
        pattern = f"{glob.escape(base.stem)}.vmb-????????-{disk.target}.qcow2"
        for stray in sorted((overlay_dir or base.parent).glob(pattern)):
            like = f"{disk.target}: {stray} is named like one of vmbackup's overlays"
            yield f"{like}, but nothing uses it: find out what it is"


def _job_notes(disks: Iterable[chain.Disk]) -> Iterator[str]:
    for disk in disks:
        if disk.foreign_job:
            yield f"{disk.target}: another block job is running on it: a backup waits until it ends"


def _config_notes(guest: Guest, persistent: str | None, planner: Planner) -> Iterator[str]:
    """Gaps in the protection against a power cut while disks change their images."""
    if persistent is None:
        yield (
            "transient: a power cut during a backup is not covered, and if the domain stops meanwhile, its "
            "overlay is quarantined"
        )
    elif not os.access(file := planner.hypervisor.config_dir / f"{guest.name}.xml", os.R_OK):
        yield (
            f"{file} cannot be read, so the agent cannot verify that a power cut during a backup leaves the right "
            "image in the definition: set --libvirt-config-dir, or grant the permission"
        )


def _agent_notes(state: Power, agent: str | None) -> Iterator[str]:
    if state is Power.OFF or agent == "connected":
        return
    why = "no guest agent channel" if agent is None else "its guest agent is not connected"
    yield f"{why}: the snapshot will be crash-consistent; quiesce: Require would be refused"
