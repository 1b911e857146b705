"""`kubectl vmbackup check`: whether a backup can be taken, as far as the API server shows. Changes nothing.

Domain, disks, space and locks are known to the hypervisor only: run `vmbackup check` there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from kubectl_vmbackup import advice, policy
from kubectl_vmbackup.backup import BACKUPS, STORES, every, find, now
from kubectl_vmbackup.kubectl import FAILED, USAGE, Kubectl, KubectlError, Object, PluginError, group
from kubectl_vmbackup.node import AGENT_LABELS, look
from kubectl_vmbackup.view import printable
from vmbackup.api.names import GROUP
from vmbackup.api.resource import BackupResource


class Verdict(StrEnum):
    """The result for one prerequisite."""

    GOOD = "ok"
    BAD = "NO"
    OPEN = "?"  # cannot be determined from here


@dataclass(frozen=True)
class Finding:
    """One prerequisite and its result."""

    verdict: Verdict
    text: str


Findings = Iterator[Finding]


def check(kubectl: Kubectl, name: str | None, file: str | None) -> int:
    """Print the findings; the exit code. Raises PluginError if nothing can be checked."""
    if name and file:
        raise PluginError("set at most one of NAME and -f", USAGE)
    bad = False
    for title, findings in _subjects(kubectl, name, file):
        print(printable(title))
        for finding in findings:
            bad = bad or finding.verdict is Verdict.BAD
            print(printable(f"  {finding.verdict:<3} {finding.text}"), flush=True)
    return FAILED if bad else 0


def _subjects(kubectl: Kubectl, name: str | None, file: str | None) -> Iterator[tuple[str, Findings]]:
    if name:
        backup = find(kubectl, name)
        yield f"{backup.namespace}/{backup.name}", _of_existing(kubectl, backup)
    elif file:
        for body, stores in _manifests(kubectl, file):
            metadata = body["metadata"]
            title = metadata.get("name") or f"{metadata.get('generateName', '')}…"
            yield f"{metadata.get('namespace')}/{title}", _of_manifest(kubectl, body, stores)
    else:
        yield "The installation", _of_installation(kubectl)


# -- a VMBackup


def _manifests(kubectl: Kubectl, file: str) -> Iterator[tuple[Object, set[str]]]:
    """Each VMBackup of a file as kubectl reads it, and the stores that the file defines."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text() if Path(file).is_file() else None
    if text is None:
        raise PluginError(f"there is no file {file}", USAGE)
    read = kubectl.run("create", "--dry-run=client", "-f", "-", "-o", "json", stdin=text)
    bodies = [each for body in _documents(read) for each in body.get("items", [body])]
    stores = {body["metadata"]["name"] for body in bodies if body["kind"] == "VMBackupStore"}
    found = [body for body in bodies if body["kind"] == "VMBackup"]
    if not found:
        raise PluginError(f"there is no VMBackup in {file}", USAGE)
    return ((body, stores) for body in found)


