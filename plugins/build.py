"""Build the kubectl plugin: `python -m plugins.build [dist]`.

Writes kubectl-vmbackup (a zipapp), kubectl_complete-vmbackup, kubectl-vmbackup.tar.gz with both, and vmbackup.yaml, the
manifest for krew. The build is reproducible: the same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import shutil
import string
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from vmbackup.version import __version__

ROOT = Path(__file__).parent.parent
ARCHIVE = "kubectl-vmbackup.tar.gz"
URL = f"https://vmbackup.dev/releases/v{__version__}/{ARCHIVE}"

_PLUGIN, _COMPLETION = "kubectl-vmbackup", "kubectl_complete-vmbackup"
_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = "import sys\n\nfrom kubectl_vmbackup.__main__ import main\n\nsys.exit(main())\n"
_OLDEST = (1980, 1, 1, 0, 0, 0)  # that a zip archive can hold


def build(dist: Path, url: str = URL) -> None:
    """Build the plugin into `dist`; `url` is the address of the published archive."""
    dist.mkdir(parents=True, exist_ok=True)
    _executable(dist / _PLUGIN, _zipapp())
    _executable(dist / _COMPLETION, (ROOT / "plugins" / _COMPLETION).read_bytes())
    shutil.copyfile(ROOT / "LICENSE", dist / "LICENSE")
    archive = dist / ARCHIVE
    archive.write_bytes(_tar_gz(dist / name for name in (_PLUGIN, _COMPLETION, "LICENSE")))
    (dist / "LICENSE").unlink()
    template = string.Template((ROOT / "plugins" / "vmbackup.yaml").read_text())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    (dist / "vmbackup.yaml").write_text(template.substitute(VERSION=__version__, URL=url, SHA256=digest))


def _zipapp() -> bytes:
    packed = io.BytesIO(_SHEBANG)
    packed.seek(0, io.SEEK_END)
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted({"__main__.py": _MAIN, **dict(_modules())}.items()):
            info = zipfile.ZipInfo(name, _OLDEST)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    return packed.getvalue()


def _modules() -> Iterator[tuple[str, str]]:
    """The plugin, and the modules of vmbackup that it may import (.importlinter)."""
    source = ROOT / "operator"
    for pattern in ("kubectl_vmbackup/*.py", "vmbackup/api/*.py", "vmbackup/__init__.py", "vmbackup/errors.py"):
        yield from ((str(path.relative_to(source)), path.read_text()) for path in source.glob(pattern))
    yield "vmbackup/version.py", f'__version__ = "{__version__}"\n'


def _tar_gz(files: Iterator[Path]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file in files:
            info = tarfile.TarInfo(file.name)
            info.size, info.mode = file.stat().st_size, file.stat().st_mode & 0o777
            archive.addfile(info, io.BytesIO(file.read_bytes()))
    return gzip.compress(packed.getvalue(), mtime=0)


def _executable(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o755)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("dist", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--url", default=URL, help="address of the published archive")
    given = parser.parse_args()
    build(given.dist, given.url)
    print(*sorted(str(path) for path in given.dist.glob("*vmbackup*")), sep="\n")
