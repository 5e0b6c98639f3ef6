"""Sessions with every replica of bootstrap: found through any of them, opened again when they break."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from common.config.tls import Credentials
from common.mesh.session import Session
from common.mesh.shards import Owners
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb

log = get_logger(__name__)


class Link(Session[Any, Any]):
    """A session with one replica. `replica_id` is known once the replica has told it."""

    replica_id = ""
    up = False


L = TypeVar("L", bound=Link)


class Replicas(ABC, Generic[L]):
    """Keeps a session with each replica from `start` to `close`, and knows which one owns a shard.

    `addresses` are those of one or several replicas, separated by commas; the rest is told by these.
    """

    def __init__(self, addresses: str, tls: Credentials | None = None) -> None:
        self.address = addresses
        self.tls = tls
        self.links: dict[str, L] = {}
        self.owners: Owners[L] = Owners()
        self.closing = False
        self._given = [address.strip() for address in addresses.split(",")]
        self._closings: set[asyncio.Task[None]] = set()

    @abstractmethod
    def make_link(self, address: str) -> L:
        """A session with the replica at `address`, not yet started."""

    @abstractmethod
    def gained(self, link: L, shards: list[int]) -> None:
        """The replica at `link` owns these shards from now on: tell it what it has to know of them."""

    def start(self) -> None:
        """Begin to connect; returns at once."""
        for address in self._given:
            self._add(address)

    async def close(self) -> None:
        """Send what is queued, say goodbye and stop. Idempotent."""
        self.closing = True
        links, self.links = list(self.links.values()), {}
        await asyncio.gather(*(link.close() for link in links), *self._closings)

    @property
    def up(self) -> list[L]:
        """The sessions that stand."""
        return [link for link in self.links.values() if link.up]

    def told(self, link: L, ownership: pb.Ownership) -> None:
        """To be called by a link with what its replica owns."""
        link.replica_id = ownership.replica_id
        for other in list(self.links.values()):  # one replica under two addresses: the later session stays
            if other is not link and other.replica_id == link.replica_id:
                self._remove(other)
        self._discover(ownership)
        if gained := self.owners.told(link, ownership):
            self.gained(link, gained)

    def _discover(self, ownership: pb.Ownership) -> None:
        named = {replica.address for replica in ownership.replicas}
        known = {link.replica_id for link in self.links.values()}
        for replica in ownership.replicas:
            if replica.address not in self.links and replica.replica_id not in known and not self.closing:
                log.info("replica of bootstrap found", address=replica.address, replica_id=replica.replica_id)
                self._add(replica.address)
        for address, link in list(self.links.items()):
            if not link.up and address not in named and address not in self._given:
                self._remove(link)

    def _add(self, address: str) -> None:
        link = self.links[address] = self.make_link(address)
        link.start()

    def _remove(self, link: L) -> None:
        self.links.pop(link.address, None)
        task = asyncio.create_task(link.close(), name=f"close session with {link.address}")
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)
