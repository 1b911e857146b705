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
class StateGauge:
    """A gauge that has a sample only while what it tells of is there.

    The first `keys` of its labels say what a sample is about, so there is one for each; the others tell of it.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    keys: int


class StateGauges(Collector):
    """The samples of some gauges. All methods may be called from any thread."""

    def __init__(self, gauges: Sequence[StateGauge]) -> None:
        self._lock = threading.Lock()
        self._samples: dict[StateGauge, dict[tuple[str, ...], tuple[tuple[str, ...], Value]]] = {
            gauge: {} for gauge in gauges
        }

    def put(self, gauge: StateGauge, labels: tuple[str, ...], value: Value | float = 1.0) -> None:
        """From now on this is so; it takes the place of what was known of the same."""
        look = value if callable(value) else lambda: value
        with self._lock:
            self._samples[gauge][labels[: gauge.keys]] = (labels, look)

    def drop(self, gauge: StateGauge, *key: str) -> None:
        """Not any more, or it never was."""
        with self._lock:
            self._samples[gauge].pop(key, None)

    def collect(self) -> Iterator[Metric]:
        """All that is so, for a scrape."""
        with self._lock:
            shown = {gauge: list(samples.values()) for gauge, samples in self._samples.items()}
        for gauge, samples in shown.items():
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)
            for labels, look in samples:
                if (value := look()) is not None:
                    family.add_metric(labels, value)
            yield family
