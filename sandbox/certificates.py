"""Certificates of a sandbox: one authority that signs all of them, with the openssl command."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

_DAYS = "3650"


class Authority:
    """A certificate authority in `directory`, created if missing. Only the owner can read its keys."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.certificate = directory / "ca.crt"
        self._key = directory / "ca.key"
        if not self.certificate.exists():
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            new_key(self._key)
            _openssl("req", "-x509", "-new", "-key", self._key, "-subj", "/CN=vmbackup-sandbox", "-days", _DAYS,
                     "-addext", "keyUsage=critical,keyCertSign,digitalSignature", "-out", self.certificate)  # fmt: skip

    def issue(
        self, name: str, *, user: str, groups: Sequence[str] = (), addresses: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """The certificate and key files `name`, made when they are not there.

        Kubernetes takes the common name for the user and the organizations for the groups. `addresses` are names and
        addresses of a server (`DNS:localhost`, `IP:127.0.0.1`).
        """
        certificate, key = self._directory / f"{name}.crt", self._directory / f"{name}.key"
        if certificate.exists():
            return certificate, key
        new_key(key)
        request = self._directory / f"{name}.csr"
        subject = "".join(f"/O={_escaped(group)}" for group in groups) + f"/CN={_escaped(user)}"
        extensions = ["extendedKeyUsage=serverAuth,clientAuth"]
        if addresses:
            extensions.append(f"subjectAltName={','.join(addresses)}")
        extension_file = self._directory / f"{name}.ext"
        extension_file.write_text("\n".join(extensions))
        _openssl("req", "-new", "-key", key, "-subj", subject, "-out", request)
        _openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial",
                 "-days", _DAYS, "-extfile", extension_file, "-out", certificate)  # fmt: skip
        request.unlink()
        extension_file.unlink()
        return certificate, key


def new_key(path: Path) -> None:
    """A new private key; elliptic curve, since RSA keys take a second each."""
    path.touch(mode=0o600)
    _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("/", "\\/").replace("+", "\\+")


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
