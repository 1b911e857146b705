"""The status of a VMBackup as it changes."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from sandbox import binaries
from sandbox.kube import KubeApi
from sandbox.processes import SandboxError

Status = dict[str, Any]


def statuses(kube: KubeApi, name: str, *, alive: Callable[[], bool], seconds: float = 300) -> Iterator[Status | None]:
    """Each status of VMBackup `name`, and None every 0.2 s without one, until it has finished (that one included).

    Raises SandboxError when `alive()` is no longer true, or after `seconds`.
    """
    command = [
        binaries.path("kubectl"),
        f"--kubeconfig={kube.kubeconfig}",
        "get",
        "vmbackup",
        f"--field-selector=metadata.name={name}",  # it need not be there yet
        "--watch",
        "-o",
        "json",
    ]
    deadline = time.monotonic() + seconds
    seen: queue.Queue[Status] = queue.Queue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        threading.Thread(target=_read, args=(process.stdout, seen), daemon=True).start()
        try:
            while True:
                try:
                    status = seen.get(timeout=0.2)
                except queue.Empty:
                    status = None
                yield status
                if status and condition(status, "Ready").get("status") in ("True", "False"):
                    return
                if status is None and not alive():
                    raise SandboxError("the agent has ended")
                if time.monotonic() > deadline:
                    raise SandboxError(f"the backup is not finished after {seconds:.0f} s")
        finally:
            process.terminate()


def condition(status: Status, kind: str) -> dict[str, str]:
    """The condition of this type, empty if there is none."""
    return next((one for one in status.get("conditions", []) if one["type"] == kind), {})


def _read(stream: IO[str], seen: queue.Queue[Status]) -> None:
    """kubectl prints one indented object after another; the line `}` ends each."""
    lines: list[str] = []
    for line in stream:
        lines.append(line)
        if line == "}\n":
            seen.put(json.loads("".join(lines)).get("status", {}))
            lines.clear()
