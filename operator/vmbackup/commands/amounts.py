"""Durations and sizes for people."""

from __future__ import annotations


def span(seconds: float) -> str:
    """A duration in seconds, in its two largest units."""
    for size, unit, smaller, its_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} {int(seconds % size // smaller)}{its_unit}"
    return f"{max(0, int(seconds))}s"


def size(count: float) -> str:
    """A number of bytes, in a suitable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
