"""Which overlays are there: a file system that does not answer stops neither the event loop nor the sweep."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from vmbackup.agent.runtime.threads import Threads

_log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds


class ExistingFiles:
    """Belongs to the event loop. Asks in one thread at a time, so that none but one is lost where a mount is dead."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._turn = asyncio.Lock()
        self._asked: asyncio.Task[set[str]] | None = None

    async def of(self, paths: Iterable[str]) -> set[str]:
        """Those of these files that are there. While nothing can be told, all of them count as there."""
        if not (wanted := set(paths)):
            return wanted
        async with self._turn:
            if self._asked is None or self._asked.done():
                look = self._threads.run(lambda: set(filter(_is_there, wanted)), "existing-files", awaited=False)
                self._asked = asyncio.create_task(look)
                await asyncio.wait([self._asked], timeout=_PATIENCE)
            if self._asked.done():
                found = self._asked.result()
                self._asked = None
                return found
        _log.warning("a file system does not answer, of one of these: %s", ", ".join(sorted(wanted)))
        return wanted


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # it cannot be told
        return True
