"""Pools in a GPU's memory, with the real engines: bytes arrive, in every pairing with host memory."""

from __future__ import annotations

import threading

import pytest

from common.engine.config import EngineConfig
from common.errors.base import MeshError
from common.transfer import registry
from common.transfer.base import HandleState, Run, TransferBackend, TransferConfig, TransferError, no_wake
from common.worker.config import WorkerConfig
from common.worker.start import RankStart
from common.worker.transfer import build_with_transfer
from common.worker.waker import Waker

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.flaky(reruns=0),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

PAGE, PAGES = 64 << 10, 256
RUNS = [Run(page * PAGE, (PAGES - 1 - page) * PAGE, PAGE) for page in range(0, PAGES, 2)]
BOUND_S = 60.0


def endpoint(backend: str, pool: torch.Tensor, wake: threading.Event) -> TransferBackend:
    made = registry.create(backend, TransferConfig(), wake.set)
    try:
        made.register(pool.data_ptr(), pool.nbytes, pool.device.index if pool.is_cuda else None)
    except TransferError as error:
        made.close()
        pytest.skip(str(error))
    return made


@pytest.mark.parametrize("target_on", ["cuda:0", "cpu"])
@pytest.mark.parametrize("source_on", ["cuda:0", "cpu"])
@pytest.mark.parametrize("backend", ["nixl", "mooncake"])
def test_scattered_pages_arrive(backend: str, source_on: str, target_on: str) -> None:
    if registry.available()[backend]:
        pytest.skip(f"{backend} does not load here")
    source = torch.randint(0, 256, (PAGES, PAGE), dtype=torch.uint8).to(source_on)
    target = torch.zeros((PAGES, PAGE), dtype=torch.uint8, device=target_on)
    torch.cuda.synchronize()
    news = threading.Event()
    reader = endpoint(backend, target, threading.Event())
    writer = endpoint(backend, source, news)
    try:
        peer = writer.connect(reader.export())
        writer.submit(peer, RUNS, BOUND_S)
        assert news.wait(BOUND_S)
        (completion,) = writer.poll()
        assert completion.state is HandleState.DONE, completion.error
    finally:
        writer.close()
        reader.close()
    wanted = torch.zeros_like(target)
    wanted[PAGES - 1 - torch.arange(0, PAGES, 2)] = source[::2].to(target_on)
    assert torch.equal(target, wanted)


def test_the_local_backend_refuses_a_gpus_pool() -> None:
    pool = torch.zeros(PAGE, dtype=torch.uint8, device="cuda:0")
    made = registry.create("local", TransferConfig(), no_wake)
    with pytest.raises(TransferError, match="moves host memory"):
        made.register(pool.data_ptr(), pool.nbytes, 0)
    made.close()


def test_a_worker_on_a_gpu_refuses_the_local_backend_before_it_loads_weights() -> None:
    config = WorkerConfig(engine=EngineConfig(model_path="there is no such model", device="cuda"))
    waker = Waker()
    with pytest.raises(MeshError, match="the model runs on a GPU; take nixl or mooncake"):
        build_with_transfer(RankStart("", 0, 0, b""), config, waker)
    waker.close()
