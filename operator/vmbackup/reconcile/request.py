"""The request: the options of a running backup as the user sets them now."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from vmbackup.api.backup import BackupSpec
from vmbackup.errors import RefusedError
from vmbackup.protocol.record import Record


@dataclass(frozen=True)
class Request:
    """The present request. Some fields of the spec may change while the backup runs."""

    spec: BackupSpec
    deleted: bool = False
    cancelled: bool = False  # the annotation vmbackup.dev/cancel: no copy is wanted any more, the overlay is merged
    delete_data: bool = False  # when released: the stored data goes too (deletionPolicy: Delete)
    retry: str = ""  # the annotation vmbackup.dev/retry
    stop: bool = False  # this process is to end; another run will carry on


def spec_of(record: Record) -> BackupSpec:
    """The spec as the journal holds it, or one of defaults.

    A backup that has started is finished even if its spec cannot be parsed.
    `vmbackup run` journals none, and after a roll-back a journal may hold fields of a later version.
    """
    with suppress(RefusedError):
        return BackupSpec.parse(record.spec)
    return BackupSpec(node_name="", domain=record.domain_uuid or record.domain, store="none")
