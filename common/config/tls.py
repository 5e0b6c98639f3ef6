"""TLS settings, and the certificates and keys that they name, read and checked once a process.

Knows nothing of gRPC: a rank's process reads these settings too.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.config.flags import bad, flag


@dataclass(frozen=True)
class TlsConfig:
    """What a process shows to its peers, as server and as client, and what it asks of them."""

    tls_cert: str | None = flag(
        None, "PEM file with this process's certificate chain; turns TLS on for gRPC.", metavar="PATH"
    )
    tls_key: str | None = flag(None, "PEM file with the key of --tls-cert, not encrypted.", metavar="PATH")
    tls_ca: str | None = flag(
        None,
        "PEM file with authorities; every peer, clients too, must then show a certificate of theirs.",
        metavar="PATH",
    )
    tls_server_name: str | None = flag(
        None, "Name that every server's certificate must bear, in place of the host that is called.", metavar="NAME"
    )


@dataclass(frozen=True)
class EtcdTlsConfig:
    """The same towards etcd, for `etcds://` addresses. What is not set is as for the mesh, but for the name."""

    etcd_tls_cert: str | None = flag(
        None, "PEM file with the certificate for etcd (default: --tls-cert).", metavar="PATH"
    )
    etcd_tls_key: str | None = flag(None, "PEM file with the key of --etcd-tls-cert.", metavar="PATH")
    etcd_tls_ca: str | None = flag(None, "PEM file with etcd's authorities (default: --tls-ca).", metavar="PATH")
    etcd_tls_server_name: str | None = flag(
        None, "Name that etcd's certificates must bear, in place of the host that is called.", metavar="NAME"
    )


NO_TLS, NO_ETCD_TLS = TlsConfig(), EtcdTlsConfig()


@dataclass(frozen=True)
class Credentials:
    """What a process uses for all its connections, as PEM. A repr shows none of it.

    Attributes:
        certificate, key: Chain and key; None in a client that shows no certificate.
        ca: Authorities of the peers; None trusts the system's, and asks no client for a certificate.
        server_name: Stands in for the host that is called when a server's certificate is checked.
        expires_at: When the certificate ends, in seconds since 1970; None where that is not known.
    """

    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    ca: bytes | None = field(default=None, repr=False)
    server_name: str | None = None
    expires_at: float | None = None

    @property
    def expiry(self) -> str:
        """`expires_at` for people."""
        return "unknown" if self.expires_at is None else date(self.expires_at)


def load(config: TlsConfig, *, serves: bool = True) -> Credentials | None:
    """Read and check what `config` names; None when it asks for no TLS.

    `serves` says whether the process has a server of its own, which needs a certificate. Raises `MeshError`
    (BAD_CONFIG) naming flag and file.
    """
    return load_files(config.tls_cert, config.tls_key, config.tls_ca, server_name=config.tls_server_name, serves=serves)


def load_etcd(config: EtcdTlsConfig, mesh: TlsConfig) -> Credentials:
    """The same for etcd, with the mesh's files where there are none of its own.

    Without any, the system's authorities vouch for etcd. Raises `MeshError` (BAD_CONFIG).
    """
    own = config.etcd_tls_cert or config.etcd_tls_key
    cert, key = (config.etcd_tls_cert, config.etcd_tls_key) if own else (mesh.tls_cert, mesh.tls_key)
    prefix = "--etcd-tls" if own or config.etcd_tls_ca else "--tls"
    read = load_files(cert, key, config.etcd_tls_ca or mesh.tls_ca, serves=False, prefix=prefix)
    return replace(read or Credentials(), server_name=config.etcd_tls_server_name)


def load_files(
    cert: str | None,
    key: str | None,
    ca: str | None = None,
    *,
    server_name: str | None = None,
    serves: bool = True,
    prefix: str = "--tls",
) -> Credentials | None:
    """As `load`, for files whose flags are `prefix`-cert, -key and -ca."""
    cert_flag, key_flag, ca_flag = (f"{prefix}-{name}" for name in ("cert", "key", "ca"))
    if cert and not key:
        raise bad(f"{cert_flag}: {cert} needs its key: set {key_flag}")
    if key and not cert:
        raise bad(f"{key_flag}: {key} needs its certificate: set {cert_flag}")
    if serves and ca and not cert:
        raise bad(f"{ca_flag}: a service that asks for certificates needs one: set {cert_flag} and {key_flag}")
    if not cert and not ca:
        if server_name:
            raise bad(f"{prefix}-server-name: of no use without {ca_flag} or {cert_flag}")
        return None
    authorities = read_authorities(ca_flag, ca) if ca else None
    if not cert or not key:
        return Credentials(ca=authorities, server_name=server_name)
    chain, secret = read(cert_flag, cert), read(key_flag, key)
    check_pair(cert_flag, cert, chain, key_flag, key)
    as_client = ca is not None or not serves
    expires_at = rehearse(cert_flag, cert, key, authorities or chain, as_server=serves, as_client=as_client)
    return Credentials(chain, secret, authorities, server_name, expires_at)


def read(flag_name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise bad(f"{flag_name}: {path}: {error.strerror or error}") from None


def read_authorities(flag_name: str, path: str) -> bytes:
    """Authorities of which at least one has not expired."""
    pem = read(flag_name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust(context, pem, flag_name, path)
    ends = [ssl.cert_time_to_seconds(str(certificate["notAfter"])) for certificate in context.get_ca_certs()]
    if not ends:
        raise bad(f"{flag_name}: {path}: holds no certificate of an authority")
    if max(ends) < time.time():
        raise bad(f"{flag_name}: {path}: expired on {date(max(ends))}")
    return pem


def check_pair(cert_flag: str, cert: str, chain: bytes, key_flag: str, key: str) -> None:
    """Refuse what is no certificate, no key, or a key of another certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust(context, chain, cert_flag, cert)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # without it OpenSSL asks the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise bad(f"{key_flag}: {key}: is not the key of {cert_flag} {cert}") from None
        raise bad(f"{key_flag}: {key}: holds no key in PEM form, or an encrypted one") from None
    except OSError as error:
        raise bad(f"{key_flag}: {key}: {error.strerror or error}") from None


