"""Copies the frozen base into the store: takes every disk, then publishes; in the background."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vmbackup.errors import PermanentError, RefusedError, VMBackupError
from vmbackup.imaging import CopyControl
from vmbackup.imaging.copy import reading
from vmbackup.protocol.record import Copy, Record
from vmbackup.protocol.transition import copy_stored, copy_taken
from vmbackup.reconcile.admission.plan import source_of
from vmbackup.reconcile.background.transfer import Transfer, at_work
from vmbackup.reconcile.request import Request
from vmbackup.reconcile.telling.listener import BackupMetrics
from vmbackup.stores.base import GuestFacts, Published, Store, TakenDisk


@dataclass(frozen=True)
class _Result:
    taken: Sequence[TakenDisk]
    published: Published | None


class Copying:
    """The copies of one backup. `copied` is how many bytes of each disk are through, by target.

    `stuck`: nothing is copied, because a previous attempt, which was given up, is still blocked in the store.
    """

    def __init__(self, request: Callable[[], Request], wake: Callable[[], None], metrics: BackupMetrics) -> None:
        self._request = request
        self._wake = wake
        self._metrics = metrics
        self._transfer: Transfer[_Result] | None = None
        self._shipping = False
        self.stuck = False
        self.copied: dict[str, int] = {}
        self.last_progress: float | None = None

    def copy(self, record: Record, open_store: Callable[[], Store]) -> Record | None:
        """Start copying, or see how far it is: the record with the content secured, or None while it runs.

        Where the store made clones, the digests are still missing, and `ship` completes the backup once the chain is
        home. Raises the errors of the store.
        """
        store = open_store()
        result = self._run(lambda control: self._take(record, store, control), record)
        if result is None:
            return None
        taken = copy_taken(record, {disk.target: (disk.images[0].file, disk.images[0].bytes) for disk in result.taken})
        return _stored(taken, result.published) if result.published else taken

    def ship(self, record: Record, open_store: Callable[[], Store]) -> Record | None:
        """Complete the backup in the store: the record with it, or None while that runs."""
        store = open_store()
        self._shipping = True
        result = self._run(lambda control: _publish(record, store, store.taken(record.identity), control), record)
        return None if result is None or result.published is None else _stored(record, result.published)

    def make_way(self) -> None:
        """End a copy, and release every image: no reader may be left on the base when a commit begins.

        A shipment, which touches no image in use, goes on.
        """
        if not self._shipping:
            self.cancel()

    def cancel(self) -> None:
        """End whatever runs."""
        if self._transfer is not None:
            self._transfer.cancel()
            self._transfer = None
        self._shipping = False

    def _run(self, work: Callable[[CopyControl], _Result], record: Record) -> _Result | None:
        name = f"copy-{record.uid}"
        if self._transfer is None:
            self.stuck = at_work(name)  # its late writes must not mix with those of a new attempt
            if self.stuck:
                return None
            self._transfer = Transfer(work, CopyControl(bandwidth=self._bandwidth), self._wake, name)
        if not self._transfer.ended:
            return None
        transfer, self._transfer, self._shipping = self._transfer, None, False
        return transfer.result()

    def _bandwidth(self) -> int | None:
        return self._request().spec.copy.bandwidth

    def _take(self, record: Record, store: Store, control: CopyControl) -> _Result:
        taken: list[TakenDisk] = []
        with ExitStack() as others:
            for disk in record.disks:  # all at once: no commit to one may start while another is copied
                others.enter_context(reading(Path(disk.base), control))
            for disk in record.disks:
                watched = replace(control, progress=self._watch(disk.target))
                taken.append(store.take(record.identity, source_of(disk), watched))
        control.check()
        if all(image.digest for disk in taken for image in disk.images):
            return _publish(record, store, taken, control)
        return _Result(taken, None)

    def _watch(self, target: str) -> Callable[[int, int], None]:
        def progress(done: int, _total: int) -> None:
            before = self.copied.get(target, 0)
            if done > before:
                self._metrics.copied(done - before)
                self.last_progress = time.time()
            self.copied[target] = done

        return progress


def delete_stored(record: Record, open_store: Callable[[], Store]) -> None:
    """Delete the stored backup; also a failed one that was published just before it was given up.

    Raises PermanentError or TransientError if the backup is known to be stored and cannot be deleted.
    """
    if record.copy is Copy.STORED:
        try:
            open_store().delete(record.location, record.uid)
        except RefusedError as error:  # by the store: nothing of the backup itself is refused any more
            raise PermanentError(str(error), reason=error.reason) from error
        return
    with suppress(VMBackupError):
        store = open_store()
        if location := store.published(record.identity):
            store.delete(location, record.uid)


def _publish(record: Record, store: Store, taken: Sequence[TakenDisk], control: CopyControl) -> _Result:
    missing = {disk.target for disk in record.disks} - {disk.target for disk in taken}
    if missing and not store.published(record.identity):
        raise PermanentError(
            f"the store no longer has the staged copy of {', '.join(sorted(missing))}; create a new backup"
        )
    facts = GuestFacts(
        domain=record.domain,
        domain_uuid=record.domain_uuid,
        domain_xml=record.domain_xml,
        nvram=Path(record.nvram) if record.nvram else None,
        snapshot_time=record.snapshot_time or 0.0,
    )
    return _Result(taken, store.publish(record.identity, taken, facts, control))


def _stored(record: Record, published: Published) -> Record:
    return copy_stored(record, published.location, published.digests)
