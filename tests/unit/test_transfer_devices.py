"""Pools on GPUs: what each engine is asked for, told by engines that record it, and who refuses.

Where there is a GPU, tests/gpu moves real bytes between such pools.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.engine import runner
from common.engine.config import EngineConfig
from common.errors.base import MeshError
from common.transfer import cuda, mooncake, nixl, registry
from common.transfer.base import Completion, Run, TransferBackend, TransferConfig, TransferError, no_wake
from common.worker.config import WorkerConfig
from common.worker.start import RankStart
from common.worker.transfer import build_with_transfer, check_for_gpu
from common.worker.waker import Waker
from tests.mesh.harness import wait_until

pytestmark = pytest.mark.unit

DEVICE_POOL, HOST_POOL, NBYTES = 0x7F00_0000_0000, 0x5500_0000_0000, 1 << 20
RUNS = [Run(0, 4096, 512), Run(8192, 0, 512)]


@dataclass
class Recorder:
    """An engine that does nothing but remember what it was asked for."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]

    def note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))


def write(writer: TransferBackend, target: TransferBackend) -> None:
    """One transfer from the one pool into the other, to its end."""
    peer = writer.connect(target.export())
    writer.submit(peer, RUNS, 20.0)
    ended: list[Completion] = []
    wait_until(lambda: bool(ended.extend(writer.poll()) or ended), 20, "the transfer has ended")
    assert not ended[0].error


# ---------------------------------------------------------------------------------------- NIXL


class FakeAgent:
    """What `nixl._api.nixl_agent` is to the backend."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name

    def get_plugin_list(self) -> list[str]:
        return ["UCX", "POSIX", "GDS"]

    def get_plugin_mem_types(self, plugin: str) -> list[str]:
        return {"UCX": ["DRAM_SEG", "VRAM_SEG"], "POSIX": ["DRAM_SEG", "FILE_SEG"], "GDS": []}[plugin]

    def create_backend(self, plugin: str, params: dict[str, str]) -> None:
        self.recorder.note("create_backend", plugin, params)
        if "broken" in params:
            raise RuntimeError("NIXL_ERR_BACKEND")

    def register_memory(self, places: list[tuple[int, int, int, str]], kind: str) -> object:
        self.recorder.note("register_memory", places, kind)
        return object()

    def get_xfer_descs(self, table: Any, kind: str) -> tuple[list[list[int]], str]:
        return table.tolist(), kind

    def initialize_xfer(self, verb: str, sources: Any, targets: Any, peer: str) -> object:
        self.recorder.note("initialize_xfer", verb, sources, targets, peer)
        return object()

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> str:
        return metadata.decode()

    def transfer(self, handle: object) -> str:
        return "DONE"

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        return {}

    def release_xfer_handle(self, handle: object) -> None: ...

    def remove_remote_agent(self, peer: str) -> None: ...

    def deregister_memory(self, registration: object) -> None: ...


def nixl_endpoint(recorder: Recorder, config: TransferConfig | None = None) -> nixl.NixlEndpoint:
    api = SimpleNamespace(
        nixl_agent=lambda name, config: FakeAgent(recorder, name), nixl_agent_config=lambda **settings: None
    )
    return nixl.NixlEndpoint(config or TransferConfig(), no_wake, api)


def test_nixl_registers_a_gpus_pool_as_vram_of_its_device(driver: FakeDriver) -> None:
    recorder = Recorder()
    target, writer = nixl_endpoint(recorder), nixl_endpoint(recorder)
    try:
        target.register(DEVICE_POOL, NBYTES, 3)
        writer.register(HOST_POOL, NBYTES)
        write(writer, target)
    finally:
        writer.close()
        target.close()
    vram, dram = ([(DEVICE_POOL, NBYTES, 3, "")], "VRAM"), ([(HOST_POOL, NBYTES, 0, "")], "DRAM")
    assert recorder.of("register_memory") == [vram, dram, dram], "the writer's second agent is for its peer"
    ((verb, sources, targets, _),) = recorder.of("initialize_xfer")
    assert verb == "WRITE"
    assert sources == ([[HOST_POOL, 512, 0], [HOST_POOL + 8192, 512, 0]], "DRAM")
    assert targets == ([[DEVICE_POOL + 4096, 512, 3], [DEVICE_POOL, 512, 3]], "VRAM")


def test_every_thread_that_uses_a_gpus_pool_has_its_context(driver: FakeDriver) -> None:
    target, writer = nixl_endpoint(Recorder()), nixl_endpoint(Recorder())
    try:
        target.register(HOST_POOL, NBYTES)
        assert not driver.recorder.calls
        writer.register(DEVICE_POOL, NBYTES, 3)
        write(writer, target)
    finally:
        writer.close()
        target.close()
    assert driver.recorder.of("retain") == [(3,)]
    contexts, threads = zip(*driver.recorder.of("current"), strict=True)
    assert set(contexts) == {0xC3}
    assert len(set(threads)) == len(threads) >= 3, "who registers, who polls, who writes: each once"


class FakeDriver:
    """What the driver's library is to `common.transfer.cuda`."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, gpu: int) -> int:
        device._obj.value = gpu
        return 0 if gpu < 8 else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.recorder.note("retain", device.value)
        context._obj.value = 0xC0 + device.value
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.recorder.note("current", context.value, threading.current_thread().name)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    fake = FakeDriver()
    monkeypatch.setattr(cuda, "_library", lambda: fake)
    monkeypatch.setattr(cuda, "_thread", threading.local())
    cuda._primary_context.cache_clear()
    yield fake
    cuda._primary_context.cache_clear()


