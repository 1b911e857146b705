"""Gauges of current state: read at each scrape; a sample exists only while its subject does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Value = Callable[[], float | None]
"""The current value; None if it cannot be read."""


@dataclass(frozen=True)
class StateGauge:
    """A gauge that has a sample only while its subject exists.

    The first `keys` labels identify the subject, which has one sample; the other labels describe it.
    """

    name: str
    help: str
    labels: tuple[str, ...]
    keys: int


class StateGauges(Collector):
    """The samples of several gauges. All methods may be called from any thread."""

    def __init__(self, gauges: Sequence[StateGauge]) -> None:
        self._lock = threading.Lock()
        self._samples: dict[StateGauge, dict[tuple[str, ...], tuple[tuple[str, ...], Value]]] = {
            gauge: {} for gauge in gauges
        }

    def put(self, gauge: StateGauge, labels: tuple[str, ...], value: Value | float = 1.0) -> None:
        """Set a sample, replacing an older one of the same subject."""
        look = value if callable(value) else lambda: value
        with self._lock:
            self._samples[gauge][labels[: gauge.keys]] = (labels, look)

    def drop(self, gauge: StateGauge, *key: str) -> None:
        """Remove a sample, if there is one."""
        with self._lock:
            self._samples[gauge].pop(key, None)

    def collect(self) -> Iterator[Metric]:
        """All current samples, for a scrape."""
        with self._lock:
            shown = {gauge: list(samples.values()) for gauge, samples in self._samples.items()}
        for gauge, samples in shown.items():
            family = GaugeMetricFamily(gauge.name, gauge.help, labels=gauge.labels)
            for labels, look in samples:
                if (value := look()) is not None:
                    family.add_metric(labels, value)
            yield family
