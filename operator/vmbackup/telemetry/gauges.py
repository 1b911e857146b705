"""What is so at this moment, as gauges: looked up at each scrape, and gone from it when it is no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Value = Callable[[], float | None]
"""The value at this moment; None where it cannot be seen."""


@dataclass(frozen=True)
class Level:
    """A gauge that has a sample only while what it tells of is there.

    The first `keys` of its labels say what a sample is about, so there is one for each; the others tell of it.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    keys: int


class Levels(Collector):
    """The samples of some levels. All methods may be called from any thread."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self._lock = threading.Lock()
        self._samples: dict[Level, dict[tuple[str, ...], tuple[tuple[str, ...], Value]]] = {
            level: {} for level in levels
        }

    def put(self, level: Level, labels: tuple[str, ...], value: Value | float = 1.0) -> None:
        """From now on this is so; it takes the place of what was known of the same."""
        look = value if callable(value) else lambda: value
        with self._lock:
            self._samples[level][labels[: level.keys]] = (labels, look)

    def drop(self, level: Level, *key: str) -> None:
        """Not any more, or it never was."""
        with self._lock:
            self._samples[level].pop(key, None)

    def collect(self) -> Iterator[Metric]:
        """All that is so, for a scrape."""
        with self._lock:
            shown = {level: list(samples.values()) for level, samples in self._samples.items()}
        for level, samples in shown.items():
            family = GaugeMetricFamily(level.name, level.help, labels=level.labels)
            for labels, look in samples:
                if (value := look()) is not None:
                    family.add_metric(labels, value)
            yield family
