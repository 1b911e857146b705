"""The four kinds of errors.

What to do next depends on the kind alone, never on the text. The text is for people: it names the disk, file or field,
and the cure.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """The reasons of errors that the code itself compares. Users see them in conditions and events."""

    JOURNAL_UNWRITABLE = "JournalUnwritable"  # the write-ahead record on the node cannot be written
    JOURNAL_VERSION = "JournalVersion"  # another version of vmbackup wrote it
    DOMAIN_NOT_FOUND = "DomainNotFound"
    HYPERVISOR_AWAY = "HypervisorAway"  # libvirtd does not answer
    CONFIG_NOT_DURABLE = "ConfigNotDurable"  # a definition of libvirt cannot be written to disk
    CONFIG_DIRECTORY_MISSING = "ConfigDirectoryMissing"  # the directory of the definitions cannot be read here
    AGENT_NOT_CONFIGURED = "AgentNotConfigured"  # the domain has no channel for a guest agent
    UNSUPPORTED = "Unsupported"  # QEMU or libvirt cannot do this
    BUSY = "Busy"
    BLOCK_JOB_ACTIVE = "BlockJobActive"  # a block job is on the disk
    NOT_FOUND = "NotFound"  # the API server has no such object
    CONFLICT = "Conflict"  # somebody else has changed the object
    INVALID = "Invalid"  # the API server refuses the object


class VMBackupError(Exception):
    """Base of the four kinds. `reason` is a CamelCase word for conditions and events."""

    default_reason = "Error"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason


class RefusedError(VMBackupError):
    """The request is not accepted as it is. Nothing was changed; a human must change the request."""

    default_reason = "Refused"


class TransientError(VMBackupError):
    """It did not happen, and may work later: observe again after a while, then retry."""

    default_reason = "Transient"


class UnknownOutcomeError(VMBackupError):
    """It may or may not have happened, or may still happen. Only an observation after the barrier can tell."""

    default_reason = "Unknown"


class PermanentError(VMBackupError):
    """It did not happen, and repeating it unchanged will not help."""

    default_reason = "Permanent"
