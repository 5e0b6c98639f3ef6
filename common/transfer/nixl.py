"""Transfer by NIXL over UCX: RDMA where UCX finds it, else its same-host copies or TCP.

An agent moves data only inside calls. NIXL's own progress thread spins on a whole core, so agents run without
it: a writer polls its own transfer, and tells the peer over the control channel when it begins and ends to wait for
one, so that the peer polls every 0.5 ms in between and hardly at all otherwise. (Same-host copies may end at once, but
the first of a connection needs the peer to poll as well.)

Every endpoint has one agent that is written to, and one more for each peer that it writes to, used by one worker at
a time: agents are not thread-safe, and NIXL cannot cancel. A transfer that was released in progress still lands, but
destroying its agent drops it. So the writer is made quiet by destroying that peer's agent: after every write that
failed or was given up, at the next poll, and when the peer is lost. The next write gets a new agent, so that a
failure harms no other room. What the kernel of a stopped peer has already received by then, up to its socket
buffers' size, still lands when the peer polls again. With RDMA, each agent registers the pool anew.

Descriptors are made for each write, from a table: 0.14 ms for 4,096. Lists that are prepared once for a pool and
indexed by page take as long, and cannot merge neighbours into one long piece, which moves at twice the speed.

Fencing: as with Mooncake, a writer is fenced off when its process has ended, and 2 s later: what UCX has received
over TCP or shared memory lands when this side polls, which is every 0.5 s at least.

A pool on a GPU is registered as VRAM of its device, as it is. Agents use NIXL's plugin UCX, unless another that moves
memory between processes is configured; what is said here of UCX is then to be found out for that one. UCX_NET_DEVICES
is set to every port of the configured RDMA devices, or to `lo` where `host` is a loopback address, and the log levels
are lowered, unless the user set them; UCX_TLS is the user's. The agent's name is its endpoint's incarnation, so a
restarted peer is never taken for its predecessor. UCX keeps one thread of its own while agents exist.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.config.transfer import rdma_ports
from common.transfer.base import Capabilities, Pieces, TransferBackend, TransferConfig, TransferError, Wake
from common.transfer.channel import Kind, Link, is_loopback
from common.transfer.cuda import make_current
from common.transfer.endpoint import Endpoint, Pool
from common.transfer.peers import Descriptor
from common.transfer.sender import GiveUp, Writer

_ENVIRONMENT = {"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "FATAL"}
# As a user may have named them: a rank does not know which name it was.
_PLUGIN = "--disaggregation-nixl-backend (SGLANG_DISAGGREGATION_NIXL_BACKEND)"
_PARAMS = "--disaggregation-nixl-backend-params (SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS)"
_PART_PIECES = 4096
_PART_BYTES = 64 << 20
_WRITER_POLL_S = 0.0001
_TARGET_POLL_S = 0.0005
_IDLE_POLL_S = 0.5


def load() -> Any:
    """NIXL's Python API, a module. Raises `TransferError`."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("nixl._api")
    except ModuleNotFoundError as error:
        raise TransferError(f"NIXL is not installed ({error}); install pdmesh[nixl]") from None
    except ImportError as error:
        raise TransferError(f"NIXL does not load: {error}") from None


def create(config: TransferConfig, wake: Wake) -> TransferBackend:
    """An endpoint. Raises `TransferError` if NIXL does not load."""
    api = load()
    if devices := ucx_devices(config):
        os.environ.setdefault("UCX_NET_DEVICES", devices)
    return NixlEndpoint(config, wake, api)


def ucx_devices(config: TransferConfig) -> str:
    """The network devices that UCX may use, as it names them; all, if there is no text."""
    if config.ib_devices:
        return ",".join(f"{device}:{port}" for device in config.ib_devices for port in rdma_ports(device))
    return "lo" if is_loopback(config.host) else ""


class NixlEndpoint(Endpoint):
    """Endpoint of the nixl backend."""

    name = "nixl"
    capabilities = Capabilities(device_memory=True)
    settle_s = 2.0
    part_pieces = _PART_PIECES
    part_bytes = _PART_BYTES

    def __init__(self, config: TransferConfig, wake: Wake, api: Any) -> None:
        super().__init__(config, wake)
        self._api = api
        self._agent: _Agent | None = None
        self._writers: set[Link] = set()
        self._busy = threading.Event()
        self._stopping = False
        self._poller: threading.Thread | None = None

    def _start_engine(self, pool: Pool) -> None:
        self._agent = _Agent(self._api, self.incarnation.hex(), pool, self.config)
        self._poller = threading.Thread(target=self._progress, args=(self._agent,), name="transfer-poll", daemon=True)
        self._poller.start()

    def _engine_info(self) -> bytes:
        assert self._agent is not None
        pool = self._agent.pool
        return msgspec.msgpack.encode((self._agent.metadata, pool.address, pool.gpu))

    def _open_writer(self, pool: Pool, peer: Descriptor, link: Link) -> Writer:
        assert self._channel is not None
        channel = self._channel
        metadata, address, gpu = msgspec.msgpack.decode(peer.engine, type=tuple[bytes, int, int | None])
        agent = _Agent(self._api, uuid.uuid4().hex, pool, self.config)
        target = Pool(address, peer.pool_bytes, gpu)
        return _NixlWriter(agent, metadata, target, lambda kind: channel.send(link, kind))

    def _on_remote_write(self, link: Link, active: bool) -> None:
        if active:
            self._writers.add(link)
            self._busy.set()
        else:
            self._writers.discard(link)
            if not self._writers:
                self._busy.clear()

    def _progress(self, agent: _Agent) -> None:
        agent.enter_thread()
        while not self._stopping:
            agent.raw.get_new_notifs()
            if self._busy.is_set():
                time.sleep(_TARGET_POLL_S)
            else:
                self._busy.wait(_IDLE_POLL_S)

    def _stop_engine(self) -> None:
        if self._poller is not None:
            self._stopping = True
            self._busy.set()
            self._poller.join()
            self._poller = None
        if self._agent is not None:
            self._agent.close()
            self._agent = None


