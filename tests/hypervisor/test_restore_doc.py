"""The recipes of docs/restore.md, run as they are written, on backups of guests whose images have names of their own.

Fault 3 of 0.1.0: a recipe that looked for images by their target defined the second domain on the images of the first.
"""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox.libvirtd import DiskSpec, Libvirtd, domain_xml
from tests.support.backups import BackupFactory
from tests.support.domains import Domain, make_disk, qemu_img
from tests.support.storage import sha256sum
from vmbackup.api.status import Outcome
from vmbackup.hypervisor.hypervisor import Hypervisor

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "restore.md"
EXAMPLE_FOLDER = "/var/lib/vmbackup/store/default/web-02-1.e7683e29-fbd0-4e1f-ac5a-e98916c7bd54"
NAME, NEW = "web-02", "web-02-restored"  # as in the document
IMAGES = {"vda": "web-02.img", "vdb": "data.qcow2"}
FIRMWARE_BYTES = 64 << 10
BEFORE, AFTER = 0x11, 0x22


@dataclass(frozen=True)
class Original:
    """A guest named as in the document, its backup, and what it wrote since that."""

    domain: Domain
    backup: Path
    copies: Path

    def images(self) -> dict[Path, str]:
        """All files that the guest uses, with their digests."""
        return {path: sha256sum(path) for path in sorted(self.domain.directory.iterdir()) if path.suffix != ".xml"}

    def run(self, heading: str) -> str:
        """Run the recipes below this heading on this guest and its backup; returns what they print."""
        recipe = "".join(recipes(heading))
        for there, here in {
            EXAMPLE_FOLDER: str(self.backup),
            "qemu:///system": f"'{self.domain.libvirtd.uri}'",
            "images=/srv/images": f"images={self.copies}",
            "/srv/images": str(self.domain.directory),
        }.items():
            recipe = recipe.replace(there, here)
        done = subprocess.run(["bash", "-euc", recipe], cwd=self.backup, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def recipes(heading: str) -> list[str]:
    """The shell of one section of the document."""
    section = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)
    text = next(each for each in section if each.startswith(f"{heading}\n"))
    found = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found
    return found


@pytest.fixture
def original(libvirtd: Libvirtd, hypervisor: Hypervisor, backup: BackupFactory, tmp_path: Path) -> Iterator[Original]:
    """No image has the name of its target, one has a template, one is not in the backup; there are UEFI variables."""
    directory, copies = tmp_path / "images", tmp_path / "copies"
    directory.mkdir()
    copies.mkdir()
    domain = define(libvirtd, hypervisor, directory)
    libvirtd.virsh("start", NAME, "--paused")
    for target in IMAGES:
        domain.write(target, BEFORE)
    running = backup(NAME)
    assert running.end().outcome is Outcome.SUCCEEDED, running.report
    for target in IMAGES:
        domain.write(target, AFTER)
    yield Original(domain, running.folder, copies)
    for name in (NAME, NEW):
        with suppress(KeyError):
            libvirtd.kill_guest(name)
        with suppress(RuntimeError):
            libvirtd.virsh("undefine", name, "--nvram")


def define(libvirtd: Libvirtd, hypervisor: Hypervisor, directory: Path) -> Domain:
    root = make_disk(directory, "vda", "raw").path
    data = make_disk(directory, "vdb", "chain").path
    paths = {target: Path(path).rename(directory / IMAGES[target]) for target, path in (("vda", root), ("vdb", data))}
    disc, firmware, variables = directory / "install.iso", directory / "code.fd", directory / "web-02-vars.fd"
    for file in (disc, firmware, variables):
        file.write_bytes(bytes(FIRMWARE_BYTES))
    not_backed_up = make_disk(directory, "vdc", "raw")
    disks = [
        DiskSpec("vda", paths["vda"]),
        DiskSpec("vdb", paths["vdb"], "qcow2"),
        DiskSpec("vdc", not_backed_up.path, inner="<readonly/>"),
        DiskSpec("hdc", disc, device="cdrom", bus="ide", inner="<readonly/>"),
    ]
    uefi = f"<loader readonly='yes' type='pflash'>{firmware}</loader><nvram>{variables}</nvram>"
    xml = directory / "domain.xml"
    xml.write_text(domain_xml(NAME, disks, os_xml=uefi))
    libvirtd.virsh("define", str(xml))
    return Domain(libvirtd, hypervisor.guest(NAME), directory, {each: str(path) for each, path in paths.items()})


def leave_running(_: Original) -> None:
    pass


def switch_off(original: Original) -> None:
    original.domain.libvirtd.virsh("destroy", NAME)


def test_the_digests_are_checked(original: Original) -> None:
    """docs/restore.md, Check it."""
    assert original.run("Check it").count(": OK") == 3


@pytest.mark.parametrize("then", [leave_running, switch_off])
def test_another_domain_beside_it_has_the_backup_and_nothing_of_the_original(
    original: Original, then: Callable[[Original], None]
) -> None:
    """docs/restore.md, Another domain beside it. Fault 3 of 0.1.0."""
    then(original)
    libvirtd = original.domain.libvirtd
    state, before = libvirtd.virsh("domstate", NAME), original.images()

    original.run("Another domain beside it")
    assert libvirtd.virsh("domstate", NEW) == "running"
    assert libvirtd.virsh("domstate", NAME) == state
    live, inactive = (libvirtd.virsh("dumpxml", NEW, *options) for options in ((), ("--inactive",)))
    libvirtd.virsh("destroy", NEW)

    for xml in (live, inactive):
        named = set(re.findall(r"(?:/[^'<]*)?/images/[^'<]*", xml.replace(str(original.copies), "")))
        assert named == {str(original.domain.directory / "code.fd")}, "it shares the firmware, which is read only"
    if then is switch_off:
        assert original.images() == before
    assert not ET.fromstring(inactive).findall(".//disk[@device='disk']/target[@dev='vdc']")
    for target in IMAGES:
        [copy] = original.copies.glob(f"{NEW}-{target}.*")
        assert holds(copy, BEFORE)
        assert "backing-filename" not in qemu_img("info", "--output=json", str(copy))
    assert (original.copies / f"{NEW}-nvram.fd").stat().st_size == FIRMWARE_BYTES
    assert {path.stat().st_mode & 0o077 for path in original.copies.glob("*.xml")} == {0}


def test_the_same_domain_is_back_at_the_moment_of_its_backup(original: Original) -> None:
    """docs/restore.md, The same domain, back to that moment."""
    original.run("The same domain, back to that moment")
    libvirtd = original.domain.libvirtd
    assert libvirtd.virsh("domstate", NAME) == "running"
    for target, path in original.domain.bases.items():
        assert original.domain.live(target).source == path
        assert original.domain.holds(target, BEFORE)


def holds(image: Path, pattern: int) -> bool:
    command = ["qemu-io", "-f", image.suffix[1:], "-r", "-c", f"read -P {pattern:#x} 0 1M", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return "Pattern verification failed" not in done.stdout
