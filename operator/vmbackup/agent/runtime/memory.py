"""Returns unused memory to the system, because an agent is idle most of the time, on every hypervisor."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from typing import Any

_M_ARENA_MAX = -8  # mallopt(3)


def one_heap() -> None:
    """Make all threads share one heap; otherwise each backup thread leaves one behind. Does nothing without glibc."""
    with suppress(AttributeError):
        _c_library().mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return free memory, for example some 10 MB after the imports. Does nothing without glibc."""
    gc.collect()
    with suppress(AttributeError):
        _c_library().malloc_trim(0)


def _c_library() -> Any:
    return ctypes.CDLL(None)
