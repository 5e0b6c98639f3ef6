"""A store in etcd: for a cluster of machines, and for what must outlive bootstrap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from common.errors.base import MeshError
from common.obs.log import get_logger
from pdmesh.etcd.v1 import etcd_pb2 as pb
from services.bootstrap.store.base import Change, Changes, Entry, Outcome, Write, check
from services.bootstrap.store.etcd_client import Compacted, EtcdClient, prefix_end
from services.bootstrap.store.etcd_server import EtcdServer

log = get_logger(__name__)

LEASE_TTL_S = 3
RETRY_S = 0.2
REVOKE_TIMEOUT_S = 1.0
PAGE = 1000


class EtcdStore:
    """Keys in etcd. One lease a process holds what it announces. `server` is a private etcd to start and stop."""

    durable = True

    def __init__(self, client: EtcdClient, server: EtcdServer | None = None, *, lease_ttl_s: int = LEASE_TTL_S) -> None:
        self.client = client
        self.in_touch = False
        self._server = server
        self._lease_ttl_s = lease_ttl_s
        self._lease_id = 0
        self._announced: dict[str, bytes] = {}
        self._keep_alive: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._server:
            await self._server.start()
            self.client.endpoints[:] = [self._server.endpoint]
        if self._keep_alive:  # reached before
            return
        status = await self.client.status()
        self._lease_id = await self.client.lease_grant(self._lease_ttl_s)
        self.in_touch = True
        self._keep_alive = asyncio.create_task(self._keep_lease(), name="etcd lease")
        log.info("etcd reached", endpoints=self.client.endpoints, version=status.version)

    async def close(self) -> None:
        if self._keep_alive:
            self._keep_alive.cancel()
            await asyncio.gather(self._keep_alive, return_exceptions=True)
            self._keep_alive = None
            try:
                async with asyncio.timeout(REVOKE_TIMEOUT_S):
                    await self.client.lease_revoke(self._lease_id)
            except (MeshError, TimeoutError) as error:  # it ends by itself
                log.warning("cannot revoke the lease", error=str(error))
        await self.client.close()
        if self._server:
            await self._server.stop()

    async def get(self, key: str) -> Entry | None:
        answer = await self.client.range(pb.RangeRequest(key=key.encode()))
        return to_entry(answer.kvs[0]) if answer.kvs else None

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        """In pages of one revision, so that no answer outgrows a message."""
        key, end, revision = prefix.encode(), prefix_end(prefix.encode()), 0
        entries: list[Entry] = []
        while True:
            request = pb.RangeRequest(key=key, range_end=end, limit=PAGE, revision=revision)
            answer = await self.client.range(request)
            revision = revision or answer.header.revision
            entries += map(to_entry, answer.kvs)
            if not answer.more:
                return entries, revision
            key = answer.kvs[-1].key + b"\0"

    async def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        """One transaction that holds a nested one for each write, so that guards do not hinder one another."""
        check(writes)
        request = pb.TxnRequest(success=[pb.RequestOp(request_txn=to_txn(write)) for write in writes])
        answer = await self.client.txn(request)
        return [
            to_outcome(write, response.response_txn, answer.header.revision)
            for write, response in zip(writes, answer.responses, strict=True)
        ]

    async def announce(self, key: str, value: bytes) -> None:
        self._announced[key] = value
        await self.client.put(pb.PutRequest(key=key.encode(), value=value, lease=self._lease_id))

    async def watch(self, prefix: str, after: int | None = None) -> AsyncIterator[Changes]:
        while True:
            try:
                if after is None:
                    entries, after = await self.scan(prefix)
                    snapshot = tuple(Change(entry.key, entry.value, entry.revision) for entry in entries)
                    yield Changes(snapshot, after, snapshot=True)
                async for response in self.client.watch(prefix.encode(), after + 1):
                    after = max(after, response.header.revision) if response.events else after
                    if response.events:
                        yield Changes(tuple(map(to_change, response.events)), after)
            except Compacted:
                after = None
            except MeshError as error:
                log.warning("watch interrupted", prefix=prefix, error=error.message)
                await asyncio.sleep(RETRY_S)

    async def _keep_lease(self) -> None:
        """Prolong the lease; when it ended while etcd was out of reach, take another and announce all again."""
        interval_s = self._lease_ttl_s / 3
        while True:
            await asyncio.sleep(interval_s if self.in_touch else RETRY_S)
            try:
                if not await self.client.lease_keep_alive(self._lease_id, try_timeout_s=interval_s):
                    await self._announce_again()
                if not self.in_touch:
                    log.info("etcd is back", endpoints=self.client.endpoints)
                self.in_touch = True
            except MeshError as error:
                if self.in_touch:  # say it once
                    log.warning("cannot prolong the lease", error=error.message)
                self.in_touch = False

    async def _announce_again(self) -> None:
        self._lease_id = await self.client.lease_grant(self._lease_ttl_s)
        for key, value in self._announced.items():
            await self.announce(key, value)
        log.warning("the lease had ended; announced again", keys=list(self._announced))


def to_entry(kv: pb.KeyValue) -> Entry:
    return Entry(kv.key.decode(), kv.value, kv.mod_revision)


def to_change(event: pb.Event) -> Change:
    deleted = event.type == pb.EVENT_TYPE_DELETE
    return Change(event.kv.key.decode(), None if deleted else event.kv.value, event.kv.mod_revision)


def to_txn(write: Write) -> pb.TxnRequest:
    key = write.key.encode()
    if write.value is None:
        operation = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))
    else:
        operation = pb.RequestOp(request_put=pb.PutRequest(key=key, value=write.value))
    txn = pb.TxnRequest(success=[operation])
    if write.expected is not None:
        txn.compare.append(to_compare(key, write.expected))
    if write.guard is not None:
        txn.compare.append(to_compare(write.guard.key.encode(), write.guard.revision))
    if txn.compare:
        txn.failure.append(pb.RequestOp(request_range=pb.RangeRequest(key=key)))
    return txn


def to_compare(key: bytes, revision: int) -> pb.Compare:
    """That the key's last change was at `revision`; 0 is that of a key that is not there."""
    return pb.Compare(
        result=pb.COMPARE_RESULT_EQUAL_UNSPECIFIED,
        target=pb.COMPARE_TARGET_MOD,
        key=key,
        mod_revision=revision,
    )


def to_outcome(write: Write, answer: pb.TxnResponse, revision: int) -> Outcome:
    if answer.succeeded:
        current = None if write.value is None else Entry(write.key, write.value, revision)
        return Outcome(True, current)
    kvs = answer.responses[0].response_range.kvs
    return Outcome(False, to_entry(kvs[0]) if kvs else None)
