"""What may happen to a backup, by name: one function each. It returns how to undo it, where it lasts.

`libvirtd killed`, `libvirtd stopped` and what the driver is held for last as long as the function does.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.chaos.soak.choices import Fault
from tests.chaos.soak.driving import Driving
from tests.chaos.soak.guests import Subject
from tests.chaos.soak.host import Host, fill
from vmbackup.hypervisor.guest import GuestState
from vmbackup.reconcile.record import Freeze, Guard, Record

Undo = Callable[[], object]
_SHUTDOWN_SECONDS = 20.0
_PATIENCE = 3.0  # seconds for which a fault waits for its opportunity


class NotNowError(Exception):
    """There is nothing that it could happen to at this moment, or nobody who may do it."""


class Scene(Protocol):
    """What a fault happens to."""

    host: Host
    subject: Subject
    driving: Driving

    @property
    def journal(self) -> Path: ...
    def record(self) -> Record | None: ...
    def kill_driver(self, again_after: float) -> None: ...
    def stop_driver(self, again_after: float) -> None: ...
    def start_second_driver(self) -> None: ...
    def delete_backup(self) -> None: ...
    def expect_off(self, seconds: float, *, within: float = 0.0) -> None: ...
    def found(self, what: str) -> None: ...


def kill_driver(scene: Scene, fault: Fault) -> None:
    scene.kill_driver(fault.seconds)


def stop_driver(scene: Scene, fault: Fault) -> None:
    scene.stop_driver(fault.seconds)


def start_second_driver(scene: Scene, fault: Fault) -> None:
    scene.start_second_driver()


def kill_libvirtd(scene: Scene, fault: Fault) -> None:
    with scene.host.away() as libvirtd:
        libvirtd.kill()
        _meanwhile(scene, fault)


def stop_libvirtd(scene: Scene, fault: Fault) -> None:
    with scene.host.away() as libvirtd:
        libvirtd.stop_signal()
        _meanwhile(scene, fault)


def _meanwhile(scene: Scene, fault: Fault) -> None:
    scene.driving.let_go()
    time.sleep(fault.seconds / 2)
    if fault.meanwhile:
        with suppress(NotNowError):
            FAULTS[fault.meanwhile](scene, fault)
    time.sleep(fault.seconds / 2)


def kill_qemu(scene: Scene, fault: Fault) -> None:
    try:
        scene.host.libvirtd.kill_guest(scene.subject.name)
    except (KeyError, ProcessLookupError):
        raise NotNowError from None
    scene.expect_off(fault.seconds)


def destroy(scene: Scene, fault: Fault) -> None:
    _virsh(scene, "destroy", scene.subject.name)
    scene.expect_off(fault.seconds)


def reset(scene: Scene, fault: Fault) -> None:
    _virsh(scene, "reset", scene.subject.name)


def shut_down(scene: Scene, fault: Fault) -> None:
    _virsh(scene, "shutdown", scene.subject.name, "--mode", "acpi")
    scene.expect_off(fault.seconds, within=_SHUTDOWN_SECONDS)


def pause(scene: Scene, fault: Fault) -> Undo:
    """A user suspends the guest, and finds it so when he resumes it. Not while it is ours to resume."""
    subject = scene.subject
    if _is_ours(scene) or scene.host.state(subject.guest) is not GuestState.RUNNING:
        raise NotNowError
    _virsh(scene, "suspend", subject.name)
    is_his = not _is_ours(scene)
    if is_his:
        subject.wanted = GuestState.PAUSED

    def undo() -> None:
        state = scene.host.state(subject.guest)
        if is_his and state is GuestState.RUNNING:
            scene.found("a guest that a user had paused was resumed")
        subject.wanted = GuestState.RUNNING
        with suppress(NotNowError):
            _virsh(scene, "resume", subject.name)

    return undo


def _is_ours(scene: Scene) -> bool:
    record = scene.record()
    return record is not None and record.guard is Guard.OURS


def define_again(scene: Scene, fault: Fault) -> None:
    subject, record = scene.subject, scene.record()
    if record is None or not record.disks:  # planned while undefined, its definition gets what the live XML says
        raise NotNowError
    with suppress(NotNowError):
        _virsh(scene, "undefine", subject.name)
    for _ in range(100):  # the configuration's file system may be full
        with suppress(NotNowError):
            _virsh(scene, "define", str(subject.xml_file))
            subject.description = ""
            return
        time.sleep(0.2)
    scene.found("the domain could not be defined again")


def edit_description(scene: Scene, fault: Fault) -> None:
    begun = time.monotonic()
    description = f"edited at {begun:.3f}"
    _virsh(scene, "desc", scene.subject.name, "--config", "--new-desc", description)
    scene.subject.description = description
    scene.driving.let_go()
    scene.subject.edited = begun, time.monotonic()


def edit_bandwidths(scene: Scene, fault: Fault) -> None:
    scene.driving.ask(spec={"copy": None, "commit": 4 << 20})


def lock_base(scene: Scene, fault: Fault) -> Undo:
    """Somebody reads a base with QEMU's lock, which is possible while the guest is on its overlay."""
    base = scene.subject.bases["vda"]
    image_format = "raw" if base.suffix == ".raw" else "qcow2"
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        reader = subprocess.Popen(
            ["qemu-io", "-r", "-f", image_format, str(base)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with suppress(subprocess.TimeoutExpired):
            reader.wait(0.15)
            continue

        def undo(reader: subprocess.Popen[bytes] = reader) -> None:
            reader.kill()
            reader.communicate()

        return undo
    raise NotNowError


def start_foreign_job(scene: Scene, fault: Fault) -> Undo:
    name, copy = scene.subject.name, scene.subject.images / "foreign.raw"
    _virsh(scene, "blockcopy", name, "vda", str(copy), "--format", "raw", "--transient-job", "--bandwidth", "1")

    def undo() -> None:
        with suppress(NotNowError):
            if "Copy" in _virsh(scene, "blockjob", name, "vda", "--info", "--raw"):
                _virsh(scene, "blockjob", name, "vda", "--abort")
        copy.unlink(missing_ok=True)

    return undo


def abort_job(scene: Scene, fault: Fault) -> None:
    name = scene.subject.name
    for target in scene.subject.bases:
        if "Commit" in _virsh(scene, "blockjob", name, target, "--info", "--raw"):
            _virsh(scene, "blockjob", name, target, "--abort")
            return
    raise NotNowError


def fill_images(scene: Scene, fault: Fault) -> Undo:
    return _filled(scene.subject.images)


def fill_store(scene: Scene, fault: Fault) -> Undo:
    return _filled(scene.subject.store.parent)


def take_store_away(scene: Scene, fault: Fault) -> Undo:
    store = scene.subject.store
    away = store.with_name("store-away")
    store.rename(away)
    store.touch()  # else it would be made anew

    def undo() -> None:
        store.unlink()
        away.rename(store)

    return undo


def fill_state(scene: Scene, fault: Fault) -> Undo:
    return _filled(scene.subject.state_dir)


def fill_configuration(scene: Scene, fault: Fault) -> Undo:
    scene.host.disturb()
    give_back = _filled(scene.host.libvirtd.config_dir)

    def undo() -> None:
        give_back()
        scene.host.disturb()

    return undo


def _filled(folder: Path) -> Undo:
    if not os.path.ismount(folder):  # not root
        raise NotNowError
    return fill(folder)


def tear_journal(scene: Scene, fault: Fault) -> None:
    """As it is left where the last write was cut off."""
    scene.kill_driver(fault.seconds)
    if not scene.journal.exists():
        raise NotNowError
    with scene.journal.open("ab") as journal, suppress(OSError):
        journal.write(b'01234567 {"uid": "')


def garble_journal(scene: Scene, fault: Fault) -> None:
    _without_marks(scene, fault)
    with suppress(OSError):
        scene.journal.write_bytes(b"\0" * scene.journal.stat().st_size)


def lose_journal(scene: Scene, fault: Fault) -> None:
    _without_marks(scene, fault)
    scene.journal.unlink()


def _without_marks(scene: Scene, fault: Fault) -> None:
    """Nobody can know without it that a call is under way; of a guest held still, the residual cases tell."""
    scene.kill_driver(fault.seconds)
    record = scene.record()
    frozen = record is not None and record.freeze in (Freeze.FROZEN, Freeze.THAW_DUE)
    if record is None or record.call or record.guard is not Guard.NONE or frozen:
        raise NotNowError


def delete_backup(scene: Scene, fault: Fault) -> None:
    scene.delete_backup()


def ask_for_retry(scene: Scene, fault: Fault) -> None:
    scene.driving.ask(retry="by a fault")


def _virsh(scene: Scene, *arguments: str) -> str:
    try:
        return scene.host.virsh(*arguments)
    except RuntimeError as error:
        raise NotNowError(str(error)) from error


FAULTS: Mapping[str, Callable[[Scene, Fault], Undo | None]] = {
    "driver killed": kill_driver,
    "driver stopped": stop_driver,
    "second driver started": start_second_driver,
    "libvirtd killed": kill_libvirtd,
    "libvirtd stopped": stop_libvirtd,
    "QEMU killed": kill_qemu,
    "guest destroyed": destroy,
    "guest reset": reset,
    "guest shut down": shut_down,
    "guest paused by a user": pause,
    "domain undefined and defined again": define_again,
    "description edited": edit_description,
    "bandwidths edited": edit_bandwidths,
    "base locked by a reader": lock_base,
    "foreign block job": start_foreign_job,
    "our block job aborted by a user": abort_job,
    "overlays' file system full": fill_images,
    "store full": fill_store,
    "store gone": take_store_away,
    "state directory full": fill_state,
    "configuration directory full": fill_configuration,
    "journal torn": tear_journal,
    "journal garbled": garble_journal,
    "journal lost": lose_journal,
    "backup deleted": delete_backup,
    "retry asked for": ask_for_retry,
}