def trust(context: ssl.SSLContext, pem: bytes, flag_name: str, path: str) -> None:
    try:
        context.load_verify_locations(cadata=text(pem))
    except (ssl.SSLError, ValueError):
        raise bad(f"{flag_name}: {path}: holds no certificate in PEM form") from None


def text(pem: bytes) -> str:
    """PEM is ASCII; the comments around it may be anything."""
    return pem.decode("ascii", "ignore")


def rehearse(cert_flag: str, cert: str, key: str, trusted: bytes, *, as_server: bool, as_client: bool) -> float | None:
    """A handshake with ourselves, in memory, in which the certificate is checked as a server's, a client's or both.

    Finds what peers would find later: a certificate that has expired, is not valid yet, comes from another authority
    or is not meant for this use. Returns when it ends.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False  # by which names it is called is the peers' to say
    for context, checks in ((server, as_client), (client, as_server)):
        context.verify_mode = ssl.CERT_REQUIRED if checks else ssl.CERT_NONE
        context.load_cert_chain(cert, key)
        context.load_verify_locations(cadata=text(trusted))
        # without authorities of our own the certificate vouches for itself: all but its issuer is checked
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    waiting = list(ends)
    try:
        while waiting:
            for end in list(waiting):
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
                waiting.remove(end)
    except ssl.SSLCertVerificationError as error:
        raise bad(f"{cert_flag}: {cert}: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise bad(f"{cert_flag}: {cert}: {error.reason or error}") from None
    seen = next(filter(None, (end.getpeercert() for end in ends)), None)
    return ssl.cert_time_to_seconds(str(seen["notAfter"])) if seen else None


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
