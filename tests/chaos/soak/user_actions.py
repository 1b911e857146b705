"""Actions of other users on the images and jobs of a guest; one that lasts returns how to undo it."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.chaos.soak.choices import Fault
from tests.chaos.soak.scene import PATIENCE, NotNowError, Scene, Undo, virsh
from tests.support.domains import naming
from vmbackup.errors import VMBackupError
from vmbackup.hypervisor import chain


def lock_base(scene: Scene, fault: Fault) -> Undo:
    """Somebody reads a base with QEMU's lock, which is possible while the guest is on its overlay."""
    base = scene.subject.bases["vda"]
    image_format = "raw" if base.suffix == ".raw" else "qcow2"
    deadline = time.monotonic() + PATIENCE
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
    virsh(scene, "blockcopy", name, "vda", str(copy), "--format", "raw", "--transient-job", "--bandwidth", "1")

    def undo() -> None:
        with suppress(NotNowError):
            if "Copy" in virsh(scene, "blockjob", name, "vda", "--info", "--raw"):
                virsh(scene, "blockjob", name, "vda", "--abort")
        copy.unlink(missing_ok=True)

    return undo


def abort_job(scene: Scene, fault: Fault) -> None:
    name = scene.subject.name
    for target in scene.subject.bases:
        if "Commit" in virsh(scene, "blockjob", name, target, "--info", "--raw"):
            virsh(scene, "blockjob", name, target, "--abort")
            return
    raise NotNowError


# If QEMU ends while an image has no name, its contents are lost: so each of these is for a guest on its overlay.


def put_overlay_on_top(scene: Scene, fault: Fault) -> Undo:
    """A user takes a snapshot of his own, and commits it a while later."""
    name, path = scene.subject.name, scene.subject.images / "foreign.qcow2"
    target, _ = _overlay(scene)
    disks = [word for each in scene.subject.bases for word in ("--diskspec", f"{each},snapshot=no") if each != target]
    path.unlink(missing_ok=True)
    options = ["--disk-only", "--no-metadata", "--diskspec", f"{target},file={path}", *disks]
    try:
        virsh(scene, "snapshot-create-as", name, "foreign", *options)
    except NotNowError:
        if str(path) not in virsh(scene, "qemu-monitor-command", name, "--hmp", "info block"):
            raise
        _restart_on(scene, target, path)

    def undo() -> None:
        if _sources(scene).get(target) == path:
            virsh(scene, "blockcommit", name, target, "--active", "--shallow", "--pivot", "--wait")
        path.unlink(missing_ok=True)

    return undo


def _restart_on(scene: Scene, target: str, path: Path) -> None:
    """What the message of such a quarantine asks for: libvirtd has died in the snapshot, and knows nothing of it.

    libvirt 9.0 does where a definition is changed meanwhile (docs/protocol.md).
    """
    file = scene.subject.directory / "named.xml"
    file.write_text(naming(virsh(scene, "dumpxml", scene.subject.name, "--inactive"), target, path))
    virsh(scene, "define", str(file))
    virsh(scene, "destroy", scene.subject.name)
    scene.expect_off(0.0)


def replace_base(scene: Scene, fault: Fault) -> Undo:
    """The name is another file's, and then that of the original again."""
    target, _ = _overlay(scene)
    base = scene.subject.bases[target]
    kept = base.rename(base.with_name(f"kept-{base.name}"))
    shutil.copy(kept, base)
    return lambda: kept.replace(base)


def remove_overlay(scene: Scene, fault: Fault) -> None:
    _, kept = _take_overlay_away(scene)
    kept.unlink()


def replace_overlay(scene: Scene, fault: Fault) -> None:
    overlay, kept = _take_overlay_away(scene)
    shutil.copy(kept, overlay)
    kept.unlink()


def _take_overlay_away(scene: Scene) -> tuple[Path, Path]:
    """Where it was, and where it is."""
    _, overlay = _overlay(scene)
    try:
        return overlay, overlay.rename(overlay.with_name("kept"))
    except FileNotFoundError:  # it has just been merged
        raise NotNowError from None


def _overlay(scene: Scene) -> tuple[str, Path]:
    """The first disk that is on an overlay of ours, and its file; waited for."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ours = set(scene.subject.overlays)
        found = [(target, path) for target, path in _sources(scene).items() if path in ours]
        if found and scene.driving.ended is None:
            return found[0]
        scene.driving.let_go()
        time.sleep(0.05)
    raise NotNowError


def _sources(scene: Scene) -> dict[str, Path]:
    """The image that each disk is on."""
    try:
        xml = scene.host.patiently(scene.subject.guest.live_xml)
    except VMBackupError as error:
        raise NotNowError(str(error)) from error
    return {disk.target: Path(disk.source or "") for disk in chain.disks(xml)} if xml else {}
