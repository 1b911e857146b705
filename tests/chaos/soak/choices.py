"""What is going to happen: a pure function of the seed, the guest and the number of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

EVENTS = 200  # a backup of two disks comes by so many moments


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `weight`: how often it is chosen; `seconds`: from how long to how long it lasts, or is away."""

    weight: int
    seconds: tuple[float, float] = (0.0, 0.0)
    guests: tuple[str, ...] = ()  # the kinds of guests that it can happen to; all if empty


KINDS: Mapping[str, Kind] = {
    "driver killed": Kind(16, (0, 3)),
    "driver stopped": Kind(3, (0, 1)),
    "second driver started": Kind(2),
    "libvirtd killed": Kind(7, (0, 3)),
    "libvirtd stopped": Kind(3, (1, 40)),
    "QEMU killed": Kind(9, (0, 4)),
    "guest destroyed": Kind(4, (0, 4)),
    "guest reset": Kind(2),
    "guest shut down": Kind(4, (0, 2), ("linux",)),
    "guest paused by a user": Kind(4, (0.2, 6)),
    "guest agent hangs": Kind(8, (0.5, 15), ("linux",)),
    "power cut": Kind(40, (0, 3), ("cut",)),
    "domain undefined and defined again": Kind(2),
    "description edited": Kind(5),
    "bandwidths edited": Kind(3),
    "base locked by a reader": Kind(4, (0.5, 8)),
    "foreign block job": Kind(4, (0.5, 4)),
    "our block job aborted by a user": Kind(4),
    "foreign overlay": Kind(4, (0.5, 6)),
    "base replaced": Kind(4, (0.5, 6)),
    "overlay removed": Kind(2),
    "overlay replaced": Kind(2),
    "overlays' file system full": Kind(8, (0.5, 10), ("tight",)),
    "store full": Kind(5, (0.5, 10), ("tight",)),
    "store gone": Kind(3, (0.5, 6)),
    "store read-only": Kind(3, (0.5, 6)),
    "state directory full": Kind(5, (0.5, 8), ("tight",)),
    "configuration directory full": Kind(3, (0.5, 8)),
    "journal torn": Kind(3, (0, 1)),
    "journal garbled": Kind(2, (0, 1)),
    "journal lost": Kind(2, (0, 1)),
    "backup deleted": Kind(4),
    "retry asked for": Kind(2),
    "clock jumps": Kind(3, (0.1, 3)),
}

ENDS_QEMU = ("QEMU killed", "guest destroyed", "guest shut down", "power cut")
DURING_AWAY = ("", "", "driver killed", "QEMU killed", "backup deleted")  # while libvirtd is away
# `Live` accepts a stale image where QEMU ends within a switch; so does a user who resumes the guest that we hold, who
# defines another image than the one that is written (docs/protocol.md, what no agent can close), or who takes away the
# name of an image that QEMU has open.
HANDS_ON_IMAGES = ("foreign overlay", "base replaced", "overlay removed", "overlay replaced")
ACCEPTS_LOSS = ("guest paused by a user", "domain undefined and defined again", *HANDS_ON_IMAGES)
REFLINKS = ("chain", "cut")  # the kinds of guests of which a copy takes no time
STALL_PAUSE_SECONDS = 2


@dataclass(frozen=True)
class Fault:
    """Something that happens to a backup: `at` so many moments of its driver, or else after `delay` seconds."""

    kind: str
    seconds: float
    delay: float
    at: int | None = None
    meanwhile: str = ""  # another kind, while libvirtd is away

    def __str__(self) -> str:
        when = f"at moment {self.at}" if self.at else f"after {self.delay:.2f} s"
        lasting = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind}{f' and {self.meanwhile}' if self.meanwhile else ''}{lasting} {when}"


