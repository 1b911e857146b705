"""Write docs/top.svg, the picture in the README: `vmbackup top` of a real agent with four guests.

python -m docs.picture
"""

from __future__ import annotations

import re
import tempfile
import time
from io import StringIO
from pathlib import Path

from rich.console import Console

from sandbox.kube import KubeApi
from sandbox.libvirtd import Libvirtd, domain_xml
from tests.support.agents import Agent, free_port
from tests.support.domains import make_disk, wait_until
from tests.support.manifests import store
from vmbackup.commands.top import Look, read, render

TARGET = Path(__file__).with_name("top.svg")
CRDS = Path(__file__).parent.parent / "crds"
NODE = "node-a"
WIDTH = 122  # columns
SECONDS = 60
FONT_OF_A_WEB_SITE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # which an image does not load


def main() -> None:
    """Start a world of its own, draw, and end it."""
    with tempfile.TemporaryDirectory(prefix="vmb-") as folder:
        directory = Path(folder)
        with KubeApi(directory / "kube") as kube, Libvirtd(directory / "vm") as libvirtd:
            kube.apply_crds(CRDS)
            kube.apply(store(NODE, directory={"path": str(directory / "store")}))
            agent = Agent(kube, libvirtd, NODE, directory, free_port())
            agent.start()
            try:
                at_work(agent, libvirtd, directory)
                draw(agent)
            finally:
                agent.stop()


def at_work(agent: Agent, libvirtd: Libvirtd, directory: Path) -> None:
    """Four guests: one at rest, one whose last backup failed, one that is copied, and one that is merged."""
    for name in ("mail-01", "build-01", "web-01", "db-01"):
        start(libvirtd, name, directory)
        agent.apply(name).wait()
    agent.apply("build-01", **{"copy.bandwidth": "1Mi", "copy.deadlineSeconds": 1}).wait(ready="False")
    merged = agent.apply("db-01", **{"copy.bandwidth": "4Mi", "commit.bandwidth": "8Mi"})
    merged.wait_for_copying()
    libvirtd.qemu_io("db-01", "vda", "write -P 0x22 0 120M")
    agent.apply("web-01", **{"copy.bandwidth": "3Mi"}).wait_for_copying()
    libvirtd.qemu_io("web-01", "vda", "write -P 0x22 0 9M")
    merged.patch({"copy": {"bandwidth": None}})
    wait_until(lambda: (agent.metric('vmbackup_backup_merged_bytes{domain="db-01"}') or 0) > 0, "a merge", SECONDS)


def start(libvirtd: Libvirtd, name: str, directory: Path) -> None:
    """A guest that has no system, and 64 MiB on its disk."""
    images = directory / name
    images.mkdir()
    file = images / "domain.xml"
    file.write_text(domain_xml(name, [make_disk(images, "vda", "raw", "128M")]))
    libvirtd.virsh("define", str(file))
    libvirtd.virsh("start", name)
    libvirtd.qemu_io(name, "vda", "write -P 0x11 0 64M")


def draw(agent: Agent) -> None:
    """Look at it twice, as `vmbackup top` does: the rates are between the two."""
    before = look(agent)
    time.sleep(2)
    console = Console(width=WIDTH, record=True, file=StringIO(), force_terminal=True, highlight=False)
    console.print(render([look(agent)], [before]))
    picture = console.export_svg(title="vmbackup top", unique_id="top")
    TARGET.write_text(FONT_OF_A_WEB_SITE.sub("", picture))


def look(agent: Agent) -> Look:
    """What it says now."""
    return read(agent.metrics(), agent.url.removeprefix("http://"), time.time())


if __name__ == "__main__":
    main()
