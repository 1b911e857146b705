"""What becomes of what is stored."""

from __future__ import annotations

import pytest

from tests.unit.decisions import finished
from vmbackup.errors import PermanentError, RefusedError, TransientError, VMBackupError
from vmbackup.protocol.record import Copy
from vmbackup.reconcile.background.copying import delete_stored
from vmbackup.stores.base import Store


def failing(error: VMBackupError) -> Store:
    """What opening a store is that cannot be opened."""
    raise error


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (RefusedError("spec.directory.path is not absolute", reason="InvalidStore"), PermanentError),
        (TransientError("the store is away", reason="StoreAway"), TransientError),
    ],
)
def test_what_is_known_to_be_stored_and_cannot_be_deleted_is_told_and_tried_again(
    raised: VMBackupError, told: type[VMBackupError]
) -> None:
    """Not that the backup is refused, which would end it: its data would stay for ever."""
    with pytest.raises(VMBackupError, match=str(raised)) as caught:
        delete_stored(finished(location="/store/a"), lambda: failing(raised))
    assert (type(caught.value), caught.value.reason) == (told, raised.reason)


def test_what_may_be_stored_keeps_nobody_where_the_store_does_not_answer() -> None:
    delete_stored(finished(copy=Copy.FAILED), lambda: failing(TransientError("away", reason="StoreAway")))
