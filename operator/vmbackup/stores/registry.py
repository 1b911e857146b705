"""The kinds of stores. One more kind is one more folder here, one more line below, and one more conformance test."""

from __future__ import annotations

from vmbackup.api.store import StoreSpec
from vmbackup.stores.base import Store
from vmbackup.stores.directory.store import DirectoryStore


def open_store(spec: StoreSpec) -> Store:
    """The store that a VMBackupStore describes. Touches nothing yet."""
    return DirectoryStore(spec.directory.path)
