"""SHA-256 beside the input and output, in its own thread (hashlib releases the interpreter's lock)."""

from __future__ import annotations

import hashlib
import queue
import threading
from types import TracebackType
from typing import Self

CHUNK = 512 << 10  # bytes of one buffer, one read and one write: of 256 KiB to 4 MiB, measured as the best
_BUFFERS = 16
_HOLE_STEP = 16 << 20  # bytes of a hole digested without looking up: about 10 ms
_ZEROES = bytes(CHUNK)


class Digester:
    """Digests buffers and holes in the order given, while the caller reads and writes the next ones.

    A context manager. The caller takes a free buffer, fills it, and gives it back with `data`; there are few of them,
    so that reading cannot run away from digesting.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(bytearray(CHUNK))
        self._work: queue.Queue[tuple[bytearray | None, int] | None] = queue.Queue(maxsize=_BUFFERS)
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join()

    def buffer(self) -> bytearray:
        """A free buffer of CHUNK bytes; waits for one."""
        return self._free.get()

    def data(self, buffer: bytearray, length: int) -> None:
        """Digest the first `length` bytes of `buffer`, which belongs to the digester from now on."""
        self._work.put((buffer, length))

    def hole(self, length: int) -> int:
        """Digest zeros: at most `length` bytes, and not more than take some milliseconds. Returns how many."""
        step = min(length, _HOLE_STEP)
        self._work.put((None, step))
        return step

    def hexdigest(self) -> str:
        """The digest of all input, once the block has ended."""
        return self._hash.hexdigest()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            buffer, length = work
            if buffer is None:
                for done in range(0, length, CHUNK):
                    self._hash.update(memoryview(_ZEROES)[: length - done])
            else:
                self._hash.update(memoryview(buffer)[:length])
                self._free.put(buffer)
