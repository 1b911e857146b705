"""The calls to the API server that an agent makes: synchronous, bounded in time, safe from any thread."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from kubernetes import config as kubernetes_config
from kubernetes.client import (
    ApiClient,
    ApiException,
    Configuration,
    CoreV1Api,
    CustomObjectsApi,
    V1DeleteOptions,
    V1Preconditions,
)
from urllib3.exceptions import HTTPError

from vmbackup.api.spec import GROUP, VERSION, StoreSpec
from vmbackup.errors import PermanentError, RefusedError, TransientError, VMBackupError

BACKUPS = "vmbackups"
STORES = "vmbackupstores"


def load_client(kubeconfig: str | None = None) -> ApiClient:
    """A client of its own: from this kubeconfig, else from the pod's service account, else as kubectl finds it.

    Raises PermanentError if there is no usable configuration.
    """
    configuration = Configuration()
    try:
        if kubeconfig is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            kubernetes_config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
    except (kubernetes_config.ConfigException, OSError) as error:
        raise PermanentError(
            f"no access to a Kubernetes API server: {error}; give --kubeconfig, or run in a pod with a service account"
        ) from error
    # Whoever calls decides whether to try again: nothing is to be kept waiting behind its back.
    configuration.retries = False
    return ApiClient(configuration)


class Cluster:
    """The custom resources on the API server.

    Every call takes at most `timeout` (seconds to connect, seconds to answer) and raises TransientError when the server
    is away, overloaded or says Conflict, and PermanentError when it refuses (reason NotFound, Forbidden or Invalid).
    """

    def __init__(self, client: ApiClient, *, timeout: tuple[float, float] = (3.0, 10.0)) -> None:
        self._api = CustomObjectsApi(client)
        self._core = CoreV1Api(client)
        self._timeout = timeout

    def backup(self, namespace: str, name: str) -> dict[str, Any] | None:
        """The VMBackup as it is now; None if there is none."""
        try:
            return self._call(self._api.get_namespaced_custom_object, GROUP, VERSION, namespace, BACKUPS, name)
        except PermanentError as error:
            if error.reason == "NotFound":
                return None
            raise

    def backups_of(self, node: str, *, page_size: int = 500) -> list[dict[str, Any]]:
        """All VMBackups of this node, in all namespaces, selected on the server."""
        found: list[dict[str, Any]] = []
        page: dict[str, str] = {}
        while True:
            answer = self._call(
                self._api.list_cluster_custom_object,
                GROUP,
                VERSION,
                BACKUPS,
                field_selector=f"spec.nodeName={node}",
                limit=page_size,
                **page,
            )
            found += answer["items"]
            following = answer["metadata"].get("continue")
            if not following:
                return found
            page = {"_continue": following}

    def store(self, name: str) -> StoreSpec:
        """The spec of a VMBackupStore. Raises RefusedError if there is none (StoreNotFound) or it is wrong."""
        try:
            found = self._call(self._api.get_cluster_custom_object, GROUP, VERSION, STORES, name)
        except PermanentError as error:
            if error.reason != "NotFound":
                raise
            raise RefusedError(
                f"spec.storeRef.name is {name!r}: there is no VMBackupStore of this name; "
                "create it, or name one that `kubectl get vmbackupstores` lists",
                reason="StoreNotFound",
            ) from error
        return StoreSpec.parse(found.get("spec", {}))

    def put_status(self, namespace: str, name: str, uid: str, status: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make this the status of this very object, never of another of the same name.

        Returns the object as it is now; None if it is gone. The uid is tested by a JSON patch, since the status
        subresource ignores the metadata of any other kind of write (measured, Kubernetes 1.37).
        """
        operations = [
            {"op": "test", "path": "/metadata/uid", "value": uid},
            {"op": "add", "path": "/status", "value": dict(status)},
        ]
        patch = self._api.patch_namespaced_custom_object_status
        kind = "application/json-patch+json"
        try:
            return self._call(patch, GROUP, VERSION, namespace, BACKUPS, name, operations, _content_type=kind)
        except VMBackupError as error:
            # A failed test is answered like any other invalid patch: only a look tells.
            if error.reason in ("NotFound", "Invalid") and self._is_gone(namespace, name, uid):
                return None
            raise

    def delete_backup(self, namespace: str, name: str, uid: str) -> None:
        """Delete this very object; nothing happens if it is gone, or another has its name."""
        options = V1DeleteOptions(preconditions=V1Preconditions(uid=uid))
        delete = self._api.delete_namespaced_custom_object
        try:
            self._call(delete, GROUP, VERSION, namespace, BACKUPS, name, body=options)
        except VMBackupError as error:
            if error.reason not in ("NotFound", "Conflict") or not self._is_gone(namespace, name, uid):
                raise

    def namespace_terminating(self, name: str) -> bool:
        """Whether this whole namespace is being deleted, or is gone."""
        try:
            found: Any = self._call(self._core.read_namespace, name)
        except PermanentError as error:
            if error.reason == "NotFound":
                return True
            raise
        return found.metadata.deletion_timestamp is not None

    def create_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """Create an event of events.k8s.io/v1, which `kubectl describe` shows under its object."""
        create = self._api.create_namespaced_custom_object
        self._call(create, "events.k8s.io", "v1", namespace, "events", dict(event))

    def _is_gone(self, namespace: str, name: str, uid: str) -> bool:
        found = self.backup(namespace, name)
        return found is None or found["metadata"]["uid"] != uid

    def _call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return method(*args, **options, _request_timeout=self._timeout)
        except ApiException as error:
            raise _classified(error) from error
        except HTTPError as error:
            raise TransientError(f"the API server does not answer: {error}", reason="ServerAway") from error


def _classified(error: ApiException) -> VMBackupError:
    """What an answer of the API server means (Kubernetes API conventions, "HTTP status codes")."""
    answer: Any = error
    status = int(answer.status or 0)
    text = f"the API server answers {status} {answer.reason}: {str(answer.body or '').strip()[:500]}"
    if status == 409:
        return TransientError(text, reason="Conflict")
    if status in (0, 408, 429) or status >= 500:
        return TransientError(text, reason="ServerAway")
    if status in (401, 403):
        return PermanentError(f"{text}; check the ClusterRole of the agent", reason="Forbidden")
    return PermanentError(text, reason="NotFound" if status in (404, 410) else "Invalid")
