"""The README of a backup's folder: how to restore it with this project gone."""

from __future__ import annotations

from vmbackup.stores.manifest import Manifest

FILE_NAME = "README.txt"


def readme(manifest: Manifest) -> str:
    """How to restore by hand, in the words of this very backup."""
    disks = "\n".join(f"  {disk.file} is the disk {disk.target}, format {disk.format}" for disk in manifest.disks)
    nvram = f"; {manifest.nvram} is its UEFI variable store" if manifest.nvram else ""
    first = manifest.disks[0]
    backing = f"""
   Copy the backing files (backing-*) with them into the same folder, or make one file of both:
   qemu-img convert -O {first.format} {first.file} /var/lib/libvirt/images/{first.file}"""
    return f"""\
Backup of the virtual machine {manifest.domain} as it was at {manifest.snapshot_time:%Y-%m-%d %H:%M:%S} UTC.
{disks}
  {manifest.domain_xml} is its libvirt definition{nvram}. It may hold passwords.

To restore:
1. Check the files: sha256sum each one and compare with "digest" in manifest.json.
2. Copy the disks: cp --sparse=always {first.file} /var/lib/libvirt/images/{backing if manifest.images else ""}
3. Copy {manifest.domain_xml}, let each <source file='...'> name the copy, then: virsh define {manifest.domain_xml}
4. virsh start {manifest.domain}
"""
