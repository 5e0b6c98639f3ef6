"""The size of a rank's KV pool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.engine.config import EngineConfig
from common.errors.base import MeshError, Reason
from common.kvcache.layout import KvLayout
from common.worker import rank
from common.worker.rank import available_bytes, default_num_pages

pytestmark = pytest.mark.unit

LAYOUT = KvLayout("float32", num_layers=2, num_kv_heads=2, head_dim=16, page_size=16)  # pages of 8 KiB
CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def meminfo(tmp_path: Path) -> str:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8192 kB\nHugePages_Total:    0\n")
    return str(path)


def test_available_memory_is_what_the_kernel_says(meminfo: str, tmp_path: Path) -> None:
    assert available_bytes(meminfo, str(tmp_path)) == 8 * MIB


def test_a_control_group_limits_it(meminfo: str, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{5 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{3 * MIB}\n")
    assert available_bytes(meminfo, str(tmp_path)) == 2 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, str(tmp_path)) == 8 * MIB


def test_tokens_decide_where_they_are_given() -> None:
    assert default_num_pages(EngineConfig(max_total_tokens=1000), LAYOUT, 2048, CPU) == 62


@pytest.mark.parametrize(
    ("available", "running", "pages"),
    [(8 * MIB, 64, 256), (8 * MIB, 1, 128), (2**50, 100_000, 4 * 2**30 // 8192)],
)
def test_a_cpu_pool_is_modest(monkeypatch: pytest.MonkeyPatch, available: int, running: int, pages: int) -> None:
    monkeypatch.setattr(rank, "available_bytes", lambda: available)
    assert default_num_pages(EngineConfig(max_running_requests=running), LAYOUT, 2048, CPU) == pages


@pytest.mark.parametrize(("weights", "others", "pages"), [(8, 0, 32), (8, 40, 32), (8, 80, 12), (50, 0, 0)])
def test_a_gpus_pool_is_this_workers_share(
    monkeypatch: pytest.MonkeyPatch, weights: int, others: int, pages: int
) -> None:
    """Of 100 pages' worth of memory, 40 %: whatever others have there, as long as it is free."""
    device, page = torch.device("cuda", 1), LAYOUT.page_bytes
    memory = (100 - weights - others) * page, 100 * page
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda asked: memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda asked: weights * page)
    config = EngineConfig(mem_fraction_static=0.4)
    if pages:
        assert default_num_pages(config, LAYOUT, 2048, device) == pages
    else:
        with pytest.raises(MeshError, match="no page"):
            default_num_pages(config, LAYOUT, 2048, device)


def test_a_pool_without_a_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "available_bytes", lambda: 1000)
    for config in (EngineConfig(), EngineConfig(max_total_tokens=15)):
        with pytest.raises(MeshError) as refusal:
            default_num_pages(config, LAYOUT, 2048, CPU)
        assert refusal.value.reason is Reason.BAD_CONFIG