@dataclass(frozen=True)
class Plan:
    """One backup and what happens to it. `retain`: neither it nor its data are deleted at the end."""

    guest: str
    ordinal: int
    spec: Mapping[str, Any]
    faults: tuple[Fault, ...]
    delete_data: bool
    retain: bool

    @property
    def name(self) -> str:
        """How to ask for it again."""
        return f"{self.guest}:{self.ordinal}"

    def as_json(self) -> dict[str, Any]:
        """For the log."""
        return asdict(self)


def plan(seed: int, guest: str, ordinal: int) -> Plan:
    """The plan of that number for this guest, whose name is its kind and a number."""
    random = Random(f"{seed}:{guest}:{ordinal}")
    spec = _spec(random, guest)
    count = random.choices((0, 1, 2, 3), (10, 45, 30, 15))[0]
    faults: list[Fault] = []
    for _ in range(count):
        faults.append(_fault(random, _possible(guest, spec, faults)))
    return Plan(guest, ordinal, spec, tuple(faults), delete_data=random.random() < 0.5, retain=random.random() < 0.1)


def _spec(random: Random, guest: str) -> dict[str, Any]:
    quiesce = random.choices(("Skip", "Try", "Require"), (50, 40, 50 if guest.startswith("linux") else 4))[0]
    spec: dict[str, Any] = {
        "snapshot": {"quiesce": quiesce, "freezeTimeoutSeconds": random.choice((2, 10))},
        "switchPolicy": random.choices(("Guarded", "Live"), (80, 20))[0],
        "copy": {"deadlineSeconds": random.choices((1, 14400), (5, 95))[0]},
        "commit": {"backoffLimit": random.choice((0, 2, 6)), "offline": random.random() < 0.3},
    }
    if random.random() < 0.3:
        spec["disks"] = [random.choice(("vda", "vdb"))]
    if random.random() < 0.4:
        spec["copy"]["bandwidth"] = random.choice(("8Mi", "16Mi", "64Mi"))
    if random.random() < 0.5:
        spec["commit"]["bandwidth"] = random.choice(("1Mi", "2Mi", "8Mi"))
    if random.random() < 0.3 and not guest.startswith(REFLINKS):
        spec["copy"]["bandwidth"] = "2Mi"  # so that there is a lot to merge
        spec["commit"] |= _slower_than_the_guest(random, spec["switchPolicy"])
    return spec


def _slower_than_the_guest(random: Random, switch_policy: str) -> dict[str, Any]:
    policies = ("Hold", "Throttle", "Pause") if switch_policy == "Guarded" else ("Hold", "Throttle")
    stall = {"stallPolicy": random.choice(policies), "stallPauseSeconds": STALL_PAUSE_SECONDS}
    return {"bandwidth": "1Mi", "deadlineSeconds": random.choice((1, 3)), **stall}


def _possible(guest: str, spec: Mapping[str, Any], faults: list[Fault]) -> list[str]:
    chosen = {kind for fault in faults for kind in (fault.kind, fault.meanwhile)}
    guests_kind = guest.rpartition("-")[0]
    possible = [name for name, kind in KINDS.items() if not kind.guests or guests_kind in kind.guests]
    if spec["switchPolicy"] == "Live" or chosen.intersection(ACCEPTS_LOSS):
        possible = [name for name in possible if name not in ENDS_QEMU]
    if chosen.intersection(ENDS_QEMU):
        possible = [name for name in possible if name not in ACCEPTS_LOSS]
    return possible


def _fault(random: Random, possible: list[str]) -> Fault:
    name = random.choices(possible, [KINDS[each].weight for each in possible])[0]
    shortest, longest = KINDS[name].seconds
    seconds = round(shortest + (longest - shortest) * random.random() ** 3, 2)  # seldom long
    delay = round(random.expovariate(1.5), 3)
    at = random.randint(1, EVENTS) if random.random() < 0.6 else None
    meanwhile = random.choice(DURING_AWAY) if name.startswith("libvirtd") else ""
    if meanwhile in ENDS_QEMU and meanwhile not in possible:
        meanwhile = ""
    return Fault(name, seconds, delay, at, meanwhile)
