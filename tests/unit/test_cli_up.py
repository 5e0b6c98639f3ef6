"""What `pdmesh up` decides before it starts anything, and what it prints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from common.cli import launch, up
from common.cli.launch import Launch, UpConfig
from common.config.flags import add_flags, resolve, to_environment
from common.errors.base import MeshError, Reason
from common.worker.config import WorkerConfig
from services.bootstrap.config import BootstrapProcessConfig
from services.router.config import RouterProcessConfig

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PDMESH_"):
            monkeypatch.delenv(name)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    up.add_arguments(parser)
    return parser.parse_args(arguments)


async def plan(*arguments: str) -> Launch:
    parsed = parse(*arguments)
    return Launch(resolve(UpConfig, parsed, file_of=launch.SERVICES), parsed)


def read_back(service: Any, flags: list[str]) -> Any:
    """The config that a process of the mesh makes of its flags."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, service)
    return resolve(service, parser.parse_args(flags), {})


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (1, 1, 0)),
        ({"unified": 2}, (0, 0, 2)),
        ({"prefill": 2, "decode": 3}, (2, 3, 0)),
        ({"prefill": 1, "decode": 1, "unified": 1}, (1, 1, 1)),
    ],
)
def test_counts(settings: dict[str, int], counts: tuple[int, ...]) -> None:
    assert tuple(UpConfig(**settings).counts.values()) == counts


@pytest.mark.parametrize("settings", [{"prefill": 0}, {"decode": 0}, {"prefill": 0, "decode": 0}, {"unified": -1}])
def test_a_mesh_that_cannot_serve_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(MeshError) as caught:
        UpConfig(**settings)
    assert caught.value.reason is Reason.BAD_CONFIG


async def test_workers_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(9)))
    monkeypatch.setattr(launch, "count_gpus", lambda: 0)
    mesh = await plan("--prefill", "2", "--decode", "2")
    assert mesh.names == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    worker = read_back(WorkerConfig, mesh.worker_flags(3, "decode-1", "127.0.0.1:7"))
    assert (worker.worker_id, worker.host, worker.port) == ("decode-1", "127.0.0.1", 0)
    assert worker.bootstrap.address == "127.0.0.1:7"
    assert worker.engine.cpu_threads == 2
    assert worker.engine.mem_fraction_static == 0.2
    assert Path(worker.engine.model_path).name == "adder"


async def test_workers_take_turns_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 2)
    mesh = await plan("--prefill", "2", "--decode", "1")
    workers = [read_back(WorkerConfig, mesh.worker_flags(i, name, "")) for i, name in enumerate(mesh.names)]
    assert [worker.engine.base_gpu_id for worker in workers] == [0, 1, 0]
    assert {worker.engine.mem_fraction_static for worker in workers} == {0.4}
    assert {worker.handover.disaggregation_transfer_backend for worker in workers} == {"nixl"}, "local has no way there"
    mesh = await plan("--device", "cpu")
    worker = read_back(WorkerConfig, mesh.worker_flags(0, "prefill-0", ""))
    assert worker.handover.disaggregation_transfer_backend == "local"


async def test_what_the_user_gave_goes_to_who_knows_it() -> None:
    mesh = await plan(
        *("--cpu-threads", "3", "--mem-fraction-static", "0.5", "--page-size", "8", "--drain-timeout", "2"),
        *("--port", "81", "--grpc-port", "82", "--store", "etcd", "--disaggregation-transfer-backend", "nixl"),
    )
    worker = read_back(WorkerConfig, mesh.worker_flags(0, "prefill-0", ""))
    assert (worker.engine.cpu_threads, worker.engine.mem_fraction_static, worker.engine.page_size) == (3, 0.5, 8)
    assert worker.handover.disaggregation_transfer_backend == "nixl"
    router = read_back(RouterProcessConfig, mesh.flags(RouterProcessConfig))
    assert (router.router.port, router.router.grpc_port, router.router.drain_timeout) == (81, 82, 2.0)
    bootstrap = mesh.settings(BootstrapProcessConfig, port=9)
    assert to_environment(bootstrap) == {"PDMESH_STORE": "etcd"}  # it may hold a password
    assert not any("etcd" in argument for argument in mesh.flags(BootstrapProcessConfig))
    assert (bootstrap.bootstrap.port, bootstrap.bootstrap.store) == (9, "etcd")


async def test_a_worker_that_could_not_start_is_refused_before_anything_does() -> None:
    with pytest.raises(MeshError, match="this machine has no RDMA device no_such_device"):
        await plan("--disaggregation-transfer-backend", "nixl", "--disaggregation-ib-device", "no_such_device")


async def test_one_file_holds_settings_of_all(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("prefill = 2\npage-size = 8\nmax-queued-requests = 5\nstore = 'etcd'\n")
    mesh = await plan("--config", str(file))
    assert mesh.config.counts["prefill"] == 2
    assert read_back(WorkerConfig, mesh.worker_flags(0, "a", "")).engine.page_size == 8
    assert read_back(RouterProcessConfig, mesh.flags(RouterProcessConfig)).router.max_queued_requests == 5


@pytest.mark.parametrize("flag", ["--bootstrap", "--worker-id", "--metrics-port", "--advertise-address"])
def test_what_up_decides_itself_is_no_flag(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flag, "1")
    assert flag in capsys.readouterr().err


def test_an_address_that_listens_everywhere_is_printed_as_one_that_can_be_called() -> None:
    assert up.reachable("0.0.0.0:80") == "127.0.0.1:80"
    assert up.reachable("10.0.0.1:80") == "10.0.0.1:80"


def test_the_status_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    up.write_atomically(path, "[]\n")
    assert [file.name for file in tmp_path.iterdir()] == ["status.json"]
    assert path.read_text() == "[]\n"
