"""What of TLS is refused when a process starts, and in which words."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from time import time

import pytest
from cryptography.hazmat.primitives import serialization

from common.config.tls import (
    Credentials,
    EtcdTlsConfig,
    TlsConfig,
    load,
    load_etcd,
    load_files,
)
from common.errors.base import MeshError, Reason
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.store.registry import make_store
from tests.certificates import Authority, Files

pytestmark = pytest.mark.unit

BROKEN = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def files(authority: Authority) -> Files:
    return authority.issue("service")


def refusal(config: TlsConfig, *, serves: bool = True) -> str:
    with pytest.raises(MeshError) as caught:
        load(config, serves=serves)
    assert caught.value.reason is Reason.BAD_CONFIG
    return caught.value.message


def test_no_flags_no_tls() -> None:
    assert load(TlsConfig()) is None


def test_good_files_are_read(authority: Authority) -> None:
    files = authority.issue("service", ends_in=timedelta(days=7))
    credentials = load(files.config)
    assert credentials
    assert credentials.certificate == Path(files.cert).read_bytes()
    assert credentials.key == Path(files.key).read_bytes()
    assert credentials.ca == Path(files.ca).read_bytes()
    assert credentials.expires_at == pytest.approx(time() + 7 * 86400, abs=3600)


def test_comments_in_the_files_are_no_matter(files: Files) -> None:
    for path in (files.cert, files.ca):
        Path(path).write_bytes("subject=O = Zürich\n".encode() + Path(path).read_bytes())
    assert load(files.config)


def test_without_authorities_the_certificate_vouches_for_itself(files: Files) -> None:
    credentials = load(TlsConfig(files.cert, files.key))
    assert credentials
    assert credentials.ca is None
    assert credentials.expires_at


def test_an_intermediate_authority_in_the_chain_will_do(tmp_path: Path, authority: Authority) -> None:
    below = Authority(tmp_path, "below")
    below.issuer = authority.issuer.create_child_ca()
    files = below.issue("service")
    assert load(TlsConfig(files.cert, files.key, authority.ca))


def test_a_client_may_go_without_a_certificate(files: Files) -> None:
    only_ca = TlsConfig(tls_ca=files.ca)
    credentials = load(only_ca, serves=False)
    assert credentials
    assert credentials.certificate is None
    assert "--tls-ca" in refusal(only_ca)
    assert "--tls-cert" in refusal(only_ca)


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
def test_a_file_that_is_not_there(files: Files, name: str) -> None:
    config = TlsConfig(**{f"tls_{n}": getattr(files, n) for n in ("cert", "key", "ca")} | {f"tls_{name}": "/no/where"})
    assert refusal(config) == f"--tls-{name}: /no/where: No such file or directory"


@pytest.mark.parametrize("name", ["cert", "key", "ca"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_a_file_that_holds_something_else(files: Files, name: str, content: bytes) -> None:
    path = Path(getattr(files, name))
    path.write_bytes(content)
    message = refusal(files.config)
    assert message.startswith(f"--tls-{name}: {path}: holds no")
    assert "PEM" in message


def test_a_certificate_without_its_key_and_a_key_without_its_certificate(files: Files) -> None:
    assert refusal(TlsConfig(tls_cert=files.cert)) == f"--tls-cert: {files.cert} needs its key: set --tls-key"
    assert refusal(TlsConfig(tls_key=files.key)) == f"--tls-key: {files.key} needs its certificate: set --tls-cert"


def test_a_key_of_another_certificate(authority: Authority, files: Files) -> None:
    other = authority.issue("other")
    message = refusal(TlsConfig(files.cert, other.key, files.ca))
    assert message == f"--tls-key: {other.key}: is not the key of --tls-cert {files.cert}"


def test_an_encrypted_key_is_refused_without_a_question(files: Files) -> None:
    """A service has nobody to ask for a passphrase."""
    path = Path(files.key)
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    assert refusal(files.config) == f"--tls-key: {files.key}: holds no key in PEM form, or an encrypted one"


@pytest.mark.parametrize("mutual", [True, False])
def test_a_certificate_out_of_its_time(authority: Authority, mutual: bool) -> None:
    for files, why in (
        (authority.expired(), "certificate has expired"),
        (authority.issue("early", starts_in=timedelta(days=1)), "certificate is not yet valid"),
    ):
        config = TlsConfig(files.cert, files.key, files.ca if mutual else None)
        assert refusal(config) == f"--tls-cert: {files.cert}: {why}"


def test_a_certificate_of_another_authority(tmp_path: Path, files: Files) -> None:
    message = refusal(TlsConfig(files.cert, files.key, Authority(tmp_path, "other").ca))
    assert message.startswith(f"--tls-cert: {files.cert}: ")
    assert "issuer" in message


def test_authorities_that_are_none(files: Files) -> None:
    message = refusal(TlsConfig(files.cert, files.key, files.cert))
    assert message == f"--tls-ca: {files.cert}: holds no certificate of an authority"


def test_a_server_name_alone() -> None:
    assert "--tls-server-name" in refusal(TlsConfig(tls_server_name="mesh"))


def test_the_flags_of_http_bear_their_own_names(files: Files) -> None:
    with pytest.raises(MeshError, match="--http-tls-key"):
        load_files(files.cert, None, prefix="--http-tls")


def test_nothing_of_a_key_is_shown(files: Files) -> None:
    credentials = load(files.config)
    assert credentials
    assert "PRIVATE" not in repr(credentials)
    assert "CERTIFICATE" not in repr(credentials)


def test_etcd_takes_the_files_of_the_mesh_unless_it_has_its_own(authority: Authority, files: Files) -> None:
    mesh = TlsConfig(files.cert, files.key, files.ca, tls_server_name="mesh")
    shared = load_etcd(EtcdTlsConfig(), mesh)
    assert shared
    assert (shared.key, shared.server_name) == (Path(files.key).read_bytes(), None)
    other = authority.issue("etcd")
    own = load_etcd(EtcdTlsConfig(other.cert, other.key, None, "etcd"), mesh)
    assert own
    assert (own.key, own.ca, own.server_name) == (Path(other.key).read_bytes(), shared.ca, "etcd")
    with pytest.raises(MeshError, match=r"--etcd-tls-cert.*--etcd-tls-key"):
        load_etcd(EtcdTlsConfig(etcd_tls_cert=other.cert), mesh)
    assert load_etcd(EtcdTlsConfig(etcd_tls_server_name="etcd"), TlsConfig()) == Credentials(server_name="etcd")


def test_etcd_flags_without_tls_to_etcd_are_refused(files: Files) -> None:
    """Whoever gives them believes that the connection is encrypted."""
    for store in ("memory", "etcd", "etcd://127.0.0.1:2379"):
        with pytest.raises(MeshError, match="etcds://"):
            make_store(store, etcd_tls=EtcdTlsConfig(etcd_tls_ca=files.ca))


def test_the_password_of_a_bad_store_address_is_not_told() -> None:
    for address in (
        "etcd:/root:hunter2@host:2379",
        "root:hunter2@host:2379",
        "etcd://root:hunter2@host",
        "x://hunter2@",
    ):
        with pytest.raises(MeshError) as caught:
            make_store(address)
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in repr(BootstrapConfig(store=address))
