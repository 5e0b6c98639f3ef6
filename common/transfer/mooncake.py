"""Transfer by Mooncake's TransferEngine: RDMA where there is a device, TCP elsewhere.

Every endpoint has one engine that is written to, and one more for each peer that it writes to: Mooncake cannot
cancel. A batch that it gave up (-1) goes on in its queues and lands later, but destroying the engine drops
them. So the writer is made quiet by waiting for the call under way, at most MC_TRANSFER_TIMEOUT (10 s here) when the
peer does not answer, and destroying that peer's engine: after every failed write, and when the peer is lost. The
next write gets a new engine (0.1 s), so that a failure harms no other room. What the kernel of a stopped peer has
already received by then, a few pages, still lands in the moment the peer runs again. With RDMA, each engine
registers the pool anew.

A sender is given 128 MiB or 4,096 pieces at once: Mooncake is slow to begin and to end a batch, and spins meanwhile.

Fencing: an engine's end of one connection cannot be closed for a single peer, so a writer is fenced off when its
process has ended. Its queue pairs end with it; over TCP, what both kernels hold of its stream still arrives, for
which 2 s are given. A writer whose host does not answer counts as gone after 120 s (see `channel`).

Over TCP Mooncake listens on all interfaces, unauthenticated, and has no setting that says otherwise
(MC_TCP_BIND_ADDRESS chooses the announced address only, and not in the peer-to-peer handshake used here).
Where its host is a loopback address, the listeners are therefore bound to the loopback device after they are
opened; elsewhere, keep its ports (MC_MIN_PRC_PORT to MC_MAX_PRC_PORT) inside a trusted network.

A pool on a GPU is registered as it is; that takes Mooncake's build with CUDA.

These variables have defaults of ours unless the user set them: MC_LOG_LEVEL, MC_TRANSFER_TIMEOUT,
MC_TCP_PROGRESS_TIMEOUT_SEC (both in seconds), MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER (at least 4,096 is needed) and
MC_FORCE_TCP, which is set where there is no RDMA device.
Each engine says `Local segment descriptor not found` on stderr when it starts; that is how it looks for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import logging
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from typing import Any

import msgspec

from common.config.transfer import PEER_TO_PEER, rdma_devices
from common.transfer.base import Capabilities, Pieces, TransferBackend, TransferConfig, TransferError, Wake
from common.transfer.channel import Link, is_loopback
from common.transfer.endpoint import Endpoint, Pool
from common.transfer.peers import Descriptor
from common.transfer.sender import GiveUp, Writer

# Put there by deploy/system_libraries.py; each after what it needs itself.
_LIBRARIES = ("libnl-3.so.200", "libnl-route-3.so.200", "libibverbs.so.1")
_ENVIRONMENT = {
    "MC_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
    "MC_TRANSFER_TIMEOUT": "10",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "5",
    # By default Mooncake queues 1,024 pieces a peer, and fails a longer batch in its middle.
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
}
_WITHOUT_CUDA = "mooncake-transfer-engine-non-cuda"
_PART_PIECES = 4096
_PART_BYTES = 128 << 20
_ACCEPT_POLL = struct.pack("ll", 0, 100_000)  # a timeval: 0.1 s
_log = logging.getLogger(__name__)
_starting = threading.Lock()


def load() -> Any:
    """Mooncake's `TransferEngine` class. Raises `TransferError`."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _preload()
    try:
        return importlib.import_module("mooncake.engine").TransferEngine
    except ModuleNotFoundError:
        raise TransferError("Mooncake is not installed; install pdmesh[mooncake], or [mooncake-cuda]") from None
    except ImportError as error:
        if "libibverbs" in str(error):
            raise TransferError(
                "Mooncake needs libibverbs.so.1; install libibverbs1 (Debian, Ubuntu) or rdma-core, "
                "or run deploy/system_libraries.py with this Python"
            ) from None
        raise TransferError(f"Mooncake does not load: {error}") from None


def create(config: TransferConfig, wake: Wake) -> TransferBackend:
    """An endpoint. Raises `TransferError` if Mooncake does not load or a device is not there."""
    return MooncakeEndpoint(config, wake, load())


def _preload() -> None:
    """Load the libraries that lie beside the environment, where the system has none of its own.

    Their symbols stay their own: NIXL brings copies of some of them, and the two would end each other at exit.
    """
    for name in _LIBRARIES:
        for candidate in (name, f"{sys.prefix}/lib/pdmesh/{name}"):
            with contextlib.suppress(OSError):  # importing Mooncake tells what is missing in the end
                ctypes.CDLL(candidate)
                break


