"""Durable definitions: a domain's persistent XML in libvirt's directory, read back and fsynced."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from vmbackup.errors import Cause, PermanentError, TransientError, VMBackupError
from vmbackup.hypervisor.chain import disks


def sync_definition(directory: Path, name: str, uuid: str, images: Mapping[str, str]) -> bool:
    """Whether the file of the domain `name` names these images (target to path); if so, it is durable on return.

    Also False if the file is missing, truncated, or of another domain. Raises PermanentError
    (ConfigDirectoryMissing) if the directory or the file cannot be read, TransientError (ConfigNotDurable) if its
    file system fails.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _config_error(f"{name}: libvirt's configuration directory {directory}", error) from error
    try:
        return _sync(folder, f"{name}.xml", uuid, images)
    except OSError as error:
        raise _config_error(f"{name}.xml in libvirt's configuration directory {directory}", error) from error
    finally:
        os.close(folder)


def _sync(folder: int, name: str, uuid: str, images: Mapping[str, str]) -> bool:
    try:
        file = os.open(name, os.O_RDONLY, dir_fd=folder)
    except FileNotFoundError:
        return False
    with os.fdopen(file, "rb") as reader:
        xml = reader.read()
        try:
            root = fromstring(xml)
            sources = {disk.target: disk.source for disk in disks(xml.decode())}
        except (ElementTree.ParseError, DefusedXmlException, UnicodeDecodeError):  # truncated: it names no image
            return False
        if root.findtext("uuid") != uuid or any(sources.get(target) != image for target, image in images.items()):
            return False
        os.fsync(file)
    os.fsync(folder)
    return True


def _config_error(what: str, error: OSError) -> VMBackupError:
    """A directory that is missing or forbidden is an installation error; any other error is transient."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM):
        cure = "mount it into the agent's container at the same path, or let the agent read it"
        return PermanentError(
            f"{what} cannot be read ({error.strerror}): {cure}", reason=Cause.CONFIG_DIRECTORY_MISSING
        )
    cure = "check its file system"
    return TransientError(f"{what} cannot be made durable ({error.strerror}): {cure}", reason=Cause.CONFIG_NOT_DURABLE)
