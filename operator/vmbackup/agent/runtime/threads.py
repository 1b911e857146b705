"""Threads for blocking work, outside the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")

_CALLS = 6  # threads for short calls to libvirt, the API server and the file system


class Threads:
    """A few threads for short calls, and one of its own for each backup that runs.

    Cancelling a task that waits here does not end the work, which continues in its thread.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_CALLS, thread_name_prefix="call")
        self._long: set[threading.Thread] = set()

    async def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The result of a short blocking call."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def run(self, function: Callable[[], Result], name: str, *, awaited: bool = True) -> Result:
        """The result of long blocking work. `awaited`: `join` waits for it too."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def deliver(result: Result | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # pyright: ignore[reportArgumentType]

        def work() -> None:
            result, failure = None, None
            try:
                result = function()
            except BaseException as error:
                failure = error
            self._long.discard(threading.current_thread())
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(deliver, result, failure)

        thread = threading.Thread(target=work, name=name, daemon=True)
        if awaited:
            self._long.add(thread)
        thread.start()
        return await future

    def join(self, seconds: float) -> bool:
        """Wait at most this long for the long work. False: some of it is not done."""
        ends = [thread for thread in list(self._long) if thread.is_alive()]
        deadline = time.monotonic() + seconds
        for thread in ends:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._pool.shutdown(wait=False, cancel_futures=True)
        return not any(thread.is_alive() for thread in ends)
