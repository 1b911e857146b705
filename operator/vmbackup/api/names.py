"""Names of the API: its group, version and kinds, its annotations, its finalizer, and the form of an object's name."""

from __future__ import annotations

import re

GROUP = "vmbackup.dev"
VERSION = "v1alpha1"
BACKUPS, STORES, POLICIES = "vmbackups", "vmbackupstores", "vmbackuppolicies"  # plurals, as in paths of the API server
RETRY_ANNOTATION = f"{GROUP}/retry"
CANCEL_ANNOTATION = f"{GROUP}/cancel"  # "true": cancel the copy
FINALIZER = f"{GROUP}/chain-home"

OBJECT_NAME = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
)  # RFC 1123 subdomain; the same as in crds/
