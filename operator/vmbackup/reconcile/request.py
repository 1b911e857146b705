"""What the user asks of a running backup at this moment."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from vmbackup.api.backup import BackupSpec
from vmbackup.errors import RefusedError
from vmbackup.protocol.record import Record


@dataclass(frozen=True)
class Request:
    """What is asked for at this moment. The spec's knobs may change while it runs."""

    spec: BackupSpec
    deleted: bool = False
    cancelled: bool = False  # the annotation vmbackup.dev/cancel: no copy is wanted any more, the guest comes home
    delete_data: bool = False  # when released: the stored data goes too (deletionPolicy: Delete)
    retry: str = ""  # the annotation vmbackup.dev/retry
    stop: bool = False  # this process is to end; another run will carry on


def spec_of(record: Record) -> BackupSpec:
    """The spec as the journal holds it, or one of defaults: whoever has begun brings its guest home, whatever it says.

    `vmbackup run` journals none, and after a roll-back a journal may hold fields of a later version.
    """
    with suppress(RefusedError):
        return BackupSpec.parse(record.spec)
    return BackupSpec(node_name="", domain=record.domain_uuid or record.domain, store="none")
