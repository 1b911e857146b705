"""What libvirt 9.0 and QEMU 7.2 do, step by step.

Sources: src/qemu/qemu_snapshot.c, qemu_blockjob.c, qemu_block.c, qemu_process.c; the steps marked (replayed) were seen
on real ones, with libvirtd or QEMU killed at that point. A call is not atomic: guest writes, faults and the agent come
between its steps, and a call whose client has given up goes on all the same (replayed with SIGSTOP).
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.model.world import ENOUGH, Disk, Kind, Step, World, content, named, on, put, put_all
from vmbackup.protocol.record import Image
from vmbackup.protocol.terms import Action, Do

LETTER = {Image.BASE: "B", Image.OVERLAY: "O"}
SNAPSHOT_WAITS_FOR_QEMU = (1, 2)  # its steps during which libvirtd unlinks its overlays if QEMU dies (V2)
SAVES_CONFIG = 3
OPENS_BASE = ((Do.SNAPSHOT, 1), (Do.COMMIT, 1), (Do.PIVOT, 0))  # by its name, in these steps of the calls
GUEST_AGENT_CALLS = (Do.FREEZE, Do.THAW)  # an unknown outcome is a failure: nothing of the chain hangs on it


def call_steps(world: World) -> Iterator[Step]:
    """The next step of the call in flight."""
    assert world.call
    action, step = world.call[0].it, world.call[1]
    if step == SAVES_CONFIG:
        yield _save_config(world, action)
    elif action.do is Do.REDEFINE and world.config_full:
        yield Step("libvirt cannot redefine: no space for the configuration", answer(world, "error"))
    elif action.do is Do.SNAPSHOT:
        yield _snapshot(world, step)
    elif action.do is Do.COMMIT:
        yield _commit(world, index_of(action), step)
    elif action.do is Do.PIVOT:
        yield _pivot(world, index_of(action), step)
    elif action.do is Do.REDEFINE:
        yield _redefine(world, action)
    else:
        yield _guest_call(world, action.do)


def base_swapped(world: World) -> Iterator[Step]:
    """The name of base leads to another file for the moment in which QEMU opens it (replayed, on 7.2).

    That is at the snapshot, at the start of a commit and at the pivot. QEMU keeps the file that it has opened.
    """
    assert world.call
    action, step = world.call[0].it, world.call[1]
    if (action.do, step) not in OPENS_BASE or not on(world):
        return
    for after in call_steps(world):
        opened = range(len(world.disks)) if action.do is Do.SNAPSHOT else [index_of(action)]
        for index in opened:
            label = named(f"FAULT: {after.label}, as base's name leads to another file", world, index)
            yield Step(label, put(after.world, index, astray=True), Kind.FAULT)


def call_fails(world: World) -> Iterator[Step]:
    """The call in flight fails before it has done anything, or in its last step: it cannot save the configuration."""
    assert world.call
    action, step = world.call[0].it, world.call[1]
    if step == 0:
        yield Step(f"FAULT: libvirt fails to {action.do}, nothing is done", answer(world, "error"), Kind.FAULT)
    if step == SAVES_CONFIG and not world.config_full:
        yield _saving_fails(world, action)._replace(kind=Kind.FAULT)


def answer(world: World, outcome: str) -> World:
    """The call ends; a caller that waits gets an answer: ok or error."""
    plan = world.plan
    if plan and plan[0] == "wait":
        plan = (outcome, plan[1])
    return world._replace(call=None, plan=plan)


def index_of(action: Action) -> int:
    """Which disk an action is about; 0 for those about the guest."""
    return "abcd".index(action.target or "a")


def _next(world: World, step: int) -> World:
    assert world.call
    return world._replace(call=(world.call[0], step))


def _guest_call(world: World, do: Do) -> Step:
    """Suspend, resume: one QMP command. Freeze, thaw: the guest agent, which is deaf while the guest is paused."""
    if do is Do.SUSPEND:
        guest = "suspended" if world.guest == "running" else world.guest
        return Step("QEMU suspends the guest", answer(world._replace(guest=guest), "ok" if on(world) else "error"))
    if do is Do.RESUME:
        if not on(world) or world.migrating:
            return Step("libvirt refuses to resume", answer(world, "error"))
        return Step("QEMU resumes the guest", answer(world._replace(guest="running"), "ok"))
    assert do in GUEST_AGENT_CALLS
    if world.guest != "running":
        return Step(f"libvirt cannot {do}: the guest agent is deaf", answer(world, "error"))
    return Step(f"libvirt lets the guest agent {do}", answer(world._replace(frozen=do is Do.FREEZE), "ok"))


def _redefine(world: World, action: Action) -> Step:
    """virDomainDefineXML: written, fsynced, renamed; the directory is not fsynced (source)."""
    after = world
    for target, image in action.images:
        index = "abcd".index(target)
        if after.disks[index].persistent != "-":
            after = put(after, index, persistent=LETTER[image])
    changed = after.config != "saved" or any(d.persistent != d.durable for d in after.disks)
    names = "".join(d.persistent for d in after.disks)
    return Step(f"libvirt redefines: P={names}", answer(after._replace(config="cached" if changed else "saved"), "ok"))


def _snapshot(world: World, step: int) -> Step:
    """virDomainSnapshotCreateXML(DISK_ONLY|ATOMIC|NO_METADATA), all disks in one transaction."""
    if step == 0:
        taken = any(d.overlay is not None or d.persistent != "B" for d in world.disks)
        busy = any(d.writes != "B" or d.live != "B" or d.known or d.job != "-" or d.mirror != "-" for d in world.disks)
        if taken or (on(world) and (busy or world.migrating)):
            return Step("libvirt refuses the snapshot", answer(world, "error"))
        if not on(world):  # it succeeds, silently (replayed)
            disks = tuple(_fresh_overlay(d)._replace(persistent="O", snapshot=d.base) for d in world.disks)
            return Step(
                "libvirt takes the snapshot OFFLINE", answer(world._replace(disks=disks, config="cached"), "ok")
            )
        disks = tuple(_fresh_overlay(d) for d in world.disks)
        return Step("libvirt creates the overlays", _next(world._replace(disks=disks), 1))
    if step == 1:
        disks = tuple(d._replace(writes="O", locked=True, snapshot=d.base) for d in world.disks)
        return Step("QEMU switches to the overlays", _next(world._replace(disks=disks), 2))
    disks = tuple(d._replace(live="O", persistent="O" if d.persistent == "B" else d.persistent) for d in world.disks)
    saved = world._replace(disks=disks, config="unsaved")
    return Step("libvirt saves its status: L=O", _next(saved, SAVES_CONFIG))


def _fresh_overlay(disk: Disk) -> Disk:
    nothing = (None,) * len(disk.base)
    return disk._replace(overlay=nothing, copied=nothing, unwritten=False)


def _commit(world: World, index: int, step: int) -> Step:
    """virDomainBlockCommit(SHALLOW|ACTIVE), base explicit."""
    disk = world.disks[index]
    if step == 0:
        idle = not disk.known and disk.mirror == "-" and disk.job == "-"
        if not on(world) or world.migrating or disk.live != "O" or disk.writes != "O" or not idle:
            return Step(named("libvirt refuses the commit", world, index), answer(world, "error"))
        return Step(named("libvirt registers the job", world, index), _next(put(world, index, known=True), 1))
    if step == 1:
        return Step(
            named("QEMU starts the job", world, index), _next(put(world, index, job="copying", astray=False), 2)
        )
    return Step(named("libvirt saves <mirror>", world, index), answer(put(world, index, mirror="pending"), "ok"))


def _pivot(world: World, index: int, step: int) -> Step:
    """virDomainBlockJobAbort(PIVOT): job-complete, job-dismiss, status, config."""
    disk = world.disks[index]
    if step == 0:
        if not on(world) or not disk.known or disk.job != "ready":
            return Step(named("libvirt refuses the pivot", world, index), answer(world, "error"))
        base = disk.base if disk.astray else content(disk, "O")
        after = put(world, index, base=base, writes="B", job="concluded", astray=False)
        return Step(named("QEMU pivots to base", world, index), _next(after, 1))
    if step == 1:
        return Step(named("libvirt dismisses the job", world, index), _next(put(world, index, job="-"), 2))
    return Step(named("libvirt saves its status: L=B", world, index), _next(_pivoted(world, index), SAVES_CONFIG))


def _pivoted(world: World, index: int) -> World:
    persistent = world.disks[index].persistent
    config = "unsaved" if persistent == "O" else world.config  # it changes P only where that names the same image
    persistent = "B" if persistent == "O" else persistent
    after = put(world, index, live="B", mirror="-", known=False, locked=False, persistent=persistent)
    return after._replace(config=config)


def _save_config(world: World, action: Action) -> Step:
    """The last step of snapshot and pivot."""
    if world.config_full:
        return _saving_fails(world, action)
    return Step("libvirt saves the configuration", answer(world._replace(config="cached"), "ok"))


def _saving_fails(world: World, action: Action) -> Step:
    """An error of the snapshot, success of the pivot (replayed)."""
    outcome = "error" if action.do is Do.SNAPSHOT else "ok"
    return Step(f"libvirt FAILS to save the configuration, the answer is: {outcome}", answer(world, outcome))


def qemu_gone(world: World) -> World:
    """QEMU has ended. A libvirtd that waits for the snapshot's answer unlinks the overlays it created (source; V2)."""
    after = put_all(world, writes="-", job="-", live="-", mirror="-", known=False, locked=False, astray=False)
    after = after._replace(guest="off", frozen=False, migrating=False)
    if not world.call or world.call[0].it.do is Do.REDEFINE:
        return after
    do, step = world.call[0].it.do, world.call[1]
    if (world.libvirtd or world.stopped) and do is Do.SNAPSHOT and step in SNAPSHOT_WAITS_FOR_QEMU:
        after = put_all(after, overlay=None)
    if step == SAVES_CONFIG and not world.config_full:
        after = after._replace(config="cached")
    return answer(after, "error")


