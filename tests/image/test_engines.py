"""The Dockerfile as it stands, built by docker and by podman; buildah's builds are what all other tests live on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox import image
from tests.support.domains import wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

BUILT = "built-by-an-engine:test"
SITE = "site:test"  # the base with what this machine tells apt and pip: docker mounts nothing while it builds


@dataclass(frozen=True)
class Engine:
    """docker or podman, with a storage of its own: their command lines are the same."""

    command: tuple[str, ...]
    when_it_runs: tuple[str, ...] = ()

    def run(self, *words: str, code: int = 0) -> str:
        """What a container of the image says, read-only and without a network."""
        return self("run", "--rm", "--read-only", "--network=none", *self.when_it_runs, *words, code=code)

    def __call__(self, *words: str, code: int = 0) -> str:
        # the classic builder of docker: BuildKit of Debian's version is a plugin that Debian does not have
        environment = os.environ | {"DOCKER_BUILDKIT": "0"}
        done = subprocess.run([*self.command, *words], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, (words, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout


@contextmanager
def podman(directory: Path) -> Generator[Engine]:
    storage = (f"--root={directory / 'storage'}", f"--runroot={directory / 'run'}")
    # a container in a container: cgroups of either version, and limits that not even root may raise
    plain = ("--runtime=runc", "--cgroup-manager=cgroupfs", "--events-backend=none")
    engine = Engine(("podman", *storage, *plain), ("--ulimit=nofile=1024", "--ulimit=nproc=1024"))
    try:
        yield engine
    finally:
        engine("rm", "--all", "--force")


@contextmanager
def docker(directory: Path) -> Generator[Engine]:
    socket = directory / "socket"
    places = [
        f"--data-root={directory / 'data'}",
        f"--exec-root={directory / 'exec'}",
        f"--pidfile={directory / 'pid'}",
    ]
    alone = ["--bridge=none", "--iptables=false", "--ip6tables=false", f"--host=unix://{socket}"]
    with (directory / "log").open("w") as log, subprocess.Popen(["dockerd", *places, *alone], stderr=log) as daemon:
        try:
            wait_until(socket.exists, "dockerd listens", 60)
            yield Engine(("docker", f"--host=unix://{socket}"))
        finally:
            daemon.terminate()
    subprocess.run(["umount", directory / "exec/netns/default"], check=False)  # dockerd leaves it


@pytest.fixture(scope="module", params=[docker, podman], ids=lambda engine: engine.__name__)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An engine that has built the Dockerfile."""
    directory = Path(tempfile.mkdtemp(prefix="vmb-"))  # short, for the path of a socket
    arguments = image.write_site(directory / "site")
    (directory / "site/Dockerfile").write_text(f"FROM {image.BASE}\nCOPY . /mnt/\n")
    with request.param(directory) as made:
        made("load", "--quiet", f"--input={image.base()}")
        made("build", "--quiet", f"--tag={SITE}", str(directory / "site"))
        given = [f"--build-arg={name}={value}" for name, value in {**arguments, "BASE": SITE}.items()]
        made("build", "--quiet", "--network=host", *given, f"--tag={BUILT}", str(image.ROOT))
        yield made
    shutil.rmtree(directory)


def test_it_runs_and_says_its_version(engine: Engine) -> None:
    said = engine.run(BUILT, "--version")
    assert said.strip() == f"vmbackup {image.VERSION}"


def test_it_is_labelled_and_starts_the_agent(engine: Engine) -> None:
    (about,) = json.loads(engine("image", "inspect", BUILT))
    assert about["Config"]["Labels"]["org.opencontainers.image.version"] == image.VERSION
    assert about["Config"]["Entrypoint"] == ["vmbackup"]
    assert about["Config"]["Cmd"] == ["agent"]


def test_no_compiler_is_in_it(engine: Engine) -> None:
    found = engine.run("--entrypoint=sh", BUILT, "-c", "for it in sh gcc cc pip make; do command -v $it; done; :")
    assert found.split() == ["/usr/bin/sh"]


def test_nothing_of_what_it_was_built_with_stays_in_its_environment(engine: Engine) -> None:
    (about,) = json.loads(engine("image", "inspect", BUILT))
    names = {variable.partition("=")[0] for variable in about["Config"]["Env"]}
    assert names == {"PATH", "LANG", "PYTHONDONTWRITEBYTECODE"}
