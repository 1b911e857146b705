"""Calls to the API server: synchronous, bounded in time, safe from any thread.

The client's typed interfaces are not used: CoreV1Api alone takes 70 MB, and has no types for custom resources.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kubernetes import config as kubernetes_config
from kubernetes.client import ApiClient, ApiException, Configuration
from urllib3.exceptions import HTTPError

from vmbackup.api.identity import ObjectId
from vmbackup.api.names import GROUP, POLICIES, STORES, VERSION
from vmbackup.api.store import StoreSpec
from vmbackup.errors import Cause, PermanentError, RefusedError, TransientError, VMBackupError
from vmbackup.version import __version__

_JSON, _JSON_PATCH = "application/json", "application/json-patch+json"


def load_client(kubeconfig: str | None = None) -> ApiClient:
    """A new client, configured from this kubeconfig, else the pod's service account, else as kubectl is.

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
            f"no access to a Kubernetes API server: {error}; set --kubeconfig, or run in a pod with a service account"
        ) from error
    # No hidden retries: the caller decides whether and when to try again.
    configuration.retries = False
    client: Any = ApiClient(configuration)
    client.user_agent = f"vmbackup/{__version__}"  # the part before the slash becomes the field manager
    return client


def authorization(client: ApiClient) -> str:
    """The header Authorization of the client's requests, with the token reread when due; '' without one."""
    untyped: Any = client
    return str(untyped.configuration.get_api_key_with_prefix("BearerToken", alias="authorization") or "")


class Cluster:
    """The custom resources on the API server.

    Every call takes at most `timeout` (seconds to connect, seconds to answer). It raises TransientError when the server
    is away, overloaded or answers Conflict, and PermanentError if it refuses (reason NotFound, Forbidden or Invalid).
    """

    def __init__(self, client: ApiClient, *, timeout: tuple[float, float] = (3.0, 10.0)) -> None:
        self._client: Any = client
        self._timeout = timeout

    def get(self, plural: str, namespace: str, name: str) -> dict[str, Any] | None:
        """An object of this kind as it is now; None if there is none."""
        return self._get(_path(plural, namespace, name))

    def of_node(self, plural: str, node: str, *, page_size: int = 500) -> list[dict[str, Any]]:
        """All objects of this kind with this spec.nodeName, in all namespaces, selected on the server."""
        query = {"fieldSelector": f"spec.nodeName={node}", "limit": str(page_size)}
        found: list[dict[str, Any]] = []
        while True:
            answer = self._call("GET", f"/apis/{GROUP}/{VERSION}/{plural}", query=query)
            found += answer["items"]
            following = answer["metadata"].get("continue")
            if not following:
                return found
            query["continue"] = following

    def store(self, name: str) -> StoreSpec:
        """The spec of a VMBackupStore. Raises RefusedError if there is none (StoreNotFound) or it is wrong."""
        found = self._get(f"/apis/{GROUP}/{VERSION}/{STORES}/{name}")
        if found is None:
            raise RefusedError(
                f"spec.storeRef.name is {name!r}: there is no VMBackupStore of this name; "
                "create it, or set one that `kubectl get vmbackupstores` lists",
                reason="StoreNotFound",
            )
        return StoreSpec.parse(found.get("spec", {}))

    def policies(self) -> dict[str, Mapping[str, Any]]:
        """The specs of all VMBackupPolicies, by name."""
        items = self._call("GET", f"/apis/{GROUP}/{VERSION}/{POLICIES}")["items"]
        return {item["metadata"]["name"]: item.get("spec") or {} for item in items}

    def put_status(self, identity: ObjectId, status: Mapping[str, Any]) -> dict[str, Any] | None:
        """Replace the status of this very object, never of another of the same name.

        Returns the object as it is now; None if it is gone. The uid is tested by a JSON patch, since the status
        subresource ignores the metadata of any other kind of write (measured, Kubernetes 1.37).
        """
        operations = [
            {"op": "test", "path": "/metadata/uid", "value": identity.uid},
            {"op": "add", "path": "/status", "value": dict(status)},
        ]
        try:
            return self._call("PATCH", f"{_path_of(identity)}/status", operations, kind=_JSON_PATCH)
        except VMBackupError as error:
            # A failed test is answered like any other invalid patch: only a look tells.
            if error.reason in (Cause.NOT_FOUND, Cause.INVALID) and self._is_gone(identity):
                return None
            raise

    def delete(self, identity: ObjectId) -> None:
        """Delete this very object. Does nothing if it is gone, or another has its name."""
        options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": identity.uid}}
        try:
            self._call("DELETE", _path_of(identity), options)
        except VMBackupError as error:
            if error.reason not in (Cause.NOT_FOUND, Cause.CONFLICT) or not self._is_gone(identity):
                raise

    def namespace_terminating(self, name: str) -> bool:
        """Whether this whole namespace is being deleted, or is gone."""
        found = self._get(f"/api/v1/namespaces/{name}")
        return found is None or "deletionTimestamp" in found["metadata"]

    def namespace_labels(self, name: str) -> Mapping[str, str]:
        """The labels of a namespace; none where it is gone."""
        found = self._get(f"/api/v1/namespaces/{name}") or {"metadata": {}}
        return found["metadata"].get("labels") or {}

    def create_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        """Create an event of events.k8s.io/v1, which `kubectl describe` shows under its object."""
        self._call("POST", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", dict(event))

    def _is_gone(self, identity: ObjectId) -> bool:
        found = self._get(_path_of(identity))
        return found is None or found["metadata"]["uid"] != identity.uid

    def _get(self, path: str) -> dict[str, Any] | None:
        try:
            return self._call("GET", path)
        except PermanentError as error:
            if error.reason == Cause.NOT_FOUND:
                return None
            raise

    def _call(
        self, method: str, path: str, body: object = None, *, query: Mapping[str, str] | None = None, kind: str = _JSON
    ) -> Any:
        headers = {"Accept": _JSON} | ({} if body is None else {"Content-Type": kind})
        parameters = list((query or {}).items())
        try:
            request = self._client.param_serialize(
                method, path, query_params=parameters, header_params=headers, body=body, auth_settings=["BearerToken"]
            )
            answer = self._client.call_api(*request, _request_timeout=self._timeout)
            text: bytes = answer.read()
        except (ApiException, HTTPError) as error:  # the former if TLS fails
            raise TransientError(f"the API server does not answer: {error}", reason="ServerAway") from error
        if not 200 <= answer.status <= 299:
            raise _classified(answer.status, f"{answer.status} {answer.reason}: {text.decode(errors='replace')}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise TransientError(
                f"the answer is not from an API server: {text[:100]!r}", reason="ServerAway"
            ) from error


def _path(plural: str, namespace: str, name: str) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{plural}/{name}"


def _path_of(identity: ObjectId) -> str:
    return _path(identity.plural, identity.namespace, identity.name)


def _classified(status: int, answer: str) -> VMBackupError:
    """The error for an HTTP status of the API server (Kubernetes API conventions, "HTTP status codes")."""
    text = f"the API server answers {answer.strip()[:500]}"
    if status == 409:
        return TransientError(text, reason=Cause.CONFLICT)
    if status in (408, 429) or status >= 500:
        return TransientError(text, reason="ServerAway")
    if status in (401, 403):
        return PermanentError(f"{text}; check the ClusterRole of the agent", reason="Forbidden")
    return PermanentError(text, reason=Cause.NOT_FOUND if status in (404, 410) else Cause.INVALID)
