"""The image of the agent, built with buildah on a base that debootstrap makes: no image registry is needed.

    python -m sandbox.image        # builds it, and says where it is

Archives are kept in the cache, by what goes into them, and so is the base. Debian's packages and PyPI's come from where
this machine gets its own: its mirrors, certificates and settings are under /mnt while the image is built, and leave
nothing in it. Needs root, as debootstrap does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from sandbox.processes import SandboxError
from sandbox.tools import CACHE, locked, say

ROOT = Path(__file__).parent.parent
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NAME = f"vmbackup:{VERSION}"
SUITE = "trixie"  # what debian:13-slim is

_CONTEXT = ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml", "requirements", "operator")
BASE = f"localhost/debootstrap:{SUITE}"  # what the image's label says: made here, and in no registry
_KEPT = 3  # archives in the cache
_UNWANTED = (  # of debootstrap's; debian:13-slim has neither
    "etc/hostname",
    "etc/resolv.conf",
    "usr/share/info/*",
    "usr/share/locale/*",
    "usr/share/man/*",
    "usr/share/doc/*/[!c]*",
    "var/cache/apt/archives/*.deb",
    "var/lib/apt/lists/*",
    "var/log/*",
)
_SLIM = """\
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
"""
_BASE_DOCKERFILE = """\
FROM scratch
ADD base.tar /
ARG APT_CONFIG
RUN apt-get update -qq && apt-get upgrade -qq -y && apt-get clean && rm -rf /var/lib/apt/lists/* /var/log/*
"""


def archive(*, revision: str = "", fresh: bool = False) -> Path:
    """The image `NAME` as a docker-archive, which docker, podman and containerd load: from the cache, or built now.

    A new build takes a minute, and some more for the first base. `revision`: the commit to name in its labels;
    `fresh`: with today's Debian packages. SOURCE_DATE_EPOCH is its date. Raises SandboxError.
    """
    cache = CACHE / "image"
    cache.mkdir(parents=True, exist_ok=True)
    arguments = {"REVISION": revision} if revision else {}
    made = cache / f"vmbackup-{VERSION}-{_fingerprint(arguments)}.tar"
    with locked(cache / "lock"):
        if fresh or not made.exists():
            _build(made, _base(cache, fresh=fresh), arguments)
            for old in sorted(cache.glob("vmbackup-*.tar"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
                old.unlink()
    return made


def base() -> Path:
    """The image `BASE`, the base of our image, as a docker-archive: from the cache, or built now."""
    cache = CACHE / "image"
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        return _base(cache, fresh=False)


def _fingerprint(arguments: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([arguments, _epoch(), SUITE]).encode())
    for path in (Path(__file__), *_files()):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _files() -> Iterator[Path]:
    for name in _CONTEXT:
        inside = (ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name]
        yield from sorted(path for path in inside if path.is_file() and "__pycache__" not in path.parts)


def _epoch() -> str:
    return os.environ.get("SOURCE_DATE_EPOCH", "0")


def _base(cache: Path, *, fresh: bool) -> Path:
    """The base image as a docker-archive: Debian's minimal system, without documentation."""
    digest = hashlib.sha256("".join((BASE, *_UNWANTED, _SLIM, _BASE_DOCKERFILE)).encode()).hexdigest()[:12]
    made = cache / f"base-{SUITE}-{digest}.tar"
    if made.exists() and not fresh:
        return made
    if os.geteuid() != 0:
        raise SandboxError("debootstrap, which builds the base image, needs root: run this with sudo")
    say(f"building a base image of Debian {SUITE} with debootstrap")
    with tempfile.TemporaryDirectory(dir=cache) as temporary, _Builder(Path(temporary), cache) as builder:
        root, context = Path(temporary) / "root", Path(temporary) / "context"
        context.mkdir()
        _run("debootstrap", "--variant=minbase", SUITE, str(root), _mirrors()["Debian"])
        for pattern in _UNWANTED:
            for path in root.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (root / "etc/apt/sources.list").write_text("")
        (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(_SLIM)
        _run("tar", "-C", str(root), "--exclude=./dev/*", "-cf", str(context / "base.tar"), ".")
        (context / "Dockerfile").write_text(_BASE_DOCKERFILE)
        builder.build(BASE, context, {}, made)
    return made


def _build(made: Path, base: Path, arguments: dict[str, str]) -> None:
    say(f"building the image {NAME}")
    with tempfile.TemporaryDirectory(dir=made.parent) as temporary, _Builder(Path(temporary), made.parent) as builder:
        builder.load(BASE, base)
        builder.build(NAME, ROOT, {"BASE": BASE, "VERSION": VERSION, **arguments}, made)


class _Builder:
    """buildah, with a storage of its own in `directory`, and what this machine tells apt and pip for /mnt."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self._buildah = ["buildah", f"--root={directory / 'storage'}", f"--runroot={directory / 'run'}"]
        self._site = directory / "site"
        self._cache = cache

    def __enter__(self) -> _Builder:
        self._arguments = write_site(self._site)
        (self._cache / "pip").mkdir(exist_ok=True)
        (self._site / "pip").mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        """Unmount everything, so that the directory can be removed."""
        subprocess.run([*self._buildah, "rm", "--all"], capture_output=True, check=False)

    def load(self, name: str, archive: Path) -> None:
        """Load an image from an archive under this name."""
        _run(*self._buildah, "pull", "--quiet", f"docker-archive:{archive}:{name}")

    def build(self, name: str, context: Path, arguments: dict[str, str], made: Path) -> None:
        """Build the Dockerfile in `context`; `made` is there only when it is whole."""
        site = {**self._arguments, "PIP_CACHE_DIR": "/mnt/pip"}
        _run(
            *self._buildah,
            "bud",
            "--quiet",
            "--pull=never",
            "--network=host",
            "--identity-label=false",
            f"--timestamp={_epoch()}",
            f"--volume={self._site}:/mnt:ro",
            f"--volume={self._cache / 'pip'}:/mnt/pip",
            *(f"--build-arg={name}={value}" for name, value in {**site, **arguments}.items()),
            f"--tag={name}",
            str(context),
        )
        new = made.with_suffix(".new")
        new.unlink(missing_ok=True)
        _run(*self._buildah, "push", "--quiet", name, f"docker-archive:{new}:{name}")
        new.rename(made)


def write_site(directory: Path) -> dict[str, str]:
    """What this machine tells apt and pip, for /mnt while an image is built. Returns its build arguments."""
    directory.mkdir()
    mirrors = _mirrors()
    (directory / "sources.list").write_text(
        f"deb {mirrors['Debian']} {SUITE} main\ndeb {mirrors['Debian']} {SUITE}-updates main\n"
        f"deb {mirrors['Debian-Security']} {SUITE}-security main\n"
    )
    settings = _run("apt-config", "dump").splitlines()
    (directory / "apt.conf").write_text(
        'Dir::Etc::sourcelist "/mnt/sources.list";\n'
        + "".join(f"{line}\n" for line in settings if line.startswith("Acquire::http"))
    )
    shutil.copyfile("/etc/ssl/certs/ca-certificates.crt", directory / "certificates.crt")
    index = {name: value for name, value in os.environ.items() if name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")}
    return {"APT_CONFIG": "/mnt/apt.conf", "PIP_CERT": "/mnt/certificates.crt", **index}


def _mirrors() -> dict[str, str]:
    """Where this machine gets Debian's packages from, by the archive's label."""
    listed = _run(
        "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages", "Origin: Debian"
    )
    mirrors = dict(line.split() for line in reversed(listed.splitlines()))
    if missing := {"Debian", "Debian-Security"} - mirrors.keys():
        raise SandboxError(f"apt has no mirror for {' and '.join(sorted(missing))}: run `apt-get update`")
    return mirrors


def _run(*command: str) -> str:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SandboxError(f"{command[0]} is missing: `make install` installs it") from None
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise SandboxError(f"{' '.join(command[:2])} … failed ({done.returncode}):\n{said}")
    return done.stdout


def main() -> None:
    try:
        made = archive(revision=_run("git", "-C", str(ROOT), "rev-parse", "HEAD").strip())
    except SandboxError as error:
        sys.exit(str(error))
    say(
        f"{NAME}, {made.stat().st_size >> 20} MiB; `docker load -i`, `podman load -i` or `ctr -n k8s.io images import`:"
    )
    print(made)


if __name__ == "__main__":
    main()