def libvirtd_gone(world: World) -> World:
    """libvirtd has ended, and its calls with it; QEMU goes on. A caller that waited has an unknown outcome."""
    return no_answer(world)._replace(libvirtd=False, stopped=False, call=None, doubt=world.agent, migrating=False)


def no_answer(world: World) -> World:
    """The caller of the call in flight gives up; the call itself goes on."""
    if world.plan is None or world.plan[0] != "wait":
        return world
    if world.plan[1].it.do in GUEST_AGENT_CALLS:
        return world._replace(plan=("error", world.plan[1]))
    return world._replace(plan=None, doubt=True)


def libvirtd_steps(world: World) -> Iterator[Step]:
    """It comes back: from death with what it finds, from a stop as if nothing had happened."""
    if world.stopped:
        answering = 0 if world.sent is not None else ENOUGH
        yield Step("libvirtd goes on", world._replace(libvirtd=True, stopped=False, answering=answering))
        if world.plan and world.plan[0] == "wait":
            yield Step("agent's connection dies of the silence", no_answer(world))
    elif not world.libvirtd:
        yield Step("libvirtd starts", _libvirtd_starts(world))


def _libvirtd_starts(world: World) -> World:
    """libvirtd reads its files, and reconnects to QEMU and its jobs (replayed, each branch)."""
    if world.config == "unsaved":
        world = world._replace(config="saved", disks=tuple(d._replace(persistent=d.durable) for d in world.disks))
    world = world._replace(libvirtd=True, answering=0 if world.sent is not None else ENOUGH)
    if not on(world):
        return world
    for index, disk in enumerate(world.disks):
        if disk.known and disk.job == "concluded":  # it finishes the pivot
            after = _pivoted(put(world, index, job="-"), index)
            cached = disk.persistent == "O" and not world.config_full
            world = after._replace(config="cached" if cached else after.config)
        elif disk.known and disk.job == "-":  # it drops the job, and keeps <mirror ready='yes'> and L=O
            world = put(world, index, known=False)
        elif disk.known and disk.job == "ready" and disk.mirror == "pending":
            world = put(world, index, mirror="ready")
    return world  # a job without <mirror> goes on without it


