"""What a release carries, in one directory: `python -m sandbox.release` writes it to dist/.

The same commit gives the same bytes of everything but the image, whose Debian packages are those of the day.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from plugins import build as plugin
from sandbox import binaries, image
from sandbox.image import ROOT, VERSION
from sandbox.processes import SandboxError
from sandbox.sbom import sbom
from sandbox.tools import say

SUMS = "SHA256SUMS"
FILES = (  # and the sums
    "install.yaml",
    f"vmbackup-{VERSION}.tgz",  # the chart, by the name that helm gives it
    f"vmbackup-{VERSION}-image.tar.gz",
    f"vmbackup-{VERSION}-image.cdx.json",
    f"vmbackup-{VERSION}-py3-none-any.whl",
    f"vmbackup-{VERSION}.tar.gz",  # the sources of the wheel
    f"vmbackup-{VERSION}-requirements.txt",
    "vmbackup-agent.service",
    "agent.env",
    "kubectl-vmbackup.tar.gz",
    "vmbackup.yaml",  # of krew
)


def main() -> None:
    try:
        os.environ.setdefault("SOURCE_DATE_EPOCH", _git("log", "-1", "--format=%ct"))
        if changed := _git("status", "--porcelain"):
            say(f"uncommitted changes are in the release:\n{changed}")
        release(ROOT / "dist", image.archive(revision=_git("rev-parse", "HEAD"), fresh=True))
    except SandboxError as error:
        sys.exit(str(error))


def release(directory: Path, archive: Path) -> None:
    """Write all of it, with an existing image. Removes the files of earlier releases. Raises SandboxError."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    made = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    say("packing the release")
    _run(sys.executable, "-m", "hatchling", "build", "--directory", directory)
    (directory / "install.yaml").write_text(_run(binaries.path("kubectl"), "kustomize", ROOT / "manifests"))
    _run(binaries.path("helm"), "package", ROOT / "manifests/chart", "--destination", directory)
    shutil.copyfile(ROOT / "requirements/run.lock", directory / f"vmbackup-{VERSION}-requirements.txt")
    for name in ("vmbackup-agent.service", "agent.env"):
        shutil.copyfile(ROOT / "packaging/systemd" / name, directory / name)
    with tempfile.TemporaryDirectory() as temporary:
        plugin.build(Path(temporary))
        for name in ("kubectl-vmbackup.tar.gz", "vmbackup.yaml"):
            shutil.copyfile(Path(temporary) / name, directory / name)
    _compress(archive, directory / f"vmbackup-{VERSION}-image.tar.gz")
    bill = sbom(archive, "vmbackup", VERSION, made)
    (directory / f"vmbackup-{VERSION}-image.cdx.json").write_text(bill)
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(directory.iterdir())]
    (directory / SUMS).write_text("".join(sums))
    for line in sums:
        say(line.rstrip())


def _compress(source: Path, target: Path) -> None:
    """docker, podman and containerd load it as it is. No name and no time in it."""
    with (
        source.open("rb") as read,
        target.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed,
    ):
        shutil.copyfileobj(read, packed, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git(*arguments: str) -> str:
    return _run("git", *arguments).strip()


def _run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SandboxError(f"{' '.join(words)} failed ({done.returncode}): {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    main()
