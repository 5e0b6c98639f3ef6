"""Which replica should own which shard: a plain function of what every replica sees alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping


def assign(owners: Mapping[int, str], replicas: Collection[str], shards: int) -> dict[int, str]:
    """Shares the shards out so that no two replicas differ by more than one, and moves as few as that takes.

    `owners` is who has them now; replicas that are not there any more, and shards without an owner, do no harm.
    Empty without replicas. All who see the same give the same answer, whatever the order of what they see.
    """
    if not replicas:
        return {}
    names = sorted(replicas)
    held: dict[str, list[int]] = {name: [] for name in names}
    for shard in range(shards):
        if (owner := owners.get(shard, "")) in held:
            held[owner].append(shard)
    least, larger = divmod(shards, len(names))
    # those who have most keep the larger shares: fewer shards move
    by_size = sorted(names, key=lambda name: (-len(held[name]), name))
    quota = {name: least + (place < larger) for place, name in enumerate(by_size)}
    target = {shard: name for name in names for shard in held[name][: quota[name]]}
    vacant = iter([shard for shard in range(shards) if shard not in target])
    for name in names:
        for _ in range(quota[name] - min(quota[name], len(held[name]))):
            target[next(vacant)] = name
    return target
