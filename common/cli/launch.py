"""What `pdmesh up` starts, with which settings, in which order."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.cli.default_model import default_model_path
from common.cli.supervisor import Child, Supervisor
from common.config.bootstrap import DEFAULT_BOOTSTRAP_PORT
from common.config.flags import bad, flag, resolve, to_environment, to_flags
from common.config.tls import Credentials, TlsConfig, load
from common.engine.config import EngineConfig
from common.rpc.announce import Listening
from common.rpc.channel import connect
from common.worker.config import BACKENDS, WorkerConfig
from pdmesh.v1 import router_service_pb2 as pb
from pdmesh.v1 import router_service_pb2_grpc as pb_grpc
from services.bootstrap.config import BootstrapProcessConfig
from services.bootstrap.store.etcd_server import EtcdServer
from services.router.config import RouterProcessConfig

T = TypeVar("T")
SERVICES = (RouterProcessConfig, WorkerConfig, BootstrapProcessConfig)
WORKER_ROLES = ("prefill", "decode", "unified")
MEMORY_SHARE = 0.8
RETRY_S = 0.1
# Seconds after the drain's end by which a stage has stopped; what has not is killed. All is over within 10 s.
ROUTER_STOP_S, WORKERS_STOP_S, BOOTSTRAP_STOP_S = 1.5, 5.0, 6.0


@dataclass(frozen=True)
class UpConfig:
    """Settings of `pdmesh up` itself, and those whose defaults differ where several workers share a machine."""

    prefill: int | None = flag(None, "Prefill workers (default: 1, or 0 with --unified).")
    decode: int | None = flag(None, "Decode workers (default: 1, or 0 with --unified).")
    unified: int = flag(0, "Unified workers.")
    bootstraps: int = flag(1, "Replicas of bootstrap; more than one share an etcd (--store).")
    status_file: str | None = flag(None, "JSON file that lists the processes once all are ready.", metavar="PATH")
    disaggregation_bootstrap_port: int = flag(
        DEFAULT_BOOTSTRAP_PORT, "Port of bootstrap; 0 picks a free one.", aliases=("--bootstrap-port",)
    )
    model_path: str = flag(
        "", "Checkpoint folder, or a Hugging Face hub name (default: the model in the box).", aliases=("--model",)
    )
    cpu_threads: int | None = flag(None, "Threads of one rank's kernels on CPU (default: its share of the cores).")
    base_gpu_id: int | None = flag(None, "GPU of every worker (default: the workers take turns).")
    disaggregation_transfer_backend: str | None = flag(
        None, "Engine that moves the pages (default: local, or nixl where there are GPUs).", choices=BACKENDS
    )
    mem_fraction_static: float | None = flag(
        None, f"Share of memory for weights and KV pool (default: {MEMORY_SHARE} among those that share a device)."
    )
    drain_timeout: float = flag(3.0, "Seconds that running requests get to finish after Ctrl-C.")

    def __post_init__(self) -> None:
        counts = self.counts
        if min(counts.values()) < 0:
            raise bad("--prefill, --decode, --unified: must not be negative")
        if bool(counts["prefill"]) != bool(counts["decode"]):
            raise bad("--prefill, --decode: one is of no use without the other")
        if self.bootstraps < 1:
            raise bad("--bootstraps: at least one is needed")
        if not any(counts.values()):
            raise bad("--prefill, --decode, --unified: no worker at all")

    @property
    def counts(self) -> dict[str, int]:
        """Workers by role."""
        default = 0 if self.unified else 1
        prefill = default if self.prefill is None else self.prefill
        decode = default if self.decode is None else self.decode
        return dict(zip(WORKER_ROLES, (prefill, decode, self.unified), strict=True))


def count_gpus() -> int:
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def either(given: T | None, default: T) -> T:
    return default if given is None else given


class Launch:
    """One mesh on this machine."""

    def __init__(self, config: UpConfig, parsed: argparse.Namespace) -> None:
        self.config = config
        self.parsed = parsed
        self.supervisor = Supervisor(self._restarted)
        self.on_restarted: Callable[[], None] = lambda: None
        self.roles: dict[Child, str] = {}
        self.etcd: EtcdServer | None = None
        self.tls = load(self.settings(TlsConfig))
        self.model_path = config.model_path or str(default_model_path())
        self.names = [f"{role}-{i}" for role, count in config.counts.items() for i in range(count)]
        for index, name in enumerate(self.names):  # settings that cannot work are refused before anything starts
            self.worker_flags(index, name, "")

    # ------------------------------------------------------------------------------------ settings

    def settings(self, service: type[T], **own: Any) -> T:
        """The settings of one process: what the user gave, and what `up` decides for it."""
        given = argparse.Namespace(**{**vars(self.parsed), "drain_timeout": self.config.drain_timeout, **own})
        return resolve(service, given, file_of=(UpConfig, *SERVICES))

    def flags(self, service: type, **own: Any) -> list[str]:
        """The same as flags, without secrets."""
        return to_flags(self.settings(service, **own))

    def worker_flags(self, index: int, name: str, bootstrap: str) -> list[str]:
        config, gpus = self.config, count_gpus()
        sharing = -(-len(self.names) // gpus) if gpus else len(self.names)
        threads = max(1, len(os.sched_getaffinity(0)) // len(self.names))
        backend = "nixl" if gpus and self.settings(EngineConfig).device != "cpu" else "local"
        return self.flags(
            WorkerConfig,
            model_path=self.model_path,
            worker_id=name,
            bootstrap=bootstrap,
            host="127.0.0.1",
            port=0,
            metrics_port=0,
            cpu_threads=either(config.cpu_threads, threads),
            disaggregation_transfer_backend=either(config.disaggregation_transfer_backend, backend),
            base_gpu_id=either(config.base_gpu_id, index % max(1, gpus)),
            mem_fraction_static=either(config.mem_fraction_static, round(MEMORY_SHARE / sharing, 3)),
        )

    # ------------------------------------------------------------------------------------ life

    async def start(self) -> str:
        """Bring everything up; returns the served model's name. Waits for ever if a child ends on the way."""
        address = await self.start_bootstraps()
        children = [
            await self.service(name, name.partition("-")[0], self.worker_flags(index, name, address))
            for index, name in enumerate(self.names)
        ]
        children.append(await self.service("router", "router", self.flags(RouterProcessConfig, bootstrap=address)))
        addresses = await asyncio.gather(*map(self.supervisor.listening, children))
        await asyncio.gather(*(wait_serving(str(listening.grpc), self.tls) for listening in addresses))
        return await wait_for_model(str(self.listening("router").grpc), self.tls)

    async def start_bootstraps(self) -> str:
        """Start all replicas of bootstrap; returns their addresses, as `--bootstrap` takes them."""
        count = self.config.bootstraps
        own: dict[str, Any] = {"host": "127.0.0.1", "metrics_port": 0}
        store = self.settings(BootstrapProcessConfig).bootstrap.store
        if count > 1 and store == "memory":
            raise bad("--bootstraps: replicas share a store: give --store etcd")
        if count > 1 and store == "etcd":
            self.etcd = EtcdServer()
            await self.etcd.start()
            own["store"] = f"etcd://{self.etcd.endpoint}"
        children = []
        for index in range(count):
            port = self.config.disaggregation_bootstrap_port if index == 0 else 0
            config = self.settings(BootstrapProcessConfig, port=port, **own)
            name = f"bootstrap-{index}" if count > 1 else "bootstrap"
            children.append(await self.service(name, "bootstrap", to_flags(config), to_environment(config)))
        addresses = await asyncio.gather(*map(self.supervisor.listening, children))
        if count > 1:
            for child, address in zip(children, addresses, strict=True):  # the mesh knows it by this port
                child.again = [*child.command, f"--port={str(address.grpc).rpartition(':')[2]}"]
        return ",".join(str(listening.grpc) for listening in addresses)

    async def service(
        self, name: str, role: str, flags: list[str], environment: Mapping[str, str] = MappingProxyType({})
    ) -> Child:
        # -P: a folder called `common` where the user happens to be is none of ours
        command = [sys.executable, "-P", "-m", "common.cli.main", role, *flags]
        child = await self.supervisor.start(name, command, {**os.environ, **environment})
        self.roles[child] = role
        child.may_leave = role in WORKER_ROLES  # an operator may drain a worker
        return child

    def _restarted(self, child: Child) -> None:
        """A replica of bootstrap runs again, in the place of the one that ended."""
        self.roles = {child if known.name == child.name else known: role for known, role in self.roles.items()}
        self.on_restarted()

    async def stop(self) -> None:
        """Stop all that runs: the router, then the workers, then bootstrap."""
        drain_s = self.config.drain_timeout
        await self.supervisor.stop(
            [
                (self.of("router"), drain_s + ROUTER_STOP_S),
                (self.of(*WORKER_ROLES), drain_s + WORKERS_STOP_S),
                (self.of("bootstrap"), drain_s + BOOTSTRAP_STOP_S),
            ]
        )
        if self.etcd:
            await self.etcd.stop()

    # ------------------------------------------------------------------------------------ view

    def of(self, *roles: str) -> list[Child]:
        return [child for child, role in self.roles.items() if role in roles]

    def listening(self, role: str) -> Listening:
        """Where the one process of a role listens; it has announced itself."""
        (child,) = self.of(role)
        assert child.listening is not None
        return child.listening

    def status(self) -> list[dict[str, Any]]:
        """The processes as the status file lists them."""
        return [{"name": child.name, **asdict(child.listening)} for child in self.roles if child.listening]

    def describe_workers(self) -> str:
        return ", ".join(f"{count} {role}" for role, count in self.config.counts.items() if count)


async def wait_serving(address: str, tls: Credentials | None = None) -> None:
    """Until the standard health service at `address` says SERVING."""
    async with connect(address, tls) as channel:
        health = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        while True:
            try:
                async for answer in health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except grpc.aio.AioRpcError:  # not up yet, or on its way down: then `failure` tells
                await asyncio.sleep(RETRY_S)


async def wait_for_model(address: str, tls: Credentials | None = None) -> str:
    """Until the router at `address` has workers to send a request to; the name of the model they serve."""
    async with connect(address, tls) as channel:
        router: pb_grpc.RouterServiceAsyncStub = pb_grpc.RouterServiceStub(channel)
        while True:
            try:
                models = (await router.ListModels(pb.ListModelsRequest(), timeout=5.0)).models
            except grpc.aio.AioRpcError:
                models = None
            if models:
                return models[0].name
            await asyncio.sleep(RETRY_S)
