"""Guest, user and misfortune: what happens without being asked for.

Assumption A (docs/protocol.md): a guest that stopped is not booted again between the agent's observation and its act,
nor before its configuration is durable; and nobody resumes a guest during the switch of its images.

`Live` accepts that a host or QEMU that dies in the middle of a switch of images loses writes (V1–V4), and nothing helps
where libvirt's configuration cannot be saved. So in these settings they die only while P, durable on disk, names the
image that QEMU writes, and nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.libvirt import libvirtd_gone, no_answer, qemu_gone
from tests.model.world import Kind, Setting, Step, World, content, named, put, saved

BOOT_FAILS = "user boots the guest: it cannot open its image"
NEWEST = 9  # newer than every version (see world.ranked)


def free_steps(world: World) -> Iterator[Step]:
    """What guest and user may do at any time, or never."""
    idle = world.plan is None and world.call is None and all(d.durable == d.writes for d in world.disks)
    if world.guest == "paused" and idle:
        yield Step("user resumes the guest", world._replace(guest="running"))
    observed = world.plan is not None and world.plan[0] == "do"
    if world.guest == "off" and world.libvirtd and not world.call and world.config == "saved" and not observed:
        yield from _boot(world)


def guest_writes(world: World) -> Iterator[Step]:
    """One write, to any location of any disk."""
    if world.guest != "running" or world.frozen:
        return
    for index, disk in enumerate(world.disks):
        for n in range(len(disk.base)):
            if disk.writes == "O" and disk.overlay is not None:
                if world.full and disk.overlay[n] is None:
                    yield Step("QEMU pauses the guest: no space for its overlay", world._replace(guest="io-error"))
                    continue
                written = {"overlay": (*disk.overlay[:n], NEWEST, *disk.overlay[n + 1 :])}
            else:
                written = {"base": (*disk.base[:n], NEWEST, *disk.base[n + 1 :])}
            acked = (*disk.acked[:n], NEWEST, *disk.acked[n + 1 :])
            after = put(world, index, acked=acked, **written)
            image = "overlay" if disk.writes == "O" else "base"
            yield Step(named(f"guest writes to its {image}", world, index), after, Kind.WRITE)


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
    yield Step(f"user boots the guest, P={names}", world._replace(guest="running", full=False, disks=disks))


def background_steps(world: World) -> Iterator[Step]:
    """What comes about by itself."""
    if world.config_full:
        yield Step("user frees space for the configuration", world._replace(config_full=False))
    if world.libvirtd and world.config == "cached":
        yield Step("time passes: the configuration becomes durable", saved(world))


def fault_steps(world: World, setting: Setting) -> Iterator[Step]:
    """One more misfortune."""
    spared = setting.spared and (world.call is not None or any(d.durable != d.writes for d in world.disks))
    waiting = world.plan is not None and world.plan[0] == "wait"
    if world.agent:
        dead = world._replace(agent=False, plan=None, doubt=False, copying=False, deaf=False, config_failing=False)
        yield _fault("the agent is killed", dead)
        if waiting and world.call and world.call[1] == 0:
            yield _fault("the agent is killed before its call is sent", dead._replace(call=None))
    if world.libvirtd:
        yield _fault("libvirtd is killed", libvirtd_gone(world))
    if world.guest != "off" and not spared:
        yield _fault("QEMU dies (or the guest powers off)", qemu_gone(world))
    if world.guest == "off" or not spared:
        yield _fault("power cut", _power_cut(world))
    if waiting:
        yield _fault("the call times out, and is still in flight", no_answer(world))
    if not world.full and any(d.overlay is not None for d in world.disks):
        yield _fault("the overlays' file system is full", world._replace(full=True))
    if setting.config_full and not world.config_full:
        yield _fault("the configuration's file system is full", world._replace(config_full=True))
    for index, disk in enumerate(world.disks):
        if disk.job in ("copying", "ready") and world.libvirtd and not world.call:
            yield _fault(named("QEMU's job fails", world, index), put(world, index, job="-", mirror="-", known=False))
    if world.vmbackup == "wanted":
        yield _fault("the user deletes the VMBackup", world._replace(vmbackup="deleted"))


def _fault(label: str, world: World) -> Step:
    return Step("FAULT: " + label, world, Kind.FAULT)


def _power_cut(world: World) -> World:
    off = qemu_gone(libvirtd_gone(world))
    disks = tuple(d._replace(persistent=d.durable) for d in off.disks)
    off = off._replace(disks=disks, config="saved", record=off.kept)
    off = off._replace(plan=None, call=None, config_full=False)
    return off._replace(agent=False, doubt=False, copying=False, deaf=False, config_failing=False)
