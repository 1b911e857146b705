"""Checks which overlays exist, without blocking the event loop or the sweep on a file system that hangs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from vmbackup.agent.runtime.threads import Threads

_log = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds


class ExistingFiles:
    """Belongs to the event loop. Uses one thread at a time, so a dead mount blocks only that one."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._turn = asyncio.Lock()
        self._asked: asyncio.Task[set[str]] | None = None

    async def of(self, paths: Iterable[str]) -> set[str]:
        """Those of these files that exist. While a file system hangs, all count as existing."""
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
        _log.warning("a file system of one of these files does not answer: %s", ", ".join(sorted(wanted)))
        return wanted


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # unknown
        return True
