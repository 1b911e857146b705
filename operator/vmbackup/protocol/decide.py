"""What to do next with one domain's chain: `decide(intent, record, seen) -> Action`. Pure: no I/O, no clock.

This is the decision table of docs/protocol.md. A model checker drives this very function through every interleaving
of libvirt's steps, guest writes and faults (tests/model), and finds no way to lose a write; it does find one as soon as
any of the repairs R1–R7 named below is taken out. So: read it before changing a rule or the order of two.

Shorthand, for each disk: L = its source in the live XML, P = in the persistent XML, T = what QEMU itself says it
writes, B = base, O = our overlay. The key invariant: while the guest can write, P, durable on disk, names the image
that QEMU writes.
"""

from __future__ import annotations

from vmbackup.protocol.guest_off import RULES_OFF
from vmbackup.protocol.guest_on import RULES_ON
from vmbackup.protocol.record import Image, Record
from vmbackup.protocol.situation import Case, Situation
from vmbackup.protocol.table import row
from vmbackup.protocol.terms import Action, DiskSeen, Do, Intent, Mirror, Observation, Power


@row(
    "a call may be in flight (R4)",
    "wait",
    "a call that timed out may still be carried out later, so a decision made now may be wrong by then (V6, V7)",
)
def decide(intent: Intent, record: Record, seen: Observation) -> Action:
    """The next action: the first rule that has one. The caller observes again before each call."""
    if seen.call_in_flight:  # R4
        return Action(Do.WAIT, reason="a libvirt call was not answered and may still be carried out")
    disks = tuple(Case(record.disk(disk.target), disk) for disk in seen.disks)
    situation = Situation(intent, record, seen, disks)
    for rule in RULES_OFF if seen.power is Power.OFF else RULES_ON:
        if (action := rule(situation)) is not None:
            return action
    return Action(Do.DONE)


def needs_truth(record: Record, seen: Observation, *, doubt: bool) -> bool:
    """R3: whether QEMU itself must be asked what it writes (it taints the domain, so only where there is reason to).

    `doubt`: an outcome was unknown, or the connection dropped, since QEMU was last asked.
    """
    if seen.power is Power.OFF:
        return False
    return doubt or bool(record.quarantined) or any(_disagrees(disk) for disk in seen.disks)


def _disagrees(disk: DiskSeen) -> bool:
    """L, `<mirror>`, blockJobInfo and O's lock do not fit together."""
    locked = disk.overlay is not None and disk.overlay.locked
    return disk.astray or locked is not (disk.live is Image.OVERLAY) or disk.job is (disk.mirror is Mirror.NONE)
