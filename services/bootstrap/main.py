"""The bootstrap process: store, epoch, control plane, server, from start to stop."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import AsyncExitStack

from common.config.tls import Credentials, load
from common.errors.base import MeshError, Reason
from common.obs import log as logs
from common.obs import metrics as pages
from common.rpc import loop
from common.rpc.address import join
from common.rpc.announce import announce
from common.rpc.server import Service, make_server
from pdmesh.v1 import bootstrap_service_pb2_grpc as pb_grpc
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.config import BootstrapConfig, BootstrapProcessConfig
from services.bootstrap.control import WORKER_PREFIX, ControlPlane
from services.bootstrap.server import SERVICE, BootstrapServicer
from services.bootstrap.store.base import ABSENT, Store, Write
from services.bootstrap.store.registry import make_store

__all__ = ["BootstrapProcessConfig", "Bootstrap", "main", "run"]

log = logs.get_logger(__name__)

EPOCH_KEY = "/pdmesh/epoch"
RETRY_S = 0.5
FLUSH_S = 2.0
GRACE_S = 1.0


class Bootstrap:
    """One bootstrap in this event loop. `address` is known from construction on.

    The server answers from `start` on, and says NOT_SERVING until the store is reached.
    """

    def __init__(self, config: BootstrapConfig, store: Store | None = None, tls: Credentials | None = None) -> None:
        """Raises `MeshError` (BAD_CONFIG) for a taken port or a store that there is none of."""
        self.config = config
        self.store = store or make_store(config.store, lease_ttl_s=config.lease_ttl)
        self.servicer = BootstrapServicer()
        service = Service(SERVICE, pb_grpc.add_BootstrapServiceServicer_to_server, self.servicer)
        self.server = make_server(config.host, config.port, [service], tls=tls)
        self.address = self.server.address
        self._control: ControlPlane | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen, and begin to reach for the store."""
        await self.server.start()
        log.info("bootstrap listens", address=self.address, store=type(self.store).__name__)

    async def serve(self) -> None:
        """Reach the store, trying again for as long as it is away, and take up service.

        Raises `MeshError` (BAD_CONFIG) when no try can help, such as without an etcd to start.
        """
        while True:
            try:
                await self._take_up()
                return
            except MeshError as error:
                if error.reason is Reason.BAD_CONFIG:
                    raise
                log.warning("the store is out of reach, will try again", error=error.message)
            await asyncio.sleep(RETRY_S)

    async def _take_up(self) -> None:
        await self.store.start()
        if self._control is None:  # one that failed half-way goes on: its announcement stands
            epoch = await next_epoch(self.store)
            self._control = ControlPlane(self.config, epoch, self.store, self.config.advertise_address or self.address)
        control = self._control
        workers, _ = await self.store.scan(WORKER_PREFIX)
        control.recovery.knew(types.Worker.FromString(entry.value) for entry in workers)
        control.records.know(workers)
        await control.shards.start()
        self._tasks = [
            asyncio.create_task(control.records.run(), name="records"),
            asyncio.create_task(control.run_timers(), name="timers"),
            asyncio.create_task(control.shards.run(), name="shards"),
        ]
        self.servicer.control_plane = control
        await self.server.set_serving(True)
        log.info("bootstrap serves", epoch=control.epoch, shards=len(control.shards.owned))

    async def stop(self) -> None:
        """End the sessions, write what is left to write, let go of the store. Idempotent."""
        control = self.servicer.control_plane
        if control:
            control.close()
        await self.server.stop(GRACE_S)
        if control:
            try:
                async with asyncio.timeout(FLUSH_S):
                    await control.records.flush()
            except TimeoutError:
                log.warning("not all records are written", store=type(self.store).__name__)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.store.close()


async def next_epoch(store: Store) -> int:
    """An epoch above that of every bootstrap before us, kept in the store.

    At least the clock's milliseconds since 1970, for the sake of a store that forgot.
    """
    while True:
        entry = await store.get(EPOCH_KEY)
        last = int(entry.value.split()[0]) if entry else 0
        epoch = max(last + 1, time.time_ns() // 1_000_000)
        # the name makes the value ours alone: a repeated commit can be told from another bootstrap's
        value = f"{epoch} {secrets.token_hex(8)}".encode()
        [outcome] = await store.commit([Write(EPOCH_KEY, value, entry.revision if entry else ABSENT)])
        if outcome.current and outcome.current.value == value:
            return epoch


async def main(config: BootstrapProcessConfig, stop: asyncio.Event) -> None:
    """Run bootstrap until `stop` is set. Raises `MeshError` (BAD_CONFIG)."""
    async with AsyncExitStack() as stack:
        settings = config.bootstrap
        store = make_store(settings.store, config.tls, config.etcd_tls, lease_ttl_s=settings.lease_ttl)
        bootstrap = Bootstrap(config.bootstrap, store, load(config.tls))
        host = config.bootstrap.host
        metrics_port, stop_metrics = pages.serve(host, config.metrics.metrics_port)
        stack.callback(stop_metrics)
        stack.push_async_callback(bootstrap.stop)
        await bootstrap.start()
        announce("bootstrap", grpc=bootstrap.address, metrics=join(host, metrics_port))
        serving = asyncio.create_task(bootstrap.serve())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving  # tell why it failed, if it did
            await stopping
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        log.info("bootstrap stops")


def run(config: BootstrapProcessConfig) -> None:
    """The whole life of a bootstrap process. Raises `MeshError` (BAD_CONFIG)."""
    logs.set_up(config.log, "bootstrap")
    loop.run(lambda stop: main(config, stop))
