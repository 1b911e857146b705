"""Runs kubectl."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Object = Mapping[str, Any]

FAILED, USAGE, INTERRUPTED = 1, 2, 130  # exit codes


class PluginError(Exception):
    """The command cannot be carried out. The message gives the reason and the cure."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class KubectlError(PluginError):
    """Kubectl failed; the message is its output."""

    @property
    def not_found(self) -> bool:
        """The object, or its kind, does not exist."""
        return "(NotFound)" in str(self) or "the server doesn't have a resource type" in str(self)

    @property
    def forbidden(self) -> bool:
        """RBAC denies it."""
        return "(Forbidden)" in str(self)


@dataclass(frozen=True)
class Kubectl:
    """`flags` go before each command, such as --context."""

    flags: tuple[str, ...] = ()

    def run(self, *words: str, stdin: str = "") -> str:
        """The output of kubectl. Raises KubectlError."""
        done = subprocess.run(
            [_program(), *self.flags, *words], input=stdin, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise KubectlError(done.stderr.strip() or f"kubectl {words[0]} failed with exit code {done.returncode}")
        return done.stdout

    def get(self, *words: str) -> Object:
        """`kubectl get … -o json`. Raises KubectlError."""
        return json.loads(self.run("get", *words, "-o", "json"))

    def items(self, *words: str) -> Sequence[Object]:
        """The objects of a list. Raises KubectlError."""
        return self.get(*words)["items"]

    def find(self, *words: str) -> Object | None:
        """An object; None if it does not exist. Raises KubectlError otherwise, for example without permission."""
        try:
            return self.get(*words)
        except KubectlError as error:
            if error.not_found:
                return None
            raise


def group(body: Object, name: str) -> Object:
    """A mapping of an object, empty if it is missing."""
    found: Object | None = body.get(name)
    return found or {}


def entries(body: Object, name: str) -> Sequence[Object]:
    """A list of an object, empty if it is missing."""
    found: Sequence[Object] | None = body.get(name)
    return found or ()


def condition(body: Object, kind: str) -> Object:
    """A condition of an object's status, empty if it is missing."""
    for each in entries(group(body, "status"), "conditions"):
        if each.get("type") == kind:
            return each
    return {}


def _program() -> str:
    program = shutil.which(os.environ.get("KUBECTL", "kubectl"))
    if program is None:
        raise PluginError("kubectl is not on PATH: install it, or set the environment variable KUBECTL to its path")
    return program