def test_a_device_that_is_not_there_is_refused(driver: FakeDriver) -> None:
    with pytest.raises(TransferError, match=r"CUDA refused cuDeviceGet \(code 101\)"):
        cuda.make_current(9)


def test_nixl_is_given_the_configured_plugin_and_parameters() -> None:
    recorder = Recorder()
    endpoint = nixl_endpoint(recorder, TransferConfig(nixl_params={"num_workers": "2"}))
    endpoint.register(HOST_POOL, NBYTES)
    endpoint.close()
    assert recorder.of("create_backend") == [("UCX", {"num_workers": "2"})]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (TransferConfig(nixl_backend="NONE"), r"NIXL_BACKEND\): NIXL has no plugin NONE; there are GDS, POSIX, UCX"),
        (TransferConfig(nixl_backend="GDS"), r"NIXL_BACKEND\): NIXL's plugin GDS does not load on this machine"),
        (TransferConfig(nixl_backend="POSIX"), r"NIXL_BACKEND\): NIXL's plugin POSIX moves data to storage"),
        (TransferConfig(nixl_params={"broken": ""}), r"NIXL_BACKEND_PARAMS\): NIXL's UCX does not start with .*broken"),
    ],
)
def test_nixl_refuses_a_plugin_that_does_not_do(config: TransferConfig, why: str) -> None:
    endpoint = nixl_endpoint(Recorder(), config)
    with pytest.raises(TransferError, match=why):
        endpoint.register(HOST_POOL, NBYTES)
    endpoint.close()


# ---------------------------------------------------------------------------------------- Mooncake


class FakeEngine:
    """What `mooncake.engine.TransferEngine` is to the backend."""

    recorder = Recorder()

    def initialize(self, *arguments: str) -> int:
        self.recorder.note("initialize", *arguments)
        return 0

    def get_rpc_port(self) -> int:
        return 12345

    def register_memory(self, address: int, nbytes: int) -> int:
        self.recorder.note("register_memory", address, nbytes)
        return 0

    def batch_transfer_sync_write(self, *arguments: Any) -> int:
        self.recorder.note("write", *arguments)
        return 0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(FakeEngine, "recorder", Recorder())
    monkeypatch.setattr(mooncake, "rdma_devices", lambda: ["mlx5_0", "mlx5_1"])
    monkeypatch.setattr(mooncake, "_without_cuda", lambda: False)
    return FakeEngine.recorder