class MooncakeEndpoint(Endpoint):
    """Endpoint of the mooncake backend."""

    name = "mooncake"
    capabilities = Capabilities(device_memory=True)
    settle_s = 2.0
    part_pieces = _PART_PIECES
    part_bytes = _PART_BYTES

    def __init__(self, config: TransferConfig, wake: Wake, engine_class: Any) -> None:
        super().__init__(config, wake)
        self._class = engine_class
        self._protocol = _protocol(config)
        self._target: _Engine | None = None
        self._pool_address = 0

    def _start_engine(self, pool: Pool) -> None:
        if pool.gpu is not None and _without_cuda():
            raise TransferError(
                f"this Mooncake has no CUDA, and the pool is on GPU {pool.gpu}; install [mooncake-cuda]"
            )
        self._target = _Engine(self._class, self.config, self._protocol, pool)
        self._pool_address = pool.address

    def _engine_info(self) -> bytes:
        assert self._target is not None
        return msgspec.msgpack.encode((self._target.session, self._pool_address))

    def _open_writer(self, pool: Pool, peer: Descriptor, link: Link) -> Writer:
        session, address = msgspec.msgpack.decode(peer.engine, type=tuple[str, int])
        engine = _Engine(self._class, self.config, self._protocol, pool)
        return _MooncakeWriter(engine, pool.address, session, address)

    def _stop_engine(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None


class _Engine:
    """A running TransferEngine with the pool registered."""

    def __init__(self, engine_class: Any, config: TransferConfig, protocol: str, pool: Pool) -> None:
        host = config.mooncake_host or config.host
        with _starting:  # the listeners of two engines must not be mixed up
            before = {inode for _, inode in _listeners()}
            self.raw: Any = engine_class()
            code = self.raw.initialize(host, PEER_TO_PEER, protocol, ",".join(config.ib_devices))
            if code != 0:
                raise TransferError(f"Mooncake does not start on {host} by {protocol} (code {code})")
            for listener, inode in _listeners():
                if inode not in before:
                    _confine(listener, loopback=is_loopback(host))
        self.session = f"{f'[{host}]' if ':' in host else host}:{self.raw.get_rpc_port()}"
        if (code := self.raw.register_memory(pool.address, pool.nbytes)) != 0:
            raise TransferError(f"Mooncake does not register a pool of {pool.nbytes} bytes (code {code})")

    def close(self) -> None:
        """Destroy the engine, and with it everything in its queues."""
        self.raw = None


class _MooncakeWriter:
    """Blocking batch writes into one peer's pool."""

    parallel = False

    def __init__(self, engine: _Engine, source: int, session: str, target: int) -> None:
        self._engine = engine
        self._source = source
        self._session = session
        self._target = target

    def write(self, pieces: Pieces, give_up: GiveUp) -> None:
        if give_up():
            raise TransferError("given up")
        sources = (pieces[:, 0] + self._source).tolist()
        targets = (pieces[:, 1] + self._target).tolist()
        code = self._engine.raw.batch_transfer_sync_write(self._session, sources, targets, pieces[:, 2].tolist())
        if code != 0:
            raise TransferError(f"Mooncake gave up {len(pieces)} pieces to {self._session} (code {code})")

    def close(self) -> None:
        self._engine.close()


def _protocol(config: TransferConfig) -> str:
    """ "rdma" or "tcp". Raises `TransferError` for a device that this host does not have."""
    devices, wanted = rdma_devices(), config.mooncake_protocol
    if wanted != "tcp":
        missing = set(config.ib_devices) - set(devices)
        if missing or (wanted and not devices):
            lacking = ", ".join(sorted(missing)) or "at all"
            raise TransferError(f"no RDMA device {lacking} on this host; there is {', '.join(devices) or 'none'}")
        if wanted or config.ib_devices or (devices and "MC_FORCE_TCP" not in os.environ):
            return "rdma"
    os.environ["MC_FORCE_TCP"] = "1"
    return "tcp"


def _without_cuda() -> bool:
    """Whether the build without CUDA is installed. It takes a device's address for one of the host's, and dies."""
    try:
        importlib.metadata.distribution(_WITHOUT_CUDA)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _listeners() -> Iterator[tuple[socket.socket, int]]:
    """Sockets of this process that listen on all interfaces, each with its inode; closed by the iteration."""
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = os.dup(int(name))
        except OSError:  # it was the directory itself
            continue
        try:
            found = socket.socket(fileno=copy)
        except OSError:  # not a socket
            os.close(copy)
            continue
        with found:
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if listening and found.getsockname()[0] in ("0.0.0.0", "::"):
                yield found, os.fstat(found.fileno()).st_ino


def _confine(listener: socket.socket, *, loopback: bool) -> None:
    """Bind a listener of Mooncake's to the loopback device if `loopback`, and let it end fast.

    The engine's destructor waits for its accept, by default 1 s, with the GIL held.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _ACCEPT_POLL)
    if not loopback:
        return
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    except PermissionError:  # kernels before 5.7 ask for CAP_NET_RAW
        _log.warning(
            "Mooncake listens on all interfaces, port %d: not allowed to confine it", listener.getsockname()[1]
        )
