"""What may happen to a backup, by name: one function each. It returns how to undo it, where it lasts.

`libvirtd killed`, `libvirtd stopped` and what the driver is held for last as long as the function does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.chaos.soak.choices import Fault
from tests.chaos.soak.host import fill
from tests.chaos.soak.scene import NotNowError, Scene, Undo, virsh
from tests.chaos.soak.user_actions import (
    abort_job,
    lock_base,
    put_overlay_on_top,
    remove_overlay,
    replace_base,
    replace_overlay,
    start_foreign_job,
)
from tests.support.storage import run
from vmbackup.protocol.record import Freeze, Guard
from vmbackup.protocol.terms import Power

_SHUTDOWN_SECONDS = 20.0
_JUMP_SECONDS = 10 * 365 * 86400.0


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
    virsh(scene, "destroy", scene.subject.name)
    scene.expect_off(fault.seconds)


def reset(scene: Scene, fault: Fault) -> None:
    virsh(scene, "reset", scene.subject.name)


def shut_down(scene: Scene, fault: Fault) -> None:
    virsh(scene, "shutdown", scene.subject.name, "--mode", "acpi")
    scene.expect_off(fault.seconds, within=_SHUTDOWN_SECONDS)


def pause(scene: Scene, fault: Fault) -> Undo:
    """A user suspends the guest, and finds it so when he resumes it. Not while it is ours to resume."""
    subject = scene.subject
    if _is_ours(scene) or scene.host.state(subject.guest) is not Power.RUNNING:
        raise NotNowError
    virsh(scene, "suspend", subject.name)
    is_his = not _is_ours(scene)
    if is_his:
        subject.wanted = Power.PAUSED

    def undo() -> None:
        state = scene.host.state(subject.guest)
        if is_his and state is Power.RUNNING:
            scene.found("a guest that a user had paused was resumed")
        subject.wanted = Power.RUNNING
        with suppress(NotNowError):
            virsh(scene, "resume", subject.name)

    return undo


def hang_agent(scene: Scene, fault: Fault) -> Undo:
    """Nothing that libvirt says reaches it."""
    scene.subject.channel.swallow()
    return scene.subject.channel.pass_all


def cut_power(scene: Scene, fault: Fault) -> None:
    if os.geteuid():
        raise NotNowError
    scene.cut_power(fault.seconds)


def _is_ours(scene: Scene) -> bool:
    record = scene.record()
    return record is not None and record.guard is Guard.OURS


def define_again(scene: Scene, fault: Fault) -> None:
    subject, record = scene.subject, scene.record()
    if record is None or not record.disks:  # planned while undefined, its definition gets what the live XML says
        raise NotNowError
    with suppress(NotNowError):
        virsh(scene, "undefine", subject.name)
    for _ in range(100):  # the configuration's file system may be full
        with suppress(NotNowError):
            virsh(scene, "define", str(subject.xml_file))
            subject.description = ""
            return
        time.sleep(0.2)
    scene.found("the domain could not be defined again")


def edit_description(scene: Scene, fault: Fault) -> None:
    begun = time.monotonic()
    description = f"edited at {begun:.3f}"
    virsh(scene, "desc", scene.subject.name, "--config", "--new-desc", description)
    scene.subject.description = description
    scene.driving.let_go()
    scene.subject.edited = begun, time.monotonic()


def edit_bandwidths(scene: Scene, fault: Fault) -> None:
    scene.driving.ask(spec={"copy": None, "commit": 4 << 20})


def fill_images(scene: Scene, fault: Fault) -> Undo:
    return _filled(scene.subject.images)


def fill_store(scene: Scene, fault: Fault) -> Undo:
    return _filled(scene.subject.store.parent)


def take_store_away(scene: Scene, fault: Fault) -> Undo:
    store = scene.subject.store
    if store.is_mount():
        raise NotNowError
    away = store.with_name("store-away")
    store.rename(away)
    store.touch()  # otherwise the driver would create it again

    def undo() -> None:
        store.unlink()
        away.rename(store)

    return undo


def make_store_read_only(scene: Scene, fault: Fault) -> Undo:
    """Files that are open stay writable."""
    store = scene.subject.store
    if os.geteuid() or not store.is_dir() or store.is_mount():
        raise NotNowError
    run("mount", "--bind", str(store), str(store))
    run("mount", "-o", "remount,bind,ro", str(store))
    return lambda: run("umount", "--lazy", str(store))


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
    if not folder.is_mount():  # not root
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
    """Not during a call, which only the journal shows, nor with the guest suspended: that is a residual case."""
    scene.kill_driver(fault.seconds)
    record = scene.record()
    frozen = record is not None and record.freeze in (Freeze.FROZEN, Freeze.THAW_DUE)
    if record is None or record.call or record.guard is not Guard.NONE or frozen:
        raise NotNowError


def delete_backup(scene: Scene, fault: Fault) -> None:
    scene.delete_backup()


def ask_for_retry(scene: Scene, fault: Fault) -> None:
    scene.driving.ask(retry="by a fault")


def jump(scene: Scene, fault: Fault) -> Undo:
    """The wall clock of the driver goes forward by years, and back."""
    scene.driving.jump(_JUMP_SECONDS)
    return lambda: scene.driving.jump(-_JUMP_SECONDS)


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
    "guest agent hangs": hang_agent,
    "power cut": cut_power,
    "domain undefined and defined again": define_again,
    "description edited": edit_description,
    "bandwidths edited": edit_bandwidths,
    "base locked by a reader": lock_base,
    "foreign block job": start_foreign_job,
    "our block job aborted by a user": abort_job,
    "foreign overlay": put_overlay_on_top,
    "base replaced": replace_base,
    "overlay removed": remove_overlay,
    "overlay replaced": replace_overlay,
    "overlays' file system full": fill_images,
    "store full": fill_store,
    "store gone": take_store_away,
    "store read-only": make_store_read_only,
    "state directory full": fill_state,
    "configuration directory full": fill_configuration,
    "journal torn": tear_journal,
    "journal garbled": garble_journal,
    "journal lost": lose_journal,
    "backup deleted": delete_backup,
    "retry asked for": ask_for_retry,
    "clock jumps": jump,
}
