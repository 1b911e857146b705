"""Which kind of store a VMBackupStore describes: one line for each kind."""

from __future__ import annotations

from vmbackup.api.store import StoreSpec
from vmbackup.stores.base import Store
from vmbackup.stores.directory.store import DirectoryStore


def open_store(spec: StoreSpec) -> Store:
    """The store that a VMBackupStore describes. Touches nothing yet."""
    return DirectoryStore(spec.directory.path)
