"""Kubectl, called as a program."""

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
    """It cannot be done; the message says why, and what to do."""

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class KubectlError(PluginError):
    """Kubectl failed; the message is what it said."""

    @property
    def not_found(self) -> bool:
        """There is no such object, or no such kind of objects."""
        return "(NotFound)" in str(self) or "the server doesn't have a resource type" in str(self)

    @property
    def forbidden(self) -> bool:
        """RBAC does not allow it."""
        return "(Forbidden)" in str(self)


@dataclass(frozen=True)
class Kubectl:
    """`flags` go before each command, such as --context."""

    flags: tuple[str, ...] = ()

    def run(self, *words: str, stdin: str = "") -> str:
        """What kubectl prints. Raises KubectlError."""
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
        """An object; None if there is none. Raises KubectlError for all else, such as no permission."""
        try:
            return self.get(*words)
        except KubectlError as error:
            if error.not_found:
                return None
            raise


def group(body: Object, name: str) -> Object:
    """A part of an object; empty where it is not there."""
    found: Object | None = body.get(name)
    return found or {}


def entries(body: Object, name: str) -> Sequence[Object]:
    """A list of an object; empty where it is not there."""
    found: Sequence[Object] | None = body.get(name)
    return found or ()


def condition(body: Object, kind: str) -> Object:
    """A condition of an object's status; empty if there is none."""
    for each in entries(group(body, "status"), "conditions"):
        if each.get("type") == kind:
            return each
    return {}


def _program() -> str:
    program = shutil.which(os.environ.get("KUBECTL", "kubectl"))
    if program is None:
        raise PluginError("kubectl is not on PATH: install it, or name it in the environment variable KUBECTL")
    return program
