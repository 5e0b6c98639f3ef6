"""Which shards this replica owns: claimed from the store by compare-and-swap, balanced with the other replicas.

A replica announces itself under a key that a lease holds. A shard's record names its owner and the claim's epoch,
and no lease holds it: a replica whose lease lapsed, because the store was away or it was cut off from it, still owns
its shards until another one claims them. That takes a swap of the shard's record which holds only while the owner's
announcement is gone. What the owner writes about its rooms is guarded by the record of the shard, so that nothing
of an owner that was replaced gets through after that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import msgspec

from common.errors.base import MeshError
from common.obs.log import get_logger
from services.bootstrap import metrics
from services.bootstrap.assign import assign
from services.bootstrap.store.base import ABSENT, MAX_WRITES, Changes, Guard, Store, Write

log = get_logger(__name__)

CLUSTER_PREFIX = "/pdmesh/cluster/"
COUNT_KEY = CLUSTER_PREFIX + "shard_count"
REPLICA_PREFIX = CLUSTER_PREFIX + "replicas/"
SHARD_PREFIX = CLUSTER_PREFIX + "shards/"
DEFAULT_SHARDS = 64
RETRY_S = 0.3


class Claim(msgspec.Struct, frozen=True):
    """A shard's record. `owner` is a replica's id, empty when the last one gave the shard away."""

    owner: str
    epoch: int


@dataclass(frozen=True)
class Shard:
    """A claim as it stands in the store."""

    number: int
    claim: Claim
    revision: int

    @property
    def guard(self) -> Guard:
        """Holds as long as this very claim does."""
        return Guard(shard_key(self.number), self.revision)


def shard_key(number: int) -> str:
    return f"{SHARD_PREFIX}{number:04x}"


class Shards:
    """Keeps as many shards as are this replica's share.

    `on_gained` is awaited for a shard that was claimed, before anybody hears of it: to load its rooms. `on_leaving`
    is awaited before one is given away: to stop serving it and to write what is left to write. `on_lost` tells of
    one that another replica has taken, `on_changed` that what `owned` or `replicas` say has changed.
    """

    def __init__(
        self,
        store: Store,
        replica_id: str,
        address: str,
        first_epoch: int,
        *,
        on_gained: Callable[[Shard], Awaitable[None]],
        on_leaving: Callable[[Shard], Awaitable[None]],
        on_lost: Callable[[Shard], None],
        on_changed: Callable[[], None],
    ) -> None:
        self.replica_id = replica_id
        self.count = 0
        self.owned: dict[int, Shard] = {}
        self.replicas: dict[str, str] = {replica_id: address}  # addresses by id
        self.known: dict[int, Shard] = {}  # every shard as the store last told
        self._before: dict[int, Claim] = {}  # of shards that are claimed here: the claim of another before that
        self._givers: dict[int, str] = {}  # who gave a shard away last
        self._addresses: dict[str, str] = {}  # of all replicas that were ever announced
        self._store = store
        self._address = address
        self._first_epoch = first_epoch
        self._on_gained, self._on_leaving, self._on_lost = on_gained, on_leaving, on_lost
        self._on_changed = on_changed
        self._news = asyncio.Event()

    # ---------------------------------------------------------------------------------- life

    async def start(self) -> None:
        """Announce this replica and claim what nobody owns. Raises `MeshError` (STORE_FAILED); may be repeated."""
        await self._store.commit([Write(COUNT_KEY, b"%d" % DEFAULT_SHARDS, ABSENT)])
        entry = await self._store.get(COUNT_KEY)
        self.count = int(entry.value) if entry else DEFAULT_SHARDS
        await self._bury_predecessor()
        await self._store.announce(REPLICA_PREFIX + self.replica_id, self._address.encode())
        entries, self._revision = await self._store.scan(CLUSTER_PREFIX)
        for entry in entries:
            self._note(entry.key, entry.value, entry.revision)
        await self._act()

    async def run(self) -> None:
        """Follow the cluster, for ever."""
        following = asyncio.create_task(self._follow())
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                try:
                    await self._act()
                except MeshError as error:
                    log.warning("cannot settle who owns which shard, will try again", error=error.message)
                    await asyncio.sleep(RETRY_S)
                    self._news.set()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    def fenced(self, guard: Guard) -> None:
        """A write under `guard` was refused: that shard has another owner, whom the watch has yet to name."""
        for shard in list(self.owned.values()):
            if shard.guard == guard:
                self._lose(shard)
                self._on_changed()

    def owner_of(self, number: int) -> str:
        """The id of the replica that owns a shard, as far as is known here; empty when there is none."""
        shard = self.known.get(number)
        return shard.claim.owner if shard and shard.claim.owner in self.replicas else ""

    def taken_from(self, number: int) -> str:
        """How a shard of ours came from another replica, in words; empty when none is known to have had it."""
        before, giver = self._before.get(number), self._givers.get(number, "")
        if before is None or not (name := before.owner or giver):
            return ""
        verb = "took over from" if before.owner else "was given the room's shard by"
        where = f" at {self._addresses[name]}" if name in self._addresses else ""
        return f"{verb} replica {name}{where}, epoch {before.epoch}"

    # ---------------------------------------------------------------------------------- what the store says

    async def _bury_predecessor(self) -> None:
        """Whoever was announced at our address is dead: we listen there. No need to wait for its lease."""
        entries, _ = await self._store.scan(REPLICA_PREFIX)
        ours = self._address.encode()
        dead = [entry for entry in entries if entry.value == ours and entry.key != REPLICA_PREFIX + self.replica_id]
        self._addresses.update((entry.key.removeprefix(REPLICA_PREFIX), self._address) for entry in dead)
        if dead:
            await self._store.commit([Write(entry.key, None, entry.revision) for entry in dead[:MAX_WRITES]])

    async def _follow(self) -> None:
        changes = cast(AsyncGenerator[Changes], self._store.watch(CLUSTER_PREFIX, self._revision))
        async with aclosing(changes):
            async for batch in changes:
                if batch.snapshot:
                    self.replicas = {self.replica_id: self._address}
                for change in batch.changes:
                    self._note(change.key, change.value, change.revision)
                self._news.set()
                self._on_changed()

    def _note(self, key: str, value: bytes | None, revision: int) -> None:
        if key.startswith(REPLICA_PREFIX):
            name = key.removeprefix(REPLICA_PREFIX)
            if value is not None:
                self.replicas[name] = self._addresses[name] = value.decode()
            elif name != self.replica_id:  # our own comes back by itself
                self.replicas.pop(name, None)
        elif key.startswith(SHARD_PREFIX) and value is not None:
            number = int(key.removeprefix(SHARD_PREFIX), 16)
            earlier = self.known.get(number)
            if earlier is None or earlier.revision < revision:
                claim = msgspec.json.decode(value, type=Claim)
                if earlier and earlier.claim.owner and not claim.owner:
                    self._givers[number] = earlier.claim.owner
                self.known[number] = Shard(number, claim, revision)

    # ---------------------------------------------------------------------------------- what follows from it

    async def _act(self) -> None:
        """Let go of what others took, claim what is ours to have, give away what is not."""
        taken = [shard for shard in self.owned.values() if self.known[shard.number].revision > shard.revision]
        for shard in taken:
            self._lose(shard)
        if taken:
            self._on_changed()  # before anybody is answered for them
            log.warning("another replica has taken shards", shards=len(taken), owned=len(self.owned))
        owners = {number: shard.claim.owner for number, shard in self.known.items() if number < self.count}
        target = assign(owners, self.replicas, self.count)
        await self._claim([number for number, name in target.items() if name == self.replica_id])
        ours = {number for number, owner in owners.items() if owner == self.replica_id}
        if away := sorted(number for number in ours if target[number] != self.replica_id):
            await self._give_away(away)
        metrics.SHARDS_OWNED.set(len(self.owned))
        self._on_changed()

    async def _claim(self, numbers: list[int]) -> None:
        free = [number for number in numbers if number not in self.owned and not self.owner_of_other(number)]
        for first in range(0, len(free), MAX_WRITES):
            some = free[first : first + MAX_WRITES]
            writes = [self._claim_of(number) for number in some]
            outcomes = await self._store.commit(writes)
            for number, write, outcome in zip(some, writes, outcomes, strict=True):
                current = outcome.current
                if current:
                    self._note(current.key, current.value, current.revision)
                # a repeated commit finds the own value there
                if current and current.value == write.value:
                    await self._gain(self.known[number])
        if free:
            log.info("shards claimed", claimed=len(free), owned=len(self.owned), replicas=len(self.replicas))

    def owner_of_other(self, number: int) -> bool:
        """Whether another replica that is there owns the shard."""
        return self.owner_of(number) not in ("", self.replica_id)

    def _claim_of(self, number: int) -> Write:
        known = self.known.get(number)
        epoch = max(self._first_epoch, known.claim.epoch + 1 if known else 0)
        value = msgspec.json.encode(Claim(self.replica_id, epoch))
        owner = known.claim.owner if known else ""
        if known and owner != self.replica_id:
            self._before[number] = known.claim
        guard = Guard(REPLICA_PREFIX + owner, ABSENT) if owner and owner != self.replica_id else None
        return Write(shard_key(number), value, known.revision if known else ABSENT, guard)

    async def _gain(self, shard: Shard) -> None:
        await self._on_gained(shard)
        self.owned[shard.number] = shard

    async def _give_away(self, numbers: list[int]) -> None:
        for first in range(0, len(numbers), MAX_WRITES):
            leaving = [self.known[number] for number in numbers[first : first + MAX_WRITES]]
            served = [self.owned.pop(shard.number) for shard in leaving if shard.number in self.owned]
            self._on_changed()  # nobody shall ask us any more
            for shard in served:
                await self._on_leaving(shard)
            writes = [
                Write(shard_key(shard.number), msgspec.json.encode(Claim("", shard.claim.epoch)), shard.revision)
                for shard in leaving
            ]
            for outcome in await self._store.commit(writes):
                if outcome.current:
                    self._note(outcome.current.key, outcome.current.value, outcome.current.revision)
        log.info("shards given away", shards=len(numbers), owned=len(self.owned))

    def _lose(self, shard: Shard) -> None:
        self.owned.pop(shard.number, None)
        self._on_lost(shard)
