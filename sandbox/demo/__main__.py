"""The demo's two commands."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from sandbox.demo.proof import acknowledged, prove_copy, prove_guest
from sandbox.demo.view import Story, View
from sandbox.demo.watch import condition, statuses
from sandbox.demo.world import DOMAIN, World
from sandbox.guest import Guest
from sandbox.oracle import Bounds, ProofError
from sandbox.processes import SandboxError


def up(world: World, view: View) -> None:
    """Start everything that is not running, take a backup, prove it, and show what to try next."""
    guest = _start(world, view)
    before = world.disks_in_use()
    view.heading(f"A backup of {DOMAIN} while it writes")
    view.step("virsh domblklist, before:")
    view.detail(before)
    name, bounds = _back_up(world, view, guest)
    view.heading("The proof")
    after = world.disks_in_use()
    if after != before:
        raise ProofError(f"the disks of {DOMAIN} have changed:\n{after}")
    view.step("virsh domblklist, after: the same")
    view.detail(after)
    folder = world.backup_folder(name)
    for proven in prove_copy(folder, bounds):
        view.step(f"copy of {proven}" if proven[0] == "v" else proven)
    for proven in prove_guest(guest):
        view.step(proven)
    _what_next(world, view, name, folder)


def _start(world: World, view: View) -> Guest:
    view.heading("Starting libvirt, Kubernetes and the agent")
    guest = world.start_guest()
    view.step(f"libvirt with the domain {DOMAIN}: {len(guest.disks)} disks, emulated, booting")
    world.start_kube()
    view.step(f"etcd and kube-apiserver at {world.kube.url}, with our resources and a store")
    world.start_agent()
    view.step(f"the agent of this hypervisor, metrics at {world.metrics_url}/metrics")
    guest.wait_for_agent()
    guest.wait_for_more(20)
    view.step(f"{DOMAIN} is running and writes checksummed records: {min(acknowledged(guest).values())} so far")
    return guest


def _back_up(world: World, view: View, guest: Guest) -> tuple[str, Bounds]:
    """Apply a VMBackup and show it until it is Ready; its name. Raises SandboxError when it fails."""
    before = acknowledged(guest)
    after: dict[str, int] = {}
    during = ""
    name = world.next_name()
    watching = statuses(world.kube, name, alive=lambda: world.agent.running)
    next(watching)  # the first phases pass in a blink: watch before there is anything to see
    world.apply_backup(name)
    view.step(f"kubectl apply: VMBackup {name}")
    story = Story(name)
    with view:
        for status in watching:
            new_phase = story.take(status) if status else False
            if not after and "snapshotTime" in story.status:
                after = acknowledged(guest)
                during = world.disks_in_use()
            story.guest = f"record {min(acknowledged(guest).values())} acknowledged"
            view.show(story, new_phase=new_phase)
    ready = condition(story.status, "Ready")
    if ready["status"] != "True":
        raise SandboxError(f"{name} failed: {ready['reason']}: {ready['message']}")
    view.step(f"Ready, {time.monotonic() - story.started:.1f} s after kubectl apply")
    if ".vmb-" in during:
        view.step("virsh domblklist, during the backup:")
        view.detail(during)
    return name, Bounds.around(before, after or acknowledged(guest))


def _what_next(world: World, view: View, name: str, folder: Path) -> None:
    number = int(name.rpartition("-")[2]) + 1
    sample = "manifests/samples/vmbackup.yaml"
    view.heading("Everything is still running. What to try next")
    for command, meaning in (
        (f"source {world.env_file}", "sets KUBECONFIG, LIBVIRT_DEFAULT_URI, PATH and others for the commands below"),
        ("kubectl get vmb -o wide", "all backups"),
        (f"kubectl describe vmb {name}", "conditions, disks, events"),
        ("kubectl explain vmbackup.spec.snapshot.quiesce", "the documentation of every field"),
        (f"sed s/{DOMAIN}-1/{DOMAIN}-{number}/ {sample} | kubectl apply -f -", "another backup"),
        ("kubectl get vmb --watch", "watch it"),
        (f"curl -s {world.metrics_url}/metrics | grep ^vmbackup", "what Prometheus sees"),
        (f"ls -l {folder}", "the backup: ordinary files, with a README"),
        (f"virsh domblklist {DOMAIN}", "the guest's disks"),
        (f"vmbackup check {DOMAIN}", "which disks would be backed up, and which refused"),
        ("make demo-down", "stop and remove the demo"),
    ):
        view.console.print(f"  {command}", soft_wrap=True)
        view.console.print(f"      [dim]{meaning}[/dim]", soft_wrap=True)


def down(world: World, view: View) -> None:
    """Stop and remove everything that `up` started."""
    if not world.exists():
        view.step("no demo is running")
        return
    world.remove()
    view.step(f"the demo is stopped, and {world.state} is removed")


def main() -> int:
    parser = argparse.ArgumentParser(prog="sandbox.demo", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    command = parser.parse_args().command
    world, view = World(), View()
    try:
        {"up": up, "down": down}[command](world, view)
    except (SandboxError, ProofError, RuntimeError, TimeoutError) as error:
        view.console.print(f"\n[bold red]The demo failed:[/bold red] {error}", soft_wrap=True)
        view.console.print(f"Logs are in {world.state}; `make demo-down` stops and removes the demo.", soft_wrap=True)
        if (tail := world.agent.log_tail()) and tail not in str(error):
            view.console.print("The end of the agent's log:")
            view.detail(tail)
        return 1
    except KeyboardInterrupt:
        view.console.print("\nInterrupted. `make demo` continues; `make demo-down` stops and removes the demo.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
