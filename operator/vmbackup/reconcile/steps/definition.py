"""Settling P (PROTOCOL R2): redefine the persistent XML, and prove that the file on disk says so too."""

from __future__ import annotations

from vmbackup.errors import Cause, PermanentError, TransientError
from vmbackup.hypervisor import chain
from vmbackup.hypervisor.guest import Guest
from vmbackup.protocol.record import Image
from vmbackup.protocol.terms import Action, Do, Observation
from vmbackup.protocol.transition import answered, failed
from vmbackup.reconcile.observe import Observer
from vmbackup.reconcile.state.clock import boottime
from vmbackup.reconcile.state.journal import Journal
from vmbackup.reconcile.telling.announcer import Announcer

_ATTEMPTS = 5  # failures in a row after which the guest does not wait for it any longer
_PAUSE = 20.0  # seconds for which the guest then goes on without
_AGAIN = 5.0  # seconds between attempts of what cannot be done without


class Settling:
    """Settles P for one backup, and counts how often that has failed in a row."""

    def __init__(self, journal: Journal, guest: Guest, observer: Observer, announcer: Announcer) -> None:
        self._journal = journal
        self._guest = guest
        self._observer = observer
        self._announcer = announcer
        self._failures = 0

    def redefine(self, action: Action) -> None:
        """Let P name the images of the action, as far as libvirt says: all but our disks stays as it is."""
        xml = self._guest.persistent_xml()
        if xml is None:  # undefined meanwhile: there is nothing to settle any more
            return
        wanted: dict[str, str] = {}
        for target, image in action.images:
            disk = self._journal.record.disk(target)
            on_base = disk.persistent_disk_xml  # empty: it was transient when the backup was planned
            on_base = on_base or chain.without_overlay(self._guest.live_xml() or xml, target, disk.overlay)
            wanted[target] = on_base if image is Image.BASE else chain.on_overlay(on_base, disk.overlay)
        self._guest.define(chain.with_images(xml, wanted))

    def sync(self, action: Action) -> str | None:
        """Make the file durable that says so. None if it does, else what is wrong."""
        paths = {target: self._path(target, image) for target, image in action.images}
        try:
            durable = self._guest.sync_config(paths)
        except PermanentError as error:
            if error.reason != Cause.CONFIG_DIRECTORY_MISSING:
                raise
            self._announcer.config_unproven(str(error))
            durable = True
        except TransientError as error:
            if error.reason != Cause.CONFIG_NOT_DURABLE:
                raise
            return str(error)
        if not durable:
            self._journal.write(failed(self._journal.record, action, "", retry_at=0.0), durable=False)
            return f"libvirt's configuration on disk does not name {', '.join(paths.values())}"
        self._failures = 0
        self._observer.config_failing_until = 0.0
        # A power cut must not take it away in the middle of a pivot: it tells P=B by the pivot from P=B by a user.
        pivoting = any(disk.pivot_intended for disk in self._journal.record.disks)
        self._journal.write(answered(self._journal.record, action), durable=pivoting)
        return None

    def no_longer_on_base(self, target: str, seen: Observation) -> str | None:
        """None if P still names the base, durably: it was settled, but somebody may have redefined the domain since."""
        if any(disk.target == target and disk.persistent is None for disk in seen.disks):
            return None
        return self.sync(Action(Do.SYNC_CONFIG, images=((target, Image.BASE),)))

    def may_try_again(self) -> bool:
        """It has failed once more: whether it is to be tried again at once."""
        self._failures += 1
        return self._failures < _ATTEMPTS

    def go_on_without(self, why: str) -> float:
        """The guest does not wait for it any longer; returns the seconds to wait before the next look."""
        self._observer.config_failing_until = boottime() + _PAUSE
        if self._failures > _ATTEMPTS:
            return _AGAIN
        self._announcer.event(Cause.CONFIG_NOT_DURABLE, f"{why}: do not power-cycle the guest", warning=True)
        return 0.0

    def _path(self, target: str, image: Image) -> str:
        disk = self._journal.record.disk(target)
        return disk.base if image is Image.BASE else disk.overlay
