"""The README.txt in the folder of a backup: how to restore the backup without vmbackup."""

from __future__ import annotations

import shlex

from vmbackup.stores.manifest import Manifest, StoredDisk

FILE_NAME = "README.txt"


def readme(manifest: Manifest) -> str:
    """The text: how to restore this backup by hand, with its names in every command."""
    disks = "\n".join(f"  {disk.file} is the disk {disk.target}, format {disk.format}" for disk in manifest.disks)
    nvram = f"; {manifest.nvram} is its UEFI variable store" if manifest.nvram else ""
    copies = "\n".join(f"   {_copy(disk)}" for disk in manifest.disks)
    merged = "\n   qemu-img merges a disk and its backing files into one image: remove its <backingStore> in step 4."
    variables = f"\n   Copy {manifest.nvram} to the path of <nvram> in {manifest.domain_xml}." if manifest.nvram else ""
    domain = shlex.quote(manifest.domain)
    return f"""\
Backup of the virtual machine {manifest.domain} as it was at {manifest.snapshot_time:%Y-%m-%d %H:%M:%S} UTC.
{disks}
  {manifest.domain_xml} is its libvirt definition{nvram}. It may hold passwords.

To restore it without vmbackup, in this folder:
1. Check the files: run sha256sum on each one and compare the output with its "digest" in manifest.json.
2. If a domain of this name is running, shut it down. Its disks must not be on a `*.vmb-*.qcow2` file:
   virsh domblklist --inactive {domain}
3. Copy each disk to its new place, for example:
{copies}{merged if any(disk.backing for disk in manifest.disks) else ""}{variables}
4. Make a copy of {manifest.domain_xml}. In each <source file='...'>, write the path of the copied disk. Then:
   virsh define {manifest.domain_xml}
5. virsh start {domain}
"""


def _copy(disk: StoredDisk) -> str:
    target = f"/var/lib/libvirt/images/{disk.file}"
    if disk.backing:
        return f"qemu-img convert -O {disk.format} {disk.file} {target}"
    return f"cp --sparse=always {disk.file} {target}"
