"""What a soak has done and found. Every method may be called by any thread."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any


class Tally:
    """Counts, and writes every choice and every end as a line of JSON to `log`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.backups: Counter[str] = Counter()  # by outcome
        self.faults: Counter[str] = Counter()  # by kind
        self.idle: Counter[str] = Counter()  # faults that found nothing to happen to
        self.helped: Counter[str] = Counter()  # what a human had to do
        self.findings: list[str] = []
        self.lost = 0
        self.records = 0
        self.checks = 0
        self.suspended = 0.0  # seconds at one stretch, where every call was answered
        self.suspended_in_doubt = 0.0  # where one was not
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def note(self, what: str, **facts: Any) -> None:
        """A line for the log."""
        line = {"seconds": round(time.monotonic() - self._started, 2), "what": what, **facts}
        with self._lock, self.log.open("a") as log:
            print(json.dumps(line, default=str), file=log)

    def count(self, counter: Counter[str], what: str) -> None:
        """One more of it."""
        with self._lock:
            counter[what] += 1

    def found(self, what: str, *, lost: int = 0) -> None:
        """Something is wrong."""
        with self._lock:
            self.findings.append(what)
            self.lost += lost
        self.note("FOUND", text=what)

    def checked(self, number: int = 1) -> None:
        """So many statements about the world were proven."""
        with self._lock:
            self.checks += number

    def stood_still(self, seconds: float, *, in_doubt: bool) -> None:
        """A guest was suspended by us for so long."""
        with self._lock:
            if in_doubt:
                self.suspended_in_doubt = max(self.suspended_in_doubt, seconds)
            else:
                self.suspended = max(self.suspended, seconds)

    @property
    def text(self) -> str:
        """The summary."""
        lines = [
            _line("backups", self.backups),
            _line("faults", self.faults),
            _line("faults that found nothing to happen to", self.idle),
            _line("what a human had to do", self.helped),
            f"records acknowledged: {self.records}; lost records: {self.lost}",
            f"longest suspension: {self.suspended:.1f} s, with a call unanswered {self.suspended_in_doubt:.1f} s",
            f"checks: {self.checks}, failed: {len(self.findings)}",
            *(f"FOUND {finding}" for finding in self.findings),
        ]
        return "\n".join(lines)


def _line(name: str, counter: Counter[str]) -> str:
    each = ", ".join(f"{what} {number}" for what, number in counter.most_common())
    return f"{name}: {counter.total()}{f' ({each})' if each else ''}"