def _documents(text: str) -> Iterator[Any]:
    """Concatenated JSON documents."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        body, at = decoder.raw_decode(text, at)
        yield body
        at += len(text[at:]) - len(text[at:].lstrip())


def _of_manifest(kubectl: Kubectl, body: Object, stores: set[str]) -> Findings:
    verb = ["apply", "--server-side"] if body["metadata"].get("name") else ["create"]
    try:
        kubectl.run(*verb, "--dry-run=server", "-f", "-", stdin=json.dumps(body))
        yield Finding(Verdict.GOOD, "the API server accepts it (tested with --dry-run=server)")
    except KubectlError as error:
        yield Finding(Verdict.BAD, f"the API server refuses it: {error}")
    yield from _around(kubectl, BackupResource(body), stores)


def _of_existing(kubectl: Kubectl, backup: BackupResource) -> Findings:
    wrong = not backup.running and not backup.ready
    state = f"{backup.phase}, {backup.reason}: {backup.message}"
    yield Finding(Verdict.BAD if wrong else Verdict.GOOD, state)
    yield from _around(kubectl, backup, set())
    yield Finding(Verdict.OPEN, f"next: {advice.next_step(backup, now()).text}")


def _around(kubectl: Kubectl, backup: BackupResource, stores: set[str]) -> Findings:
    """The other prerequisites of a VMBackup."""
    store = str(group(backup.spec, "storeRef").get("name", ""))
    yield from _store(kubectl, store, stores)
    yield _policy(kubectl, backup)
    yield from _agent(kubectl, backup.node)
    yield from _others(kubectl, backup)
    domain, node = backup.spec.get("domain"), backup.node
    yield Finding(Verdict.OPEN, f"to check that {domain} is on {node}, runs and has space: run vmbackup check there")


def _store(kubectl: Kubectl, store: str, stores: set[str]) -> Findings:
    if store in stores:
        yield Finding(Verdict.GOOD, f"the store {store} is in the same file")
        return
    try:
        there = kubectl.find(STORES, store) is not None
    except KubectlError as error:
        yield _unseen(f"the store {store}", error)
        return
    if there:
        yield Finding(Verdict.GOOD, f"the store {store} exists")
    else:
        yield Finding(Verdict.BAD, f"there is no VMBackupStore {store}: set spec.storeRef.name to one that "
                      "`kubectl get vmbackupstores` lists, or create it")  # fmt: skip


def _policy(kubectl: Kubectl, backup: BackupResource) -> Finding:
    try:
        answer = policy.ask(kubectl, backup)
    except KubectlError as error:
        return _unseen("policies", error)
    verdict = {True: Verdict.GOOD, False: Verdict.BAD, None: Verdict.OPEN}[answer.allowed]
    return Finding(verdict, answer.text)


def _agent(kubectl: Kubectl, name: str) -> Findings:
    signs = look(kubectl, name)
    if signs.agent_ready:
        yield Finding(Verdict.GOOD, f"the agent of {name} is ready: the pod {signs.agent_ready}")
    elif signs.agent_pod:
        yield Finding(Verdict.BAD, f"the agent of {name} is not ready: see the pod {signs.agent_pod}")
    elif signs.exists and signs.pods is not None:
        yield Finding(Verdict.BAD, f"no agent runs on the node {name}: label it vmbackup.dev/hypervisor=true")
    elif signs.last_write is not None:
        age = advice.span(now() - signs.last_write)
        yield Finding(Verdict.OPEN, f"no agent pod is visible on {name}; its agent wrote a status {age} ago")
    else:
        seen = f"unknown whether an agent runs on {name}: it has no visible Node, pod or status"
        yield Finding(Verdict.OPEN, f"{seen}; outside the cluster run there: systemctl status vmbackup-agent")


def _others(kubectl: Kubectl, backup: BackupResource) -> Findings:
    """Other VMBackups of the same domain that may be read."""
    selector = f"--field-selector=spec.nodeName={backup.node}"
    try:
        found = every(kubectl, "-A", selector)
    except KubectlError as error:
        if not error.forbidden:
            raise
        found = every(kubectl, selector)
    domain = {backup.spec.get("domain"), backup.status.get("domainUUID")} - {None}
    for other in found:
        same = {other.spec.get("domain"), other.status.get("domainUUID")} & domain
        if not same or (other.namespace, other.name) == (backup.namespace, backup.metadata.get("name")):
            continue
        path = f"{other.namespace}/{other.name}"
        if other.running:
            yield Finding(Verdict.OPEN, f"{path} is backing up the same domain; this one waits for it")
        elif other.left_on_overlay:
            yield Finding(Verdict.OPEN, f"{path} has left this domain on an overlay, which is merged first")


# -- the installation


def _of_installation(kubectl: Kubectl) -> Findings:
    yield from _crds(kubectl)
    yield from _stores(kubectl)
    yield from _agents(kubectl)
    yield from _permissions(kubectl)


def _crds(kubectl: Kubectl) -> Findings:
    try:
        served = kubectl.run("api-resources", f"--api-group={GROUP}", "-o", "name").split()
    except KubectlError as error:
        yield _unseen("resources of the API server", error)
        return
    for name in (BACKUPS, STORES, policy.POLICIES):
        plural = name.partition(".")[0]
        if name in served:
            yield Finding(Verdict.GOOD, f"the API server serves {plural}")
        else:
            yield Finding(Verdict.BAD, f"the API server does not know {plural}: apply the CRDs of this release "
                          "(kubectl apply --server-side -k crds/, or its install.yaml)")  # fmt: skip


def _stores(kubectl: Kubectl) -> Findings:
    try:
        names = [body["metadata"]["name"] for body in kubectl.items(STORES)]
    except KubectlError as error:
        if not error.not_found:
            yield _unseen("stores", error)
        return
    if names:
        yield Finding(Verdict.GOOD, f"stores: {', '.join(names)}")
    else:
        yield Finding(Verdict.BAD, "there is no VMBackupStore: backups have nowhere to go")


def _agents(kubectl: Kubectl) -> Findings:
    try:
        pods = kubectl.items("pods", "-A", "-l", AGENT_LABELS)
        nodes = kubectl.items("nodes", "-l", f"{GROUP}/hypervisor=true")
    except KubectlError as error:
        yield _unseen("agents", error)
        return
    names = {body["metadata"]["name"] for body in nodes} | {str(pod["spec"].get("nodeName", "")) for pod in pods}
    for name in sorted(names - {""}):
        yield from _agent(kubectl, name)
    if not names:
        yield Finding(
            Verdict.OPEN, f"no node is labelled {GROUP}/hypervisor=true: are all hypervisors outside the cluster?"
        )


def _permissions(kubectl: Kubectl) -> Findings:
    for verb, why in (("create", "create VMBackups"), ("patch", "retry and cancel"), ("delete", "delete them")):
        may = _may(lambda verb=verb: kubectl.run("auth", "can-i", verb, BACKUPS))
        yield Finding(Verdict.GOOD if may else Verdict.OPEN, f"you may {'' if may else 'not '}{why} in this namespace")


def _may(ask: Callable[[], str]) -> bool:
    """`kubectl auth can-i` also answers no with its exit code."""
    try:
        return ask().strip() == "yes"
    except KubectlError:
        return False


def _unseen(what: str, error: KubectlError) -> Finding:
    """It may not be read. Raises the error if it is not about permission."""
    if not error.forbidden:
        raise error
    return Finding(Verdict.OPEN, f"{what}: you may not look")
