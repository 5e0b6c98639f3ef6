"""Which shard a request and its rooms belong to, and which session leads to the shard's owner."""

from __future__ import annotations

import zlib
from collections.abc import Hashable
from typing import Generic, TypeVar

from pdmesh.v1 import bootstrap_service_pb2 as pb

Link = TypeVar("Link", bound=Hashable)


def shard_of_request(request_id: str, shards: int) -> int:
    """All rooms of a request are in one shard, so that opening one again finds it wherever the shard has moved."""
    return zlib.crc32(request_id.encode()) % shards


def new_room_id(epoch: int, name: str, shard: int) -> str:
    """A name that no other room bears: `name` is one that whoever opens rooms in this epoch has not given before."""
    return f"{epoch:x}-{name}-{shard:x}"


def shard_of_room(name: str) -> int:
    """The shard that `new_room_id` wrote into the name; -1, which is nobody's, for any other name."""
    try:
        return int(name.rpartition("-")[2], 16)
    except ValueError:
        return -1


class Owners(Generic[Link]):
    """Whose word counts on which shard, as the replicas themselves tell over their sessions.

    Of two claims the one with the higher epoch holds. A replica that was paused and still takes itself for the owner
    is thereby not listened to once its successor has spoken.
    """

    def __init__(self) -> None:
        self.shards = 0
        self._epochs: dict[int, int] = {}
        self._owners: dict[int, Link] = {}

    def told(self, link: Link, ownership: pb.Ownership) -> list[int]:
        """Take note of what the replica at `link` owns; returns the shards that it did not own before."""
        self.shards = ownership.shards
        claimed = {owned.shard: owned.epoch for owned in ownership.owned}
        for shard in [shard for shard, owner in self._owners.items() if owner == link and shard not in claimed]:
            del self._owners[shard]
        gained = []
        for shard, epoch in claimed.items():
            if epoch < self._epochs.get(shard, 0):
                continue
            if epoch > self._epochs.get(shard, 0) or self._owners.get(shard) != link:
                gained.append(shard)
            self._epochs[shard], self._owners[shard] = epoch, link
        return gained

    def lost(self, link: Link) -> None:
        """The session broke: its shards have no owner until somebody tells again."""
        self._owners = {shard: owner for shard, owner in self._owners.items() if owner != link}

    def of(self, shard: int) -> Link | None:
        """The session with the shard's owner; None while there is none."""
        return self._owners.get(shard)

    def epoch(self, shard: int) -> int:
        """The epoch of the highest claim on a shard; 0 before there was one."""
        return self._epochs.get(shard, 0)

    def of_room(self, name: str) -> Link | None:
        return self._owners.get(shard_of_room(name))

    def of_request(self, request_id: str) -> Link | None:
        return self._owners.get(shard_of_request(request_id, self.shards)) if self.shards else None