class _Agent:
    """A NIXL agent with the pool registered. Raises `TransferError` for a plugin that does not do."""

    def __init__(self, api: Any, name: str, pool: Pool, config: TransferConfig) -> None:
        self.pool = pool
        self.enter_thread()
        self.raw: Any = api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        plugin, params = config.nixl_backend, dict(config.nixl_params)
        _check_plugin(self.raw, plugin)
        try:
            self.raw.create_backend(plugin, params)
        except Exception as error:  # NIXL has a class for each code, and logs what it is about
            raise TransferError(f"{_PARAMS}: NIXL's {plugin} does not start with {params}: {error}") from None
        place = (pool.address, pool.nbytes, pool.gpu or 0, "")
        self._registration: Any = self.raw.register_memory([place], _kind(pool))

    def enter_thread(self) -> None:
        """Before it is used in another thread: memory on a GPU needs a context there."""
        if self.pool.gpu is not None:
            make_current(self.pool.gpu)

    @property
    def metadata(self) -> bytes:
        return bytes(self.raw.get_agent_metadata())

    def close(self) -> None:
        """Destroy the agent, and with it everything in its queues."""
        self.enter_thread()
        self.raw.deregister_memory(self._registration)
        self._registration = self.raw = None


class _NixlWriter:
    """Polled writes into one peer's pool."""

    parallel = False

    def __init__(self, agent: _Agent, metadata: bytes, target: Pool, tell: Callable[[Kind], None]) -> None:
        self._agent = agent
        self._source = agent.pool
        self._target = target
        self._tell = tell
        self._peer: str = agent.raw.add_remote_agent(metadata)

    def write(self, pieces: Pieces, give_up: GiveUp) -> None:
        self._agent.enter_thread()
        agent = self._agent.raw
        sources = agent.get_xfer_descs(_descriptors(pieces[:, 0], pieces, self._source), _kind(self._source))
        targets = agent.get_xfer_descs(_descriptors(pieces[:, 1], pieces, self._target), _kind(self._target))
        transfer = agent.initialize_xfer("WRITE", sources, targets, self._peer)
        try:
            state = agent.transfer(transfer)
            if state == "PROC":  # a same-host copy that needed nothing of the peer is done
                state = self._wait(transfer, give_up)
        finally:
            agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise TransferError(f"NIXL ended a write of {len(pieces)} pieces as {state}")

    def _wait(self, transfer: Any, give_up: GiveUp) -> str:
        """The state in which the transfer ends, with the peer polling at its side."""
        self._tell(Kind.WRITE_BEGINS)
        try:
            while (state := self._agent.raw.check_xfer_state(transfer)) == "PROC":
                if give_up():
                    raise TransferError("given up")
                time.sleep(_WRITER_POLL_S)
        finally:
            self._tell(Kind.WRITE_ENDS)
        return str(state)

    def close(self) -> None:
        self._agent.raw.remove_remote_agent(self._peer)
        self._agent.close()


def _descriptors(offsets: NDArray[np.int64], pieces: Pieces, pool: Pool) -> NDArray[np.uint64]:
    """`[n, 3]`: address, length, device."""
    table = np.full((len(pieces), 3), pool.gpu or 0, dtype=np.uint64)
    table[:, 0], table[:, 1] = offsets + pool.address, pieces[:, 2]
    return table


def _kind(pool: Pool) -> str:
    """NIXL's word for a kind of memory."""
    return "DRAM" if pool.gpu is None else "VRAM"


def _check_plugin(agent: Any, plugin: str) -> None:
    """Refuse a plugin that is not there, does not load, or moves data to storage."""
    plugins = sorted(agent.get_plugin_list())
    if plugin not in plugins:
        raise TransferError(f"{_PLUGIN}: NIXL has no plugin {plugin}; there are {', '.join(plugins)}")
    kinds = set(agent.get_plugin_mem_types(plugin))
    if not kinds:
        raise TransferError(f"{_PLUGIN}: NIXL's plugin {plugin} does not load on this machine")
    if not kinds <= {"DRAM_SEG", "VRAM_SEG"}:
        raise TransferError(f"{_PLUGIN}: NIXL's plugin {plugin} moves data to storage, not between processes")
