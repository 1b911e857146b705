"""The hypervisor: the connection to libvirtd, and the domains found through it."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

import libvirt

from vmbackup.errors import Cause, PermanentError, RefusedError
from vmbackup.hypervisor.connection import Connection
from vmbackup.hypervisor.guest import Guest


class Hypervisor(Connection):
    """A connection to libvirtd that also finds domains. Any thread may call any method."""

    def guest(self, name_or_uuid: str) -> Guest:
        """The domain of that name or UUID. Raises RefusedError (DomainNotFound), TransientError."""
        lookups: list[Callable[[libvirt.virConnect], libvirt.virDomain]] = [
            lambda connection: connection.lookupByUUIDString(name_or_uuid),
            lambda connection: connection.lookupByName(name_or_uuid),
        ]
        for lookup in lookups if _is_uuid(name_or_uuid) else lookups[1:]:
            try:
                domain = self.call(f"looking up domain {name_or_uuid}", lookup)
            except PermanentError as error:
                if error.reason != Cause.DOMAIN_NOT_FOUND:
                    raise
            else:
                return Guest(self, domain.UUIDString(), domain.name())
        raise RefusedError(
            f"domain {name_or_uuid!r} is not defined on this hypervisor: correct spec.domain, "
            "or choose the hypervisor that has it",
            reason=Cause.DOMAIN_NOT_FOUND,
        )

    def guests(self) -> list[Guest]:
        """All domains, running or not. Raises TransientError."""
        domains = self.call("listing the domains", lambda connection: connection.listAllDomains())
        return [Guest(self, domain.UUIDString(), domain.name()) for domain in domains]


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
