"""Who owns which shard: the share-out as a plain function, and several replicas at one store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from common.mesh.shards import Owners, new_room_id, shard_of_request, shard_of_room
from pdmesh.v1 import bootstrap_service_pb2 as pb
from services.bootstrap.assign import assign
from services.bootstrap.records import Records
from services.bootstrap.shards import DEFAULT_SHARDS, REPLICA_PREFIX, Shard, Shards
from services.bootstrap.store.base import Guard, Write
from services.bootstrap.store.memory import MemoryStore

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("replicas", range(1, 8))
def test_shares_differ_by_one_at_most(replicas: int) -> None:
    target = assign({}, [f"r{n}" for n in range(replicas)], 64)
    counts = Counter(target.values())
    assert sorted(target) == list(range(64))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_more_moves_than_it_takes() -> None:
    alone = assign({}, ["a"], 64)
    two = assign(alone, ["a", "b"], 64)
    assert sum(two[shard] != alone[shard] for shard in range(64)) == 32
    three = assign(two, ["a", "b", "c"], 64)
    assert sum(three[shard] != two[shard] for shard in range(64)) == 21
    back = assign(three, ["a", "c"], 64)
    assert all(back[shard] == three[shard] for shard in range(64) if three[shard] != "b")
    assert assign(two, ["b", "a"], 64) == two
    assert assign(two, [], 64) == {}


def test_a_room_tells_its_shard_and_a_request_has_one() -> None:
    assert shard_of_room(new_room_id(0x1A2B, "7", 63)) == 63
    assert [shard_of_room(name) for name in ("", "none", "a-b-x", "-")] == [-1] * 4
    assert len({shard_of_request(f"request-{n}", 64) for n in range(2000)}) == 64


def owning(*owned: tuple[int, int]) -> pb.Ownership:
    return pb.Ownership(shards=4, owned=[pb.OwnedShard(shard=shard, epoch=epoch) for shard, epoch in owned])


def test_the_claim_with_the_higher_epoch_holds() -> None:
    owners: Owners[str] = Owners()
    assert owners.told("a", owning((0, 5), (1, 5))) == [0, 1]
    assert owners.told("a", owning((0, 5), (1, 5))) == []
    assert owners.told("b", owning((1, 6))) == [1]
    assert owners.told("a", owning((0, 5), (1, 5))) == [], "it slept, and has not heard yet"
    assert (owners.of(0), owners.of(1), owners.of(2)) == ("a", "b", None)
    owners.lost("b")
    assert owners.of(1) is None
    assert owners.told("a", owning((0, 5), (1, 5))) == []
    assert owners.told("b", owning((1, 6))) == [1], "it must be told again, on its new session"
    assert owners.told("a", owning((0, 5), (1, 7))) == [1]
    assert owners.told("a", owning((1, 7))) == []
    assert owners.of(0) is None


class Replica:
    """A replica's shards and records, with what became of its shards."""

    def __init__(self, store: MemoryStore, name: str) -> None:
        self.lost: list[int] = []
        self.left: list[int] = []
        self.changed = asyncio.Event()
        self.shards = Shards(
            store,
            name,
            f"{name}:1",
            1,
            on_gained=self._gained,
            on_leaving=self._leaving,
            on_lost=lambda shard: self.lost.append(shard.number),
            on_changed=self.changed.set,
        )
        self.records = Records(store, [], self.shards.fenced)

    async def _gained(self, shard: Shard) -> None:
        await asyncio.sleep(0)

    async def _leaving(self, shard: Shard) -> None:
        self.left.append(shard.number)

    async def owns(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.shards.owned) != count:
                self.changed.clear()
                await self.changed.wait()


class Cluster:
    def __init__(self, stack: AsyncExitStack) -> None:
        self.store = MemoryStore()
        self._stack = stack

    async def replica(self, name: str, *, awake: bool = True) -> Replica:
        replica = Replica(self.store, name)
        await replica.shards.start()
        if awake:
            self.run(replica.shards.run())
        self.run(replica.records.run())
        return replica

    def run(self, coroutine: object) -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[arg-type]

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(stack)


async def test_shards_are_shared_when_replicas_come_and_go(cluster: Cluster) -> None:
    first = await cluster.replica("a")
    await first.owns(DEFAULT_SHARDS)
    epochs = {number: shard.claim.epoch for number, shard in first.shards.owned.items()}
    second = await cluster.replica("b")
    await first.owns(32)
    await second.owns(32)
    assert first.shards.owned.keys().isdisjoint(second.shards.owned)
    assert all(shard.claim.epoch > epochs[number] for number, shard in second.shards.owned.items())
    assert sorted(first.left) == sorted(second.shards.owned), "given away in order"
    assert not first.lost
    await cluster.store.commit([Write(REPLICA_PREFIX + "b", None)])  # its lease ended
    await first.owns(DEFAULT_SHARDS)


async def test_an_owner_is_left_alone_while_it_is_announced(cluster: Cluster) -> None:
    first = await cluster.replica("a", awake=False)
    second = await cluster.replica("b")
    third = await cluster.replica("c")
    await asyncio.sleep(0)
    assert len(first.shards.owned) == DEFAULT_SHARDS
    assert not second.shards.owned
    assert not third.shards.owned


async def test_nothing_of_an_owner_that_was_replaced_gets_through(cluster: Cluster) -> None:
    sleeper = await cluster.replica("a", awake=False)
    shard = sleeper.shards.owned[5]
    sleeper.records.set("/rooms/5", lambda: b"before", shard.guard)
    await sleeper.records.flush()
    await cluster.store.commit([Write(REPLICA_PREFIX + "a", None)])
    successor = await cluster.replica("b")
    await successor.owns(DEFAULT_SHARDS)
    sleeper.records.set("/rooms/5", lambda: b"after", shard.guard)
    await sleeper.records.flush()
    entry = await cluster.store.get("/rooms/5")
    assert entry
    assert entry.value == b"before"
    assert sleeper.lost == [5], "that it was refused told the sleeper"
    successor.records.set("/rooms/5", lambda: b"mine", successor.shards.owned[5].guard)
    await successor.records.flush()
    entry = await cluster.store.get("/rooms/5")
    assert entry
    assert entry.value == b"mine"


async def test_a_replica_buries_the_one_whose_address_it_has(cluster: Cluster) -> None:
    dead = await cluster.replica("a", awake=False)
    heir = Replica(cluster.store, "z")
    heir.shards._address = "a:1"
    await heir.shards.start()
    assert len(heir.shards.owned) == DEFAULT_SHARDS
    assert len(dead.shards.owned) == DEFAULT_SHARDS, "it has not heard"
    assert heir.shards.owned[0].claim.epoch > dead.shards.owned[0].claim.epoch


async def test_records_wait_for_those_of_one_shard(cluster: Cluster) -> None:
    records = Records(cluster.store, [])
    guard = Guard("/g", 0)
    records.set("/x", lambda: b"", guard)
    settled = asyncio.create_task(records.settled(guard))
    await asyncio.sleep(0)
    assert not settled.done()
    cluster.run(records.run())
    async with asyncio.timeout(10):
        await settled
    records.set("/y", lambda: b"", guard)
    records.drop(guard)
    await records.settled(guard)
    assert await cluster.store.get("/y") is None
