"""One domain: the few libvirt calls that a backup needs, without any policy.

Every method may raise TransientError (observe again), PermanentError and, if it changes something, UnknownOutcomeError
(see errors.py). A guest remembers only its UUID and name: the chain is the truth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from xml.etree import ElementTree

import libvirt
import libvirt_qemu
from defusedxml.ElementTree import fromstring

from vmbackup.errors import TransientError
from vmbackup.hypervisor.chain import disks
from vmbackup.hypervisor.connection import Connection
from vmbackup.hypervisor.definition import sync_definition
from vmbackup.hypervisor.mark import KEY, URI, Mark
from vmbackup.protocol.terms import Power

Result = TypeVar("Result")

_SNAPSHOT_FLAGS = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
)
# Never DELETE: it unlinks the overlay before the configuration is saved (measured on 9.0).
_COMMIT_FLAGS = (
    libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
    | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
    | libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES
)
BYTE_LIMITS = tuple(
    f"{what}_bytes_sec{burst}" for what in ("total", "read", "write") for burst in ("", "_max", "_max_length")
)
_PERSISTENT_FLAGS = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE


_STATES = {
    libvirt.VIR_DOMAIN_SHUTOFF: Power.OFF,
    libvirt.VIR_DOMAIN_PAUSED: Power.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: Power.PAUSED,
    libvirt.VIR_DOMAIN_CRASHED: Power.PAUSED,  # QEMU lives: on_crash is preserve
}


@dataclass(frozen=True)
class BlockJob:
    """A block job of a disk, in bytes and bytes per second (0: no limit). `current == end` does not mean READY."""

    kind: str  # active-commit | other
    current: int
    end: int
    bandwidth: int


class Guest:
    """A domain, named by its UUID; got from Hypervisor.guest()."""

    def __init__(self, connection: Connection, uuid: str, name: str) -> None:
        self._connection = connection
        self.uuid = uuid
        self.name = name

    def __repr__(self) -> str:
        return f"Guest({self.name!r}, {self.uuid})"

    # -- reading

    def state(self) -> tuple[Power, int | None]:
        """The state, and the id of this run of the domain (None when off): another id is another QEMU."""

        def ask(domain: libvirt.virDomain) -> tuple[Power, int | None]:
            state, reason = cast("tuple[int, int]", domain.state())
            if state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR:
                return Power.IO_ERROR, domain.ID()
            return _STATES.get(state, Power.RUNNING), domain.ID()

        state, run = self._read("asking for the state", ask)
        return (Power.OFF, None) if state is Power.OFF or run is None or run < 0 else (state, run)

    def has_saved_state(self) -> bool:
        """Whether the next start restores a managed save, with the images that the guest had then."""
        return self._read("asking for a saved state", lambda domain: bool(domain.hasManagedSaveImage(0)))

    def was_migrated(self) -> bool | None:
        """Whether it is off because it was migrated away. None: libvirtd has restarted since and does not know."""
        state, why = self._read("asking why it is off", lambda domain: cast("list[int]", domain.state()))
        if state != libvirt.VIR_DOMAIN_SHUTOFF:
            return False
        return None if why == libvirt.VIR_DOMAIN_SHUTOFF_UNKNOWN else why == libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED

    def live_xml(self) -> str | None:
        """The live XML; None when the domain is off."""
        xml = self._read("reading the live XML", lambda domain: domain.XMLDesc(0))
        return xml if fromstring(xml).get("id") else None

    def persistent_xml(self) -> str | None:
        """The XML of the next start, with passwords, so that it can be redefined; None for a transient domain."""
        doing = "reading the persistent XML"
        return self._read(doing, lambda domain: domain.XMLDesc(_PERSISTENT_FLAGS) if domain.isPersistent() else None)

    def block_job(self, target: str) -> BlockJob | None:
        """The block job of a disk. None if there is none: this does not prove that a job succeeded."""
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_INFO_BANDWIDTH_BYTES
        answer = self._while_on(
            f"asking for the block job of {target}", lambda domain: domain.blockJobInfo(target, flags), otherwise=None
        )
        info = cast("dict[str, int] | None", answer)
        if not info:
            return None
        commit = info["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT
        return BlockJob("active-commit" if commit else "other", info["cur"], info["end"], info["bandwidth"])

    def control_idle(self) -> bool:
        """Whether no libvirt call to this domain's QEMU is in flight (PROTOCOL R4)."""
        answer = self._while_on("asking for calls in flight", lambda domain: domain.controlInfo(), otherwise=None)
        return answer is None or cast("list[int]", answer)[0] == libvirt.VIR_DOMAIN_CONTROL_OK

    def migrating(self) -> bool:
        """Whether a migration or another job of the whole domain (save, dump, backup) runs."""
        answer = self._while_on("asking for the domain's job", lambda domain: domain.jobInfo(), otherwise=None)
        return answer is not None and cast("list[int]", answer)[0] != libvirt.VIR_DOMAIN_JOB_NONE

    def byte_limits(self, target: str) -> dict[str, int]:
        """The current byte limits of a disk, by libvirt's names (BYTE_LIMITS), in bytes per second, without zeros."""
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        doing = f"asking for the limits of {target}"
        tune = cast("dict[str, Any]", self._read(doing, lambda domain: domain.blockIoTune(target, flags)))
        return {name: int(tune[name]) for name in BYTE_LIMITS if tune.get(name)}

    def written_images(self) -> dict[str, str]:
        """The file that each disk writes, according to QEMU itself, by target (PROTOCOL R3).

        Uses the QEMU monitor, which taints the domain: call it only in doubt. Raises TransientError when off.
        """
        command = json.dumps({"execute": "query-block"})
        doing = "asking QEMU for its images"
        answer = self._read(doing, lambda domain: libvirt_qemu.qemuMonitorCommand(domain, command, 0))
        devices = cast("list[dict[str, Any]]", json.loads(answer)["return"])
        images = {
            part: _file_name(device["inserted"]["file"])
            for device in devices
            if "inserted" in device
            for part in str(device.get("qdev", "")).split("/")
        }
        xml = self.live_xml()
        if xml is None:
            raise TransientError(f"{self.name}: {doing}: the domain has stopped; observe again", reason="StateChanged")
        return {disk.target: images[disk.alias] for disk in disks(xml) if disk.alias in images}

    # -- changing

    def mark(self, mark: Mark | None) -> None:
        """Write into the domain's live metadata which backup suspended or froze its guest. None removes the mark."""
        kind, xml = libvirt.VIR_DOMAIN_METADATA_ELEMENT, None if mark is None else mark.xml
        live = libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._change("marking", lambda domain: domain.setMetadata(kind, cast("str", xml), KEY, URI, live))

    def suspend(self) -> None:
        """Stop the guest's CPUs. Does nothing if they are stopped already."""
        self._change("suspending", lambda domain: domain.suspend())

    def resume(self) -> None:
        """Let the guest's CPUs run again. Raises TransientError if they run already."""
        self._change("resuming", lambda domain: domain.resume())

    def snapshot(self, overlays: Mapping[str, str], others: Iterable[str]) -> None:
        """Put a new qcow2 overlay on each disk of `overlays` (target to path), all or none, at one point in time.

        `others` names every other disk of the domain: libvirt would also snapshot a disk that is not named. Raises
        PermanentError for an overlay file that is not empty, so it cannot be done twice. After any error, observe: an
        overlay may be in use nevertheless.
        """
        root = ElementTree.Element("domainsnapshot")
        every = ElementTree.SubElement(root, "disks")
        for target, overlay in overlays.items():
            disk = ElementTree.SubElement(every, "disk", name=target, snapshot="external", type="file")
            ElementTree.SubElement(disk, "driver", type="qcow2")
            ElementTree.SubElement(disk, "source", file=overlay)
        for target in others:
            ElementTree.SubElement(every, "disk", name=target, snapshot="no")
        xml = ElementTree.tostring(root, encoding="unicode")
        self._change("taking the snapshot", lambda domain: domain.snapshotCreateXML(xml, _SNAPSHOT_FLAGS))

    def commit(self, target: str, base: str, top: str | None = None, bandwidth: int | None = None) -> None:
        """Start the active commit of a disk's overlay into `base`, the image directly below it.

        `bandwidth`: bytes per second. libvirt refuses a base that is not directly below, so no template is written.
        """

        def start(domain: libvirt.virDomain) -> None:
            # None means the active image; libvirt-python's type is wrong
            domain.blockCommit(target, base, cast("str", top), bandwidth or 0, _COMMIT_FLAGS)

        self._change(f"starting the commit of {target}", start)

    def set_job_bandwidth(self, target: str, bandwidth: int | None) -> None:
        """Limit the block job of a disk, in bytes per second; None lifts the limit."""
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES
        doing = f"setting the bandwidth of the block job of {target}"
        self._change(doing, lambda domain: domain.blockJobSetSpeed(target, bandwidth or 0, flags))

    def limit_bytes(self, target: str, limits: Mapping[str, int]) -> None:
        """Limit the bytes per second of a disk until QEMU ends. Names of BYTE_LIMITS that are missing become unlimited.

        Limits of operations per second and the persistent XML do not change. Disks of one <group_name> share them.
        """
        tune = {name: limits.get(name, 0) for name in BYTE_LIMITS}
        flags = libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._change(f"limiting {target}", lambda domain: domain.setBlockIoTune(target, tune, flags))

    def pivot(self, target: str) -> None:
        """Switch QEMU back to the base. Success says nothing about the persistent XML on disk: settle it."""
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        self._change(f"pivoting {target}", lambda domain: domain.blockJobAbort(target, flags))

    def freeze(self, timeout: int) -> int:
        """Freeze the guest's file systems through the guest agent; returns how many. `timeout`: seconds.

        After an error they may be frozen nevertheless: thaw.
        """
        return self._agent("freezing the file systems", timeout, lambda domain: domain.fsFreeze(), thaws=False)

    def thaw(self, timeout: int) -> int:
        """Thaw the guest's file systems; returns how many were frozen. It may be repeated. `timeout`: seconds."""
        return self._agent("thawing the file systems", timeout, lambda domain: domain.fsThaw(), thaws=True)

    def define(self, xml: str) -> None:
        """Replace the persistent XML. Raises TransientError for a domain that was undefined meanwhile."""
        doing = "redefining"
        if not self._read(doing, lambda domain: domain.isPersistent()):
            message = f"{self.name}: {doing}: it is a transient domain now; observe again"
            raise TransientError(message, reason="StateChanged")
        self._change(doing, lambda domain: domain.connect().defineXML(xml))

    def sync_config(self, images: Mapping[str, str]) -> bool:
        """Make the persistent XML on disk durable; returns whether it names these images (target to path).

        libvirt neither fsyncs the directory nor reports a failed save (measured on 9.0), so the file itself is read
        back and fsynced with its directory. Raises PermanentError (ConfigDirectoryMissing) if libvirt's configuration
        directory is not here, TransientError (ConfigNotDurable) if its file system fails.
        """
        name = self._read("asking for the name", lambda domain: domain.name())
        return sync_definition(self._connection.config_dir, name, self.uuid, images)

    # -- calling libvirt

    def _read(self, doing: str, ask: Callable[[libvirt.virDomain], Result]) -> Result:
        return self._on_domain(doing, ask, mutating=False)

    def _change(self, doing: str, change: Callable[[libvirt.virDomain], Result]) -> Result:
        return self._on_domain(doing, change, mutating=True)

    def _on_domain(self, doing: str, function: Callable[[libvirt.virDomain], Result], *, mutating: bool) -> Result:
        doing = f"{self.name}: {doing}"
        with self._connection.one_connection(doing):
            # apart from the change: if the lookup fails, the change was not sent
            domain = self._connection.call(doing, lambda connection: connection.lookupByUUIDString(self.uuid))
            return self._connection.call(doing, lambda _: function(domain), mutating=mutating)

    def _while_on(self, doing: str, ask: Callable[[libvirt.virDomain], Result], *, otherwise: Result) -> Result:
        """The result of `ask`, or `otherwise` for a domain that is off where libvirt needs a running one."""

        def ask_if_on(domain: libvirt.virDomain) -> Result:
            try:
                return ask(domain)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and not domain.isActive():
                    return otherwise
                raise

        return self._read(doing, ask_if_on)

    def _agent(self, doing: str, timeout: int, ask: Callable[[libvirt.virDomain], int], *, thaws: bool) -> int:
        def ask_in_time(domain: libvirt.virDomain) -> int:
            domain.agentSetResponseTimeout(timeout)  # otherwise a hanging agent blocks the call forever
            return ask(domain)

        with self._connection.waiting_for_an_agent(thaws=thaws):
            return self._change(doing, ask_in_time)


def _file_name(name: str) -> str:
    """The file of a QEMU node, whose name is its path or a JSON description of its graph."""
    if not name.startswith("json:"):
        return name
    node: Any = json.loads(name.removeprefix("json:"))
    while isinstance(node.get("file"), dict):
        node = node["file"]
    return str(node.get("filename", name))
