"""The table of libvirt's errors."""

from __future__ import annotations

import libvirt
import pytest

from vmbackup.errors import PermanentError, TransientError, UnknownOutcomeError, VMBackupError
from vmbackup.hypervisor.errors import classify

QEMU, RPC = 10, 7


def libvirt_error(code: int, domain: int = QEMU) -> libvirt.libvirtError:
    error = libvirt.libvirtError("")
    error.err = (code, domain, "the text of libvirt", 2, "", "", "", -1, -1)
    return error


@pytest.mark.parametrize(
    ("code", "domain", "kind", "reason"),
    [
        (1, RPC, UnknownOutcomeError, "ConnectionLost"),
        (38, RPC, UnknownOutcomeError, "ConnectionLost"),
        (39, RPC, UnknownOutcomeError, "ConnectionLost"),
        (68, QEMU, UnknownOutcomeError, "Timeout"),
        (1, QEMU, TransientError, "HypervisorError"),
        (8, QEMU, TransientError, "StateChanged"),
        (9, QEMU, TransientError, "OperationFailed"),
        (55, QEMU, TransientError, "StateChanged"),
        (83, QEMU, TransientError, "BlockJobActive"),
        (84, QEMU, TransientError, "BlockJobActive"),
        (86, QEMU, TransientError, "AgentUnresponsive"),
        (87, QEMU, TransientError, "Busy"),
        (97, QEMU, TransientError, "AgentUnresponsive"),
        (38, QEMU, TransientError, "HypervisorError"),
        (4242, QEMU, TransientError, "HypervisorError"),
        (42, QEMU, PermanentError, "DomainNotFound"),
        (67, QEMU, PermanentError, "Unsupported"),
        (74, QEMU, PermanentError, "AgentNotConfigured"),
        (29, QEMU, PermanentError, "NotAllowed"),
        (88, QEMU, PermanentError, "NotAllowed"),
        (27, QEMU, PermanentError, "InvalidXML"),
    ],
)
def test_an_error_of_a_change_means(code: int, domain: int, kind: type[VMBackupError], reason: str) -> None:
    meaning = classify(libvirt_error(code, domain), "web: pivoting vda", mutating=True)
    assert (type(meaning), meaning.reason) == (kind, reason)


@pytest.mark.parametrize(("code", "domain"), [(1, RPC), (68, QEMU)])
def test_a_question_without_an_answer_is_transient(code: int, domain: int) -> None:
    meaning = classify(libvirt_error(code, domain), "web: asking for the state", mutating=False)
    assert (type(meaning), meaning.reason) == (TransientError, "HypervisorAway")


def test_an_error_without_libvirt_s_numbers_says_nothing_about_the_call() -> None:
    error = libvirt.libvirtError("lost")
    error.err = None
    assert isinstance(classify(error, "web: pivoting vda", mutating=True), UnknownOutcomeError)


def test_the_message_says_what_was_done_what_libvirt_said_and_the_cure() -> None:
    message = str(classify(libvirt_error(74), "web: freezing the file systems", mutating=True))
    assert message == (
        "web: freezing the file systems: the text of libvirt "
        "(add the channel org.qemu.guest_agent.0 to the domain, or do not quiesce)"
    )
