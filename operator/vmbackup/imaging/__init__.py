"""Disk images as files: QEMU's locks, clone, sparse copy, digest, throttle. No policy, no libvirt."""

from vmbackup.imaging.control import Cancelled, CopyControl

__all__ = ["Cancelled", "CopyControl"]
