"""`vmbackup agent`: the wiring of kopf. The life of a VMBackup is in lifecycle.py.

This works around traps of kopf 1.45 (measured; tests/cluster/test_agent_kopf.py has a test for each):

- A daemon that returns is never started again. Ours ends only when kopf asks it to, or when its VMBackup is gone.
- The daemon of a VMBackup that is gone without its finalizer is never asked to end. Lifecycle notices that itself.
- A daemon starts before its finalizer is stored. duty() waits until the API server shows it.
- When a VMBackup is being deleted and no daemon runs, as after a restart, kopf removes the finalizer at once. With a
  daemon it writes to the object each second or minute until the daemon has ended. The event handler, which kopf awaits
  before both, therefore returns only when the VMBackup may be removed.
- Change handlers keep a copy of the spec in an annotation. There are none.
- A ClusterKopfPeering that somebody created pauses all operators. This one runs standalone.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import kopf
from kubernetes.client import ApiClient

from vmbackup.agent.context import Context
from vmbackup.agent.leftovers import OrphanPolicy, Orphans
from vmbackup.agent.policies import Policies
from vmbackup.agent.registry import Registry
from vmbackup.agent.runtime import memory
from vmbackup.agent.runtime.queue import Queue
from vmbackup.agent.runtime.threads import Threads
from vmbackup.agent.runtime.watchdog import RESTART_MENDS, Watchdog
from vmbackup.agent.sweep import Sweep
from vmbackup.api.names import BACKUPS, FINALIZER, GROUP, VERSION
from vmbackup.api.resource import BackupResource
from vmbackup.backoff import Backoff
from vmbackup.cluster.client import Cluster, authorization, load_client
from vmbackup.cluster.events import Events
from vmbackup.errors import RefusedError, VMBackupError
from vmbackup.hypervisor.hypervisor import Hypervisor
from vmbackup.reconcile.node import Node
from vmbackup.reconcile.rescue import guarded, release_guests
from vmbackup.telemetry.health import HealthServer
from vmbackup.telemetry.metrics import Metrics
from vmbackup.telemetry.server import Certificate

_log = logging.getLogger(__name__)

_STOP_SECONDS = 20.0  # for backups to come to a safe point; manifests/ allow 60 in total
_FLUSH_SECONDS = 3.0
_RESCUE_SECONDS = (
    60.0  # an unanswered call is safe after 31 s; a libvirtd that is away must not block the start forever
)


@dataclass(frozen=True)
class AgentSettings:
    """The flags of `vmbackup agent`. `commit_backoff`, `relist_interval`: seconds; `orphan_policy`: an OrphanPolicy."""

    node_name: str
    libvirt_uri: str
    libvirt_config_dir: Path | None
    kubeconfig: str | None
    metrics_host: str
    metrics_port: int
    metrics_tls_cert: Path | None
    metrics_tls_key: Path | None
    state_dir: Path
    overlay_dir: Path | None
    image_roots: tuple[Path, ...] | None
    max_concurrent_backups: int
    commit_backoff: float
    relist_interval: float
    orphan_policy: str


def run(settings: AgentSettings) -> int:
    """Run until SIGTERM or SIGINT; the exit code. Raises PermanentError without access to an API server."""
    memory.one_heap()
    for noisy in ("kopf.objects", "kopf.activities"):  # a line for each event and handler
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    client = load_client(settings.kubeconfig)
    hypervisor = Hypervisor(settings.libvirt_uri, config_dir=settings.libvirt_config_dir)
    agent = _Agent(settings, client, hypervisor)
    try:
        with (
            guarded(agent.node),
            HealthServer(
                agent.metrics.registry,
                agent.watchdog.checks,
                host=settings.metrics_host,
                port=settings.metrics_port,
                tls=_certificate(settings),
                restart_mends=RESTART_MENDS,
            ) as health,
        ):
            _log_settings(settings, hypervisor, health.port)
            try:
                kopf.run(registry=agent.registry, clusterwide=True)
            finally:
                agent.end()
    finally:
        hypervisor.close()
    return 0


def _certificate(settings: AgentSettings) -> Certificate | None:
    certificate, key = settings.metrics_tls_cert, settings.metrics_tls_key
    if certificate and key:
        return Certificate(certificate, key)
    if certificate or key:
        raise RefusedError("set both --metrics-tls-cert and --metrics-tls-key, or neither")
    return None


def _log_settings(settings: AgentSettings, hypervisor: Hypervisor, port: int) -> None:
    _log.info(
        "runs the VMBackups with spec.nodeName %s on %s, %d at a time; journals in %s, overlays %s; "
        "/metrics and /healthz on port %d of %s",
        settings.node_name,
        settings.libvirt_uri,
        settings.max_concurrent_backups,
        settings.state_dir,
        f"in {settings.overlay_dir}" if settings.overlay_dir else "beside the images",
        port,
        settings.metrics_host or "every address",
    )
    if not hypervisor.config_dir.is_dir():
        _log.warning(
            "%s does not exist: without libvirt's configuration directory the agent cannot check that definitions are "
            "on disk, and a power cut during a backup may boot a stale image; mount it, or set --libvirt-config-dir",
            hypervisor.config_dir,
        )


class _Agent:
    """The handlers of kopf and the objects that they need."""

    def __init__(self, settings: AgentSettings, client: ApiClient, hypervisor: Hypervisor) -> None:
        self._settings = settings
        self._client = client
        self.metrics = Metrics()
        cluster = Cluster(client)
        self._events = Events(cluster, node=settings.node_name)
        self.node = node = Node(
            hypervisor,
            settings.state_dir,
            self.metrics,
            overlay_dir=settings.overlay_dir,
            image_roots=settings.image_roots or (),
            backoff=Backoff(first=settings.commit_backoff),
            reporter_of=lambda record: self._backups.reporter_of(record),
        )
        self._threads = Threads()
        policies = Policies(cluster, self._events, self.metrics, settings.node_name)
        queue = Queue(settings.max_concurrent_backups)
        context = Context(node, cluster, self._events, policies, queue, self._threads)
        self._backups = Registry(context)
        orphans = Orphans(context, settings.node_name, OrphanPolicy(settings.orphan_policy))
        self._sweep = Sweep(context, self._backups, orphans, settings.node_name, settings.relist_interval)
        self.watchdog = Watchdog(hypervisor, self._sweep.neglected)
        self._background: list[asyncio.Task[None]] = []
        self.registry = self._register()

    def end(self) -> None:
        """Stop running backups at a safe point; the next agent continues them. Commits continue in QEMU meanwhile."""
        if not self._threads.join(_STOP_SECONDS):
            _log.warning("some backups did not reach a safe point within %.0f s", _STOP_SECONDS)
        self._backups.flush(_FLUSH_SECONDS)
        self._events.flush(_FLUSH_SECONDS)
        self._events.close()

    def _register(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        resource: Any = (GROUP, VERSION, BACKUPS)
        kopf.on.startup(registry=registry)(self._start)
        kopf.on.cleanup(registry=registry)(self._stop)
        kopf.on.login(registry=registry)(self._login)
        kopf.on.event(*resource, registry=registry)(self._seen)
        kopf.daemon(*resource, registry=registry, when=self._wanted, backoff=5.0)(self._keep)
        return registry

    async def _start(self, settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.watching.field_selectors[GROUP, BACKUPS] = f"spec.nodeName={self._settings.node_name}"
        settings.watching.inactivity_timeout = 70.0  # bookmarks come each minute
        settings.watching.connect_timeout = 10.0
        settings.networking.request_timeout = 30.0
        settings.peering.standalone = True
        settings.posting.enabled = False  # our events come from cluster/
        settings.scanning.disabled = True  # our CRDs exist: the sweep has listed their objects
        settings.persistence.finalizer = FINALIZER
        settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
        settings.background.cancellation_polling = 0.5
        settings.background.instant_exit_timeout = 2.0
        self._background = [asyncio.create_task(self.watchdog.beat())]
        try:
            with suppress(TimeoutError):  # guests first, even if the API server does not answer
                rescue = self._threads.run(partial(release_guests, self.node), "rescue")
                await asyncio.wait_for(rescue, _RESCUE_SECONDS)
            await self._sweep.begin()
        except asyncio.CancelledError:  # already told to end: kopf does not call _stop then
            await self._stop()
            raise
        memory.give_back()
        self._background.append(asyncio.create_task(self._sweep.watch()))

    async def _stop(self, **_: Any) -> None:
        for task in self._background:
            task.cancel()
        self._backups.stop()
        self._sweep.stop()

    def _login(self, **_: Any) -> kopf.ConnectionInfo:
        """The access of the client. kopf calls it again when the API server answers 401."""
        client: Any = self._client
        access: Any = client.configuration
        scheme, _space, token = authorization(self._client).rpartition(" ")
        return kopf.ConnectionInfo(
            server=access.host,
            ca_path=access.ssl_ca_cert,
            insecure=not access.verify_ssl,
            username=access.username or None,
            password=access.password or None,
            scheme=scheme or None,
            token=token or None,
            certificate_path=access.cert_file,
            private_key_path=access.key_file,
        )

    async def _seen(self, event: kopf.RawEvent, **_: Any) -> None:
        body, gone = event["object"], event["type"] == "DELETED"
        self._backups.see(body, gone=gone)
        seen = BackupResource(body)
        if gone:
            with suppress(VMBackupError, OSError):  # the next sweep notices it too
                await self._sweep.forget(seen.uid)
        elif seen.terminating and (seen.held or seen.awaits_its_end):
            await self._backups.release(body)

    def _wanted(self, body: kopf.Body, **_: Any) -> bool:
        return self._backups.wants(body)

    async def _keep(self, body: kopf.Body, stopped: Any, **_: Any) -> None:
        await self._backups.keep(dict(body), stopped)
