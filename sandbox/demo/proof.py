"""Proves that a backup is complete: the stored images, and the guest's images after it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sandbox.guest import Guest
from sandbox.oracle import Bounds, ProofError, prove, prove_snapshot


def acknowledged(guest: Guest) -> dict[str, int]:
    """The last record that the guest has acknowledged, for each disk."""
    return {target: guest.acknowledged(target) for target in guest.disks}


def prove_copy(folder: Path, bounds: Bounds) -> Iterator[str]:
    """Prove the folder of a backup, from its own files only; yields each proven statement. Raises ProofError."""
    manifest = json.loads((folder / "manifest.json").read_text())
    disks = {disk["target"]: disk for disk in manifest["disks"]}
    images = {target: folder / disk["file"] for target, disk in disks.items()}
    for target, image in images.items():
        disk = disks[target]
        if (digest := f"sha256:{_sha256(image)}") != disk["digest"]:
            raise ProofError(f"{image}: its digest is {digest}, the manifest has {disk['digest']}")
    found = prove_snapshot(images, bounds, formats={target: disk["format"] for target, disk in disks.items()})
    for target, journal in zip(sorted(images), found, strict=True):
        yield f"{target}: sha256 as in the manifest, no errors found by fsck, {journal}"
    ends = ", ".join(str(journal.last) for journal in found)
    yield f"the disks are from the same moment: they end with records {ends}"


def prove_guest(guest: Guest) -> Iterator[str]:
    """Prove that the guest still writes and has lost nothing; yields each proven statement. Raises ProofError.

    It is suspended for a moment while its images are copied: fsck cannot check the image of a running guest.
    """
    guest.wait_for_more(20)
    guest.assert_only_rising()
    now = min(acknowledged(guest).values())
    yield f"the guest still writes: it has acknowledged record {now}, and each number once"
    with tempfile.TemporaryDirectory(dir=guest.directory) as temporary:
        copies = {target: Path(temporary, target) for target in guest.disks}
        with guest.suspended():
            wanted = acknowledged(guest)
            for target, disk in guest.disks.items():
                subprocess.run(["cp", "--reflink=auto", "--sparse=always", disk.path, copies[target]], check=True)
        for target, disk in guest.disks.items():
            found = prove(copies[target], acknowledged_at_least=wanted[target], image_format=disk.format)
            yield f"{target}: the guest's image now holds {found}; {wanted[target]} were acknowledged"


def _sha256(path: Path) -> str:
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return done.stdout.split()[0].removeprefix("\\")
