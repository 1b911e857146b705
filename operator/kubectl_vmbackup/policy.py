"""Whether the VMBackupPolicies allow a backup, as far as the API server shows: only libvirt knows the domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kubectl_vmbackup.kubectl import Kubectl, KubectlError, Object, group
from vmbackup.api.names import GROUP
from vmbackup.api.policy import Asked, Operation, Rule, allowed, parse_rules, unknown_domain
from vmbackup.api.resource import BackupResource
from vmbackup.errors import RefusedError

POLICIES = f"vmbackuppolicies.{GROUP}"


@dataclass(frozen=True)
class Answer:
    """`allowed` is None if only the agent of the node knows."""

    allowed: bool | None
    text: str


def ask(kubectl: Kubectl, backup: BackupResource) -> Answer:
    """Whether the policies allow this backup. Raises KubectlError."""
    found = _policies(kubectl)
    if not found:
        return Answer(True, "there is no VMBackupPolicy: everything is allowed")
    return judge(found, backup, _labels(kubectl, backup.metadata.get("namespace") or "default"))


def judge(policies: Mapping[str, Object], backup: BackupResource, labels: Mapping[str, str] | None) -> Answer:
    """Whether these policies, by name, allow it. `labels` of its namespace; None: no permission to see them. Pure."""
    rules: list[Rule] = []
    broken: list[str] = []
    for name, spec in policies.items():
        try:
            rules += parse_rules(spec)
        except RefusedError:  # to the agent such a policy allows nothing
            broken.append(name)
    asked = _asked(backup, labels or {})
    where = f"{asked.namespace} to back up {backup.spec.get('domain')} of {asked.node} to the store {asked.store}"
    aside = f" ({', '.join(broken)} cannot be parsed, and allows nothing)" if broken else ""
    if allowed(rules, asked):
        return Answer(True, f"a VMBackupPolicy allows {where}")
    if labels is None and any(rule.selector for rule in rules):
        return Answer(
            None, f"unknown whether a VMBackupPolicy allows {where}: you may not see the labels of the namespace"
        )
    if allowed([replace(rule, domains=("*",)) for rule in rules], asked):
        return Answer(None, f"no VMBackupPolicy allows {where} under that name of the domain; one may allow its other "
                      f"name or its UUID{aside}")  # fmt: skip
    return Answer(False, f"no VMBackupPolicy allows {where}: ask the administrator for a rule{aside}")


def _asked(backup: BackupResource, labels: Mapping[str, str]) -> Asked:
    name, uuid = unknown_domain(str(backup.spec.get("domain", "")))
    return Asked(
        Operation.BACKUP,
        str(backup.metadata.get("namespace") or "default"),
        labels,
        name,
        uuid or str(backup.status.get("domainUUID", "")),
        backup.node,
        str(group(backup.spec, "storeRef").get("name", "")),
    )


def _policies(kubectl: Kubectl) -> dict[str, Object]:
    try:
        return {body["metadata"]["name"]: group(body, "spec") for body in kubectl.items(POLICIES)}
    except KubectlError as error:
        if error.not_found:
            return {}
        raise


def _labels(kubectl: Kubectl, namespace: str) -> Mapping[str, str] | None:
    try:
        body = kubectl.find("namespace", namespace)
    except KubectlError as error:
        if error.forbidden:
            return None
        raise
    return group(body, "metadata").get("labels") or {} if body else {}