def test_mooncake_registers_a_gpus_pool_as_it_is(recorder: Recorder) -> None:
    config = TransferConfig(ib_devices=("mlx5_0", "mlx5_1"), mooncake_host="10.9.8.7", mooncake_protocol="rdma")
    target, writer = (mooncake.MooncakeEndpoint(config, no_wake, FakeEngine) for _ in range(2))
    try:
        target.register(DEVICE_POOL, NBYTES, 3)
        writer.register(HOST_POOL, NBYTES)
        write(writer, target)
    finally:
        writer.close()
        target.close()
    assert set(recorder.of("initialize")) == {("10.9.8.7", "P2PHANDSHAKE", "rdma", "mlx5_0,mlx5_1")}
    assert recorder.of("register_memory")[0] == (DEVICE_POOL, NBYTES)
    sources, targets = [HOST_POOL, HOST_POOL + 8192], [DEVICE_POOL + 4096, DEVICE_POOL]
    assert recorder.of("write") == [("10.9.8.7:12345", sources, targets, [512, 512])]


def test_mooncake_over_tcp_needs_no_device(recorder: Recorder) -> None:
    endpoint = mooncake.MooncakeEndpoint(TransferConfig(mooncake_protocol="tcp"), no_wake, FakeEngine)
    endpoint.register(HOST_POOL, NBYTES)
    endpoint.close()
    assert recorder.of("initialize") == [("127.0.0.1", "P2PHANDSHAKE", "tcp", "")]


def test_mooncake_by_rdma_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "rdma_devices", list)
    with pytest.raises(TransferError, match="no RDMA device at all on this host"):
        mooncake.MooncakeEndpoint(TransferConfig(mooncake_protocol="rdma"), no_wake, FakeEngine)


def test_a_mooncake_without_cuda_refuses_a_gpus_pool(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the address for one of the host's, and die of it."""
    monkeypatch.setattr(mooncake, "_without_cuda", lambda: True)
    endpoint = mooncake.MooncakeEndpoint(TransferConfig(), no_wake, FakeEngine)
    with pytest.raises(TransferError, match="has no CUDA, and the pool is on GPU 3"):
        endpoint.register(DEVICE_POOL, NBYTES, 3)
    endpoint.close()


# ---------------------------------------------------------------------------------------- local


@pytest.mark.parametrize("name", ["local", "emulated"])
def test_who_moves_host_memory_alone_says_so(name: str) -> None:
    endpoint = registry.create(name, TransferConfig(), no_wake)
    assert not endpoint.capabilities.device_memory
    with pytest.raises(TransferError, match=f"the {name} transfer backend moves host memory, and .* on GPU 3"):
        endpoint.register(DEVICE_POOL, NBYTES, 3)
    endpoint.close()


def test_a_worker_on_a_gpu_refuses_such_a_backend_before_it_loads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "choose_device", lambda config: torch.device("cuda", 0))
    waker = Waker()
    with pytest.raises(MeshError, match=r"backend local: .* the model runs on a GPU; take nixl or mooncake"):
        build_with_transfer(RankStart("", 0, 0, b""), WorkerConfig(engine=EngineConfig(model_path="none")), waker)
    waker.close()


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_memory_that_moves_under_its_address_is_refused(name: str) -> None:
    endpoint = nixl_endpoint(Recorder())
    check_for_gpu(endpoint, {name: "expandable_segments:False"})
    with pytest.raises(TransferError, match=f"{name}: expandable_segments"):
        check_for_gpu(endpoint, {name: "max_split_size_mb:256, expandable_segments: True"})


def test_host_memory_that_is_registered_is_a_source() -> None:
    source = np.arange(NBYTES, dtype=np.uint8)
    target = registry.create("local", TransferConfig(), no_wake)
    writer = registry.create("local", TransferConfig(), no_wake)
    try:
        pool = np.frombuffer(target.allocate(NBYTES), dtype=np.uint8)
        writer.register(source.ctypes.data, source.nbytes)
        write(writer, target)
    finally:
        writer.close()
        target.close()
    assert (pool[4096 : 4096 + 512] == source[:512]).all()
