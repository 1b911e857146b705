"""Guest, user and misfortune: what happens without being asked for.

Assumption A (docs/protocol.md): a guest that stopped is not booted again between the agent's observation and its act,
nor before its configuration is durable; and nobody resumes a guest during the switch of its images.

`Live` accepts that a host or QEMU that dies in the middle of a switch of images loses writes (V1–V4), and nothing helps
where libvirt's configuration cannot be saved. So in these settings they die only while P, durable on disk, names the
image that QEMU writes, and nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.libvirt import Step, libvirtd_gone, no_answer, qemu_gone
from tests.model.world import Setting, World, content, named, put, saved

BOOT_FAILS = "BOOT FAILS"


def free_steps(world: World, setting: Setting) -> Iterator[Step]:
    """What guest and user may do at any time, or never."""
    if world.guest == "running" and not world.frozen and world.written < setting.writes:
        yield from _guest_writes(world)
    idle = world.plan is None and world.call is None and all(d.durable == d.writes for d in world.disks)
    if world.guest == "paused" and idle:
        yield Step("the user resumes the guest", world._replace(guest="running"))
    observed = world.plan is not None and world.plan[0] == "do"
    if world.guest == "off" and world.libvirtd and not world.call and world.config == "saved" and not observed:
        yield from _boot(world)


def _guest_writes(world: World) -> Iterator[Step]:
    version = world.written + 1
    for index, disk in enumerate(world.disks):
        for n in range(len(disk.base)):
            if disk.writes == "O" and disk.overlay is not None:
                if world.full and disk.overlay[n] is None:
                    yield Step("the guest pauses: no space", world._replace(guest="io-error"))
                    continue
                written = {"overlay": (*disk.overlay[:n], version, *disk.overlay[n + 1 :])}
            else:
                written = {"base": (*disk.base[:n], version, *disk.base[n + 1 :])}
            acked = (*disk.acked[:n], version, *disk.acked[n + 1 :])
            after = put(world._replace(written=version), index, acked=acked, **written)
            yield Step(named(f"the guest writes {version} to {disk.writes}", world, index), after)


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
    yield Step(f"boot from {names}", world._replace(guest="running", full=False, disks=disks))


def background_steps(world: World) -> Iterator[Step]:
    """What comes about by itself."""
    if world.config_full:
        yield Step("space for the configuration is freed", world._replace(config_full=False))
    if world.libvirtd and world.config == "cached":
        yield Step("config becomes durable", saved(world))


def fault_steps(world: World, setting: Setting) -> Iterator[Step]:
    """One more misfortune."""
    spared = setting.spared and (world.call is not None or any(d.durable != d.writes for d in world.disks))
    waiting = world.plan is not None and world.plan[0] == "wait"
    if world.agent:
        dead = world._replace(agent=False, plan=None, doubt=False, copying=False, deaf=False, config_failing=False)
        yield Step("KILL agent", dead)
        if waiting and world.call and world.call[1] == 0:
            yield Step("KILL agent, its call never sent", dead._replace(call=None))
    if world.libvirtd:
        yield Step("KILL libvirtd", libvirtd_gone(world))
    if world.guest != "off" and not spared:
        yield Step("QEMU DIES", qemu_gone(world))
    if world.guest == "off" or not spared:
        yield Step("POWER CUT", _power_cut(world))
    if waiting:
        yield Step("the call TIMES OUT (still in flight)", no_answer(world))
    if not world.full and any(d.overlay is not None for d in world.disks):
        yield Step("overlay file system FULL", world._replace(full=True))
    if setting.config_full and not world.config_full:
        yield Step("configuration file system FULL", world._replace(config_full=True))
    for index, disk in enumerate(world.disks):
        if disk.job in ("copying", "ready") and world.libvirtd and not world.call:
            yield Step(named("job FAILS", world, index), put(world, index, job="-", mirror="-", known=False))
    if world.vmbackup == "wanted":
        yield Step("VMBackup DELETED", world._replace(vmbackup="deleted"))


def _power_cut(world: World) -> World:
    off = qemu_gone(libvirtd_gone(world))
    disks = tuple(d._replace(persistent=d.durable) for d in off.disks)
    off = off._replace(disks=disks, config="saved", record=off.kept)
    off = off._replace(plan=None, call=None, config_full=False)
    return off._replace(agent=False, doubt=False, copying=False, deaf=False, config_failing=False)
