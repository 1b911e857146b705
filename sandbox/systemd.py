"""A systemd of its own, that boots the units it is given: a container with this machine's files under a writable layer.

Its network is the machine's, its processes can be seen from outside, and nothing of it is left. Needs root.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from sandbox.isolated import control_groups
from sandbox.processes import Program

_BOOT = """
set -e
for group in {groups}; do # one without its own processors accepts no process, and needs none
    (echo $$ >$group/cgroup.procs) 2>/dev/null || :
done
cd {directory}
mount -t tmpfs none layer
mkdir layer/upper layer/work
mount -t overlay -o lowerdir=/,upperdir=layer/upper,workdir=layer/work overlay root
rm -rf root/etc/systemd/system/*.wants
cp -rT files root
exec systemd-nspawn --quiet --directory=root --machine={name} --register=no --keep-unit --console=pipe \\
    {binds} --boot -- --unit=wanted.target --log-target=console
"""
_STOP_SECONDS = 60


@contextmanager
def booted(directory: Path, wanted: str, files: Mapping[str, str], binds: Sequence[Path]) -> Iterator[Program]:
    """Boot it for as long as this is entered; then everything is stopped in good order.

    `directory` is new and its own. `wanted` is a unit among `files`, which are put into its file system by their paths.
    `binds` are directories that it shares with the machine.
    """
    name = f"vmb-{os.getpid()}-{directory.name}".replace("_", "-")  # as a host's name
    for folder in ("layer", "root", "files"):
        (directory / folder).mkdir(parents=True)
    target = f"[Unit]\nWants={wanted}\n"
    for path, content in {**files, "/etc/systemd/system/wanted.target": target}.items():
        file = directory / "files" / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755 if content.startswith("#!") else 0o644)
    with control_groups(name) as groups:
        script = _BOOT.format(
            groups=shlex.join(map(str, groups)),
            directory=shlex.quote(str(directory)),
            name=shlex.quote(name),
            binds=shlex.join(f"--bind={path}" for path in binds),
        )
        systemd = Program("systemd", directory)
        try:
            # slave: a file system that is unmounted here meanwhile is not kept by it
            systemd.start(["unshare", "--mount", "--propagation=slave", "--", "sh", "-c", script])
            yield systemd
        finally:
            systemd.stop(seconds=_STOP_SECONDS)
            subprocess.run(["rm", "-rf", f"/run/systemd/nspawn/propagate/{name}"], check=False)
