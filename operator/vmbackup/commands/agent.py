"""`vmbackup agent`: the process that runs the VMBackups of one hypervisor. Its work is in agent/."""

from __future__ import annotations

import argparse
import socket

from vmbackup.commands import flags
from vmbackup.commands.flags import Flag
from vmbackup.commands.verb import Verb, settings_of

FLAGS = (
    Flag(
        "--node-name",
        "run the VMBackups that have this spec.nodeName",
        flags.node_name,
        default=socket.gethostname().lower(),
        metavar="NAME",
    ),
    Flag(
        "--kubeconfig",
        "kubeconfig file for the API server",
        metavar="FILE",
        default_says="the pod's service account, otherwise the file that kubectl would use",
    ),
    Flag(
        "--metrics-host",
        "address to serve /metrics and /healthz on; unauthenticated and showing domain names, hence loopback by "
        "default; in a pod, set the pod's IP",
        default="127.0.0.1",
        metavar="IP",
    ),
    Flag("--metrics-port", "port to serve /metrics and /healthz on", flags.port, default="9777", metavar="PORT"),
    Flag(
        "--metrics-tls-cert",
        "certificate (PEM) for serving /metrics and /healthz with TLS; a renewed file is loaded automatically",
        flags.path,
        metavar="FILE",
    ),
    Flag("--metrics-tls-key", "private key (PEM) of that certificate", flags.path, metavar="FILE"),
    Flag(
        "--max-concurrent-backups",
        "maximum number of domains to back up at the same time; the others wait",
        flags.at_least_one,
        default="2",
        metavar="N",
    ),
    Flag(
        "--commit-backoff",
        "pause after the first failed commit; doubles with each further failure, up to 5 minutes",
        flags.seconds,
        default="5",
        metavar="SECONDS",
    ),
    Flag(
        "--relist-interval",
        "how often to compare VMBackups, journals and domains, in case a watch event was missed",
        flags.seconds,
        default="300",
        metavar="SECONDS",
    ),
    Flag(
        "--orphan-policy",
        "what to do with an orphaned overlay (its VMBackup or journal is gone): Commit or Report",
        flags.one_of("Commit", "Report"),
        default="Commit",
        metavar="POLICY",
    ),
)

_EXAMPLES = """\
examples:
  vmbackup agent --node-name hv-01 --kubeconfig /etc/vmbackup/kubeconfig
  vmbackup agent --overlay-dir /var/lib/vmbackup/overlays --max-concurrent-backups 4
"""


def _start(parsed: argparse.Namespace) -> int:
    from vmbackup.agent import operator  # here, so that the help does without kopf and the Kubernetes client

    return operator.run(settings_of(operator.AgentSettings, parsed))


VERB = Verb(_start, (*FLAGS, *flags.HYPERVISOR), _EXAMPLES, log_level="info")
