"""Table of libvirt error codes: the kind, reason and cure of each. Tested row by row.

Measured on libvirt 9.0; see also docs/protocol.md, R4. The texts of libvirt change and are translated, so only
its numbers count.
"""

from __future__ import annotations

from dataclasses import dataclass

import libvirt

from vmbackup.errors import Cause, PermanentError, TransientError, UnknownOutcomeError, VMBackupError


@dataclass(frozen=True)
class _Meaning:
    kind: type[VMBackupError]
    reason: str
    cure: str


_NO_ANSWER = "libvirtd did not answer; the call may still be carried out"
_NOT_ALLOWED = "allow the agent to use libvirt for reading and writing (polkit, or the group of the socket)"

_BY_CODE: dict[int, _Meaning] = {
    libvirt.VIR_ERR_INTERNAL_ERROR: _Meaning(TransientError, "HypervisorError", "see the domain's QEMU log"),
    libvirt.VIR_ERR_INVALID_ARG: _Meaning(TransientError, "StateChanged", "the domain or its disk has changed"),
    libvirt.VIR_ERR_OPERATION_FAILED: _Meaning(TransientError, "OperationFailed", "see the domain's QEMU log"),
    libvirt.VIR_ERR_OPERATION_INVALID: _Meaning(TransientError, "StateChanged", "the domain's state has changed"),
    libvirt.VIR_ERR_BLOCK_COPY_ACTIVE: _Meaning(
        TransientError, Cause.BLOCK_JOB_ACTIVE, "a block job is running on this disk"
    ),
    libvirt.VIR_ERR_OPERATION_UNSUPPORTED: _Meaning(
        TransientError, Cause.BLOCK_JOB_ACTIVE, "a block job may be running on this disk"
    ),
    libvirt.VIR_ERR_RESOURCE_BUSY: _Meaning(TransientError, Cause.BUSY, "another job is running on this domain"),
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE: _Meaning(
        TransientError, "AgentUnresponsive", "check that qemu-guest-agent runs in the guest"
    ),
    libvirt.VIR_ERR_AGENT_UNSYNCED: _Meaning(
        TransientError, "AgentUnresponsive", "check that qemu-guest-agent runs in the guest"
    ),
    libvirt.VIR_ERR_OPERATION_TIMEOUT: _Meaning(UnknownOutcomeError, "Timeout", _NO_ANSWER),
    libvirt.VIR_ERR_NO_DOMAIN: _Meaning(
        PermanentError,
        Cause.DOMAIN_NOT_FOUND,
        "the domain is no longer on this hypervisor; its files are not touched",
    ),
    libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED: _Meaning(
        PermanentError,
        Cause.AGENT_NOT_CONFIGURED,
        "add the channel org.qemu.guest_agent.0 to the domain, or do not quiesce",
    ),
    libvirt.VIR_ERR_CONFIG_UNSUPPORTED: _Meaning(
        PermanentError, Cause.UNSUPPORTED, "QEMU or libvirt cannot do this with this disk, or the file exists already"
    ),
    libvirt.VIR_ERR_NO_SUPPORT: _Meaning(PermanentError, Cause.UNSUPPORTED, "use libvirt 9.0 with QEMU 7.2, or newer"),
    libvirt.VIR_ERR_XML_ERROR: _Meaning(PermanentError, "InvalidXML", "correct the domain's definition"),
    libvirt.VIR_ERR_XML_DETAIL: _Meaning(PermanentError, "InvalidXML", "correct the domain's definition"),
    libvirt.VIR_ERR_OPERATION_DENIED: _Meaning(PermanentError, "NotAllowed", _NOT_ALLOWED),
    libvirt.VIR_ERR_ACCESS_DENIED: _Meaning(PermanentError, "NotAllowed", _NOT_ALLOWED),
    libvirt.VIR_ERR_AUTH_FAILED: _Meaning(PermanentError, "NotAllowed", _NOT_ALLOWED),
    libvirt.VIR_ERR_AUTH_UNAVAILABLE: _Meaning(PermanentError, "NotAllowed", _NOT_ALLOWED),
}
_CONNECTION_LOST = _Meaning(UnknownOutcomeError, "ConnectionLost", _NO_ANSWER)
_AWAY = _Meaning(TransientError, Cause.HYPERVISOR_AWAY, "start libvirtd; vmbackup reconnects automatically")
_OTHER = _Meaning(TransientError, "HypervisorError", "see libvirtd's log")


def classify(error: libvirt.libvirtError, doing: str, *, mutating: bool) -> VMBackupError:
    """The error in our taxonomy, its message starting with what was being done.

    An error of the RPC domain says nothing about the call, whatever its code: a keepalive timeout is code 1. For a call
    that only reads no outcome can be unknown, so its error is transient.
    """
    code = error.get_error_code()
    if error.get_error_domain() == libvirt.VIR_FROM_RPC or code is None:
        meaning = _CONNECTION_LOST
    else:
        meaning = _BY_CODE.get(code, _OTHER)
    if meaning.kind is UnknownOutcomeError and not mutating:
        meaning = _AWAY
    return meaning.kind(f"{doing}: {error.get_error_message()} ({meaning.cure})", reason=meaning.reason)


def away(doing: str, uri: str) -> TransientError:
    """The error for a call without a connection: nothing was sent."""
    return TransientError(f"{doing}: no libvirtd answers at {uri} ({_AWAY.cure})", reason=_AWAY.reason)
