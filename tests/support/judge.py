"""What GitOps tools say of objects: kstatus itself, and Argo CD's interpreter of health checks (sandbox/judge)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox import binaries

HEALTH_CHECK = (
    Path(__file__)
    .parents[2]
    .joinpath("manifests/gitops/argo-cd/resource_customizations/vmbackup.dev/VMBackup/health.lua")
)


@dataclass(frozen=True)
class Verdict:
    """What a tool says of an object."""

    status: str
    message: str


def kstatus(*objects: Mapping[str, Any]) -> list[Verdict]:
    """What Flux waits for: Current, InProgress, Failed or Terminating, of each object."""
    return _judged(["kstatus"], objects)


def argo_cd(*objects: Mapping[str, Any], check: Path = HEALTH_CHECK) -> list[Verdict]:
    """What Argo CD shows with our health check: Healthy, Progressing or Degraded, of each object."""
    return _judged(["lua", str(check)], objects)


def _judged(arguments: list[str], objects: Iterable[Mapping[str, Any]]) -> list[Verdict]:
    lines = "".join(f"{json.dumps(each)}\n" for each in objects)
    command = [binaries.path("judge"), *arguments]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Verdict(**json.loads(line)) for line in done.stdout.splitlines()]
