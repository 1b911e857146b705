"""Where backups live."""

from vmbackup.api.spec import StoreSpec
from vmbackup.stores.base import Store
from vmbackup.stores.directory import DirectoryStore


def open_store(spec: StoreSpec) -> Store:
    """The store that a VMBackupStore describes. Touches nothing yet."""
    return DirectoryStore(spec.directory.path)
