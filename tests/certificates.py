"""Certificates for tests, made on the spot: an authority, and what it issues, as PEM files in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from common.config.tls import Credentials, TlsConfig

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Files:
    """A certificate, its key, and the authority that its owner trusts."""

    cert: str
    key: str
    ca: str

    @property
    def config(self) -> TlsConfig:
        return TlsConfig(self.cert, self.key, self.ca)

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--tls-cert", self.cert, "--tls-key", self.key, "--tls-ca", self.ca)

    def credentials(self, server_name: str | None = None) -> Credentials:
        """As they stand: nothing is checked, so that peers can be shown what no service would start with."""
        cert, key, ca = (Path(path).read_bytes() for path in (self.cert, self.key, self.ca))
        return Credentials(cert, key, ca, server_name)


class Authority:
    """Issues certificates into `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.name = name
        self.issuer = trustme.CA()
        self.ca = str(folder / f"{name}.pem")
        self.issuer.cert_pem.write_to_path(self.ca)

    def issue(
        self, name: str, *identities: str, starts_in: timedelta = timedelta(days=-2), ends_in: timedelta | None = None
    ) -> Files:
        """A certificate for `identities` (default: this machine), valid from and, if given, until so long from now."""
        now = datetime.now(UTC)
        leaf = self.issuer.issue_cert(
            *(identities or LOOPBACK), not_before=now + starts_in, not_after=None if ends_in is None else now + ends_in
        )
        cert, key = self.folder / f"{self.name}-{name}.pem", self.folder / f"{self.name}-{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.touch(mode=0o600)
        key.write_bytes(leaf.private_key_pem.bytes())
        return Files(str(cert), str(key), self.ca)

    def expired(self) -> Files:
        return self.issue("expired", ends_in=timedelta(days=-1))
