"""Guest, user and misfortune: what happens without being asked for.

Assumption A (docs/protocol.md): a guest that stopped is not booted again between the agent's observation and its act,
nor before its configuration is durable; and nobody resumes a guest during the switch of its images.

`Live` accepts that a host or QEMU that dies in the middle of a switch of images loses writes (V1–V4), and nothing helps
where libvirt's configuration cannot be saved. So in these settings they die only while P, durable on disk, names the
image that QEMU writes, and nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.model.libvirt import libvirtd_gone, no_answer, qemu_gone
from tests.model.merging import NONE, left_by_a_dead_agent, merge_steps
from tests.model.user import may_boot, user_faults
from tests.model.world import ENOUGH, TICK, Kind, Setting, Step, World, content, named, on, put, saved, without_agent

BOOT_FAILS = "user boots the guest: it cannot open its image"
NEWEST = 9  # newer than every version (see world.ranked)


def free_steps(world: World, idle: Callable[[], bool], residual: str) -> Iterator[Step]:
    """What guest and user may do at any time, or never. `idle`: the agent has nothing to do."""
    settled = world.plan is None and world.call is None and all(d.durable == d.writes for d in world.disks)
    if world.guest == "paused" and settled:
        yield Step("user resumes the guest", world._replace(guest="running"))
    if may_boot(world, idle, residual):
        yield from _boot(world)


def guest_writes(world: World) -> Iterator[Step]:
    """One write, to any location of any disk."""
    if world.guest not in ("running", "away") or world.frozen:
        return
    for index, disk in enumerate(world.disks):
        for n in range(len(disk.base)):
            if disk.writes == "O" and disk.overlay is not None:
                if world.full and disk.overlay[n] is None and on(world):
                    yield Step("QEMU pauses the guest: no space for its overlay", world._replace(guest="io-error"))
                    continue
                written = {"overlay": (*disk.overlay[:n], NEWEST, *disk.overlay[n + 1 :]), "unwritten": False}
            elif disk.astray:
                continue  # to the other file: what is lost there no agent can bring back, and nobody counts on here
            elif disk.writes == "B":
                written = {"base": (*disk.base[:n], NEWEST, *disk.base[n + 1 :])}
            else:
                written = {}
            acked = (*disk.acked[:n], NEWEST, *disk.acked[n + 1 :])
            after = put(world, index, acked=acked, **written)
            yield Step(named(f"guest writes to {disk.writes}", world, index), after, Kind.WRITE)


def _boot(world: World) -> Iterator[Step]:
    """By the user or autostart, from P. (What it reads counts from then on as what was acknowledged.)"""
    contents = [content(disk, disk.persistent) for disk in world.disks]
    if None in contents:
        yield Step(BOOT_FAILS, world)
        return
    disks = tuple(
        d._replace(writes=d.persistent, live=d.persistent, locked=d.persistent == "O", acked=c)
        for d, c in zip(world.disks, contents, strict=True)
    )
    names = "".join(d.persistent for d in world.disks)
    after = world._replace(guest="running", full=False, disks=disks, edited=False)
    yield Step(f"user boots the guest, P={names}", after)


def background_steps(world: World, setting: Setting) -> Iterator[Step]:
    """What libvirt, QEMU and the guest do without being asked."""
    if world.config_full and not setting.config_stuck:
        yield Step("user frees space for the configuration", world._replace(config_full=False))
    if world.libvirtd and world.config == "cached":
        yield Step("time passes: the configuration becomes durable", saved(world))
    if setting.offline:
        yield from merge_steps(world)
    if setting.clock:
        yield from clock_steps(world)


def clock_steps(world: World) -> Iterator[Step]:
    """A tick, which counts only after a call without an answer. libvirt gives up a call that waits for 30 s (R4)."""
    if world.sent is None or world.plan is not None or (world.sent == world.answering == ENOUGH):
        return
    sent = min(world.sent + 1, ENOUGH)
    answering = min(world.answering + 1, ENOUGH) if world.libvirtd else 0
    waits = world.call is not None and world.call[1] == 0
    call = None if waits and sent == answering == ENOUGH else world.call
    yield Step(f"time passes: {TICK:.0f} s", world._replace(sent=sent, answering=answering, call=call))


def fault_steps(world: World, setting: Setting) -> Iterator[Step]:
    """One more misfortune."""
    apart = any(d.durable != d.writes and d.durable in ("B", "O") for d in world.disks)
    spared = (setting.spared and (world.call is not None or apart)) or (world.edited and apart)
    waiting = world.plan is not None and world.plan[0] == "wait"
    if world.agent:
        dead = without_agent(left_by_a_dead_agent(world))
        yield _fault("the agent is killed", dead)
        if waiting and world.call and world.call[1] == 0:
            yield _fault("the agent is killed before its call is sent", dead._replace(call=None))
    if world.libvirtd:
        yield _fault("libvirtd is killed", libvirtd_gone(world))
        if setting.clock:
            yield _fault("libvirtd is stopped", world._replace(libvirtd=False, stopped=True))
    if on(world) and not spared:
        yield _fault("QEMU dies (or the guest powers off)", qemu_gone(world))
    if not on(world) or not spared:
        yield _fault("power cut", _power_cut(world))
    if waiting:
        yield _fault("the call times out, and is still in flight", no_answer(world))
    yield from _space_runs_out(world, setting)
    for index, disk in enumerate(world.disks):
        if disk.job in ("copying", "ready") and world.libvirtd and not world.call:
            yield _fault(named("QEMU's job fails", world, index), put(world, index, job="-", mirror="-", known=False))
    yield from user_faults(world, setting)


def _space_runs_out(world: World, setting: Setting) -> Iterator[Step]:
    used = any(disk.overlay is not None for disk in world.disks)
    if used and not world.full:
        yield _fault("the overlays' file system is full", world._replace(full=True))
    if used and setting.room and not world.room_low:
        yield _fault("the overlays' file system runs low", world._replace(room_low=True))
    if (setting.config_full or setting.config_stuck) and not world.config_full:
        yield _fault("the configuration's file system is full", world._replace(config_full=True))


def _fault(label: str, world: World) -> Step:
    return Step("FAULT: " + label, world, Kind.FAULT)


def _power_cut(world: World) -> World:
    off = libvirtd_gone(world)
    off = qemu_gone(off) if on(off) else off
    disks = tuple(d._replace(persistent=d.durable, merge=NONE) for d in off.disks)
    off = off._replace(disks=disks, config="saved", record=off.kept)
    return without_agent(off._replace(call=None, sent=None, answering=ENOUGH, config_full=False))
