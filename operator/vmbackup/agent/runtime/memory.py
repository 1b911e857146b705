"""Memory that is not needed goes back to the system: an agent does nothing most of the time, on every hypervisor."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from typing import Any

_M_ARENA_MAX = -8  # mallopt(3)


def one_heap() -> None:
    """Let all threads share one heap: else each of those that run backups leaves one behind. Nothing without glibc."""
    with suppress(AttributeError):
        _c_library().mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Give back what is free, such as what importing left behind: some 10 MB. Nothing without glibc."""
    gc.collect()
    with suppress(AttributeError):
        _c_library().malloc_trim(0)


def _c_library() -> Any:
    return ctypes.CDLL(None)