def block_job_steps(world: World) -> Iterator[Step]:
    """The active commit: copies what base lacks, in the background; READY when nothing is left."""
    for index, disk in enumerate(world.disks):
        if disk.job in ("-", "foreign"):
            continue
        if disk.job != "concluded" and disk.writes == "O":
            lag = None if disk.astray else lagging(disk)  # astray, the job writes to the other file
            if lag is not None:
                assert disk.overlay
                base = (*disk.base[:lag], disk.overlay[lag], *disk.base[lag + 1 :])
                yield Step(named(f"QEMU's job copies block {lag} to base", world, index), put(world, index, base=base))
            elif disk.job == "copying":
                seen = world.libvirtd and disk.mirror == "pending"
                after = put(world, index, job="ready", mirror="ready" if seen else disk.mirror)
                yield Step(named("QEMU's job is READY", world, index), after)
        if world.libvirtd and disk.job == "ready" and disk.mirror == "pending":
            yield Step(named("libvirt sees READY", world, index), put(world, index, mirror="ready"))


def lagging(disk: Disk) -> int | None:
    """The first location that the job has still to copy to base."""
    assert disk.overlay
    pairs = enumerate(zip(disk.overlay, disk.base, strict=True))
    return next((n for n, (o, b) in pairs if o is not None and o != b), None)
