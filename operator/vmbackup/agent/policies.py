"""Checks a backup against the VMBackupPolicies of the cluster."""

from __future__ import annotations

import logging

from vmbackup.api.policy import Asked, Operation, Rule, allowed, parse_rules
from vmbackup.cluster.client import Cluster
from vmbackup.cluster.events import Events, NodeRef
from vmbackup.errors import PermanentError, RefusedError, TransientError, VMBackupError
from vmbackup.telemetry.metrics import Metrics

_log = logging.getLogger(__name__)


class Policies:
    """Read at each admission, so a change takes effect at once. Every method blocks and may be called by any thread."""

    def __init__(self, cluster: Cluster, events: Events, metrics: Metrics, node_name: str) -> None:
        self._cluster = cluster
        self._events = events
        self._metrics = metrics
        self._node_name = node_name
        self._told: str = ""
        self._wrong: dict[str, str] = {}

    def look(self) -> None:
        """Report whether policies exist, if that has changed."""
        try:
            rules = self._rules()
        except VMBackupError as error:
            _log.warning("%s", error)
            return
        some = rules is not None
        reason = "PoliciesInForce" if some else "NoPolicies"
        if reason == self._told:
            return
        self._told = reason
        message = "backups that no VMBackupPolicy allows are refused"
        if not some:
            message = "there is no VMBackupPolicy: every namespace may back up every domain of this node to every store"
        _log.log(logging.INFO if some else logging.WARNING, "%s", message)
        self._events.normal(NodeRef(self._node_name), reason, message)

    def check(self, namespace: str, wanted: str, store: str, *, domain: str, domain_uuid: str) -> None:
        """Return if a backup may begin; raise RefusedError (ForbiddenByPolicy) if not.

        `wanted` is spec.domain, which the message names, because its user may not know the resolved name or UUID.
        `domain`, `domain_uuid`: as libvirt has them. Raises TransientError if the policies cannot be read.
        """
        rules = self._rules()
        if rules is None:
            return
        labels = self._cluster.namespace_labels(namespace)
        asked = Asked(Operation.BACKUP, namespace, labels, domain, domain_uuid, self._node_name, store)
        if not allowed(rules, asked):
            raise RefusedError(
                f"no VMBackupPolicy allows the namespace {namespace} to back up the domain {wanted!r} of the node "
                f"{self._node_name} to the store {store}: ask the administrator for one that does, or set a domain "
                "and a store that one allows",
                reason="ForbiddenByPolicy",
            )

    def _rules(self) -> list[Rule] | None:
        """The rules of all policies that can be parsed; None if there is no policy."""
        try:
            policies = self._cluster.policies()
        except PermanentError as error:
            raise TransientError(
                f"the VMBackupPolicies cannot be read, so no backup can begin: {error}; apply the CRDs of this release "
                "(kubectl apply --server-side -k crds/, or install.yaml), and let the agent's ClusterRole get and list "
                "vmbackuppolicies",
                reason="PoliciesUnreadable",
            ) from error
        self._metrics.policies(len(policies))
        rules: list[Rule] = []
        wrong: dict[str, str] = {}
        for name, spec in policies.items():
            try:
                rules += parse_rules(spec)
            except RefusedError as error:
                wrong[name] = str(error)
        self._tell_wrong(wrong)
        return rules if policies else None

    def _tell_wrong(self, wrong: dict[str, str]) -> None:
        for name, why in wrong.items():
            if self._wrong.get(name) != why:
                message = f"VMBackupPolicy {name} cannot be parsed, so it allows nothing: {why}"
                _log.warning("%s", message)
                self._events.warning(NodeRef(self._node_name), "PolicyNotUnderstood", message)
        self._wrong = wrong
