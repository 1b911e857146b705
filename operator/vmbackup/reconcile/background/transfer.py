"""A long copy in a thread of its own, while the driver goes on observing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from vmbackup.errors import PermanentError, VMBackupError
from vmbackup.imaging import Cancelled, CopyControl

Result = TypeVar("Result")

_PATIENCE = 5.0  # seconds: a copy looks at least five times a second whether it is cancelled


def at_work(name: str) -> bool:
    """Whether a transfer of this name runs in this process: also one that was abandoned, and hangs in a dead store."""
    return any(thread.name == name for thread in threading.enumerate())


class Transfer(Generic[Result]):
    """One piece of work on images: started at once, watched, cancelled.

    `wake` is called when it ends, from its thread.
    """

    def __init__(
        self, work: Callable[[CopyControl], Result], control: CopyControl, wake: Callable[[], None], name: str
    ) -> None:
        self._work = work
        self._control = control
        self._wake = wake
        self._results: list[Result] = []
        self._error: VMBackupError | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether `result` returns at once."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """End it, and wait until it has released every image. If it is stuck in a dead store, release them by force."""
        self._control.cancelled.set()
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._control.abandon()

    def result(self) -> Result:
        """Its result; waits for the end. Raises the error of the work, and PermanentError if it was cancelled."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work(self._control))
        except VMBackupError as error:
            self._error = error
        except Cancelled:
            self._error = PermanentError("the copy was cancelled", reason="Cancelled")
        except Exception as error:  # a copy that dies unseen would leave the guest on its overlay
            self._error = PermanentError(f"the copy failed unexpectedly: {error!r}", reason="InternalError")
        finally:
            self._ended.set()
            self._wake()
