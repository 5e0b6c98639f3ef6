"""How the ranks of a worker share a model out."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.flags import bad
from common.dist.dispatch.base import ExpertDispatch
from common.dist.group import ALONE, Group


@dataclass(frozen=True)
class Parallel:
    """Which ranks share what. Within a group the tokens are the same on every rank, but for `dispatch`.

    Attributes:
        attention: Shares the heads out.
        dense: Shares the feed-forward blocks that every token goes through out.
        experts: Shares the routed experts out.
        own_experts: Each rank of `experts` has some experts whole, rather than a part of each.
        dispatch: Brings tokens to the owners of their experts, where ranks of `experts` have tokens of their own.
        vocabulary: Shares the embedding and the head out.
    """

    attention: Group = ALONE
    dense: Group = ALONE
    experts: Group = ALONE
    own_experts: bool = False
    dispatch: ExpertDispatch | None = None
    vocabulary: Group = ALONE

    @classmethod
    def tensor(cls, group: Group, own_experts: bool = False) -> Parallel:
        """Tensor parallelism: one group shares everything."""
        return cls(group, group, group, own_experts, vocabulary=group)

    @classmethod
    def data(cls, group: Group, dispatch: ExpertDispatch) -> Parallel:
        """Data-parallel attention, dense blocks and head, expert parallelism: only tokens for experts travel."""
        return cls(experts=group, own_experts=True, dispatch=dispatch)


NOT_PARALLEL = Parallel()


def share(what: str, total: int, group: Group) -> slice:
    """The part of `total` that is this rank's. Raises `MeshError` (BAD_CONFIG) if the parts would not be equal."""
    if total % group.size:
        raise bad(f"{group.size} ranks cannot share {total} {what}")
    size = total // group.size
    return slice(group.rank * size, (group.rank + 1) * size)


def share_kv_heads(total: int, group: Group) -> slice:
    """The key/value heads that this rank's query heads read; with more ranks than heads, several ranks have one."""
    if total >= group.size:
        return share("key/value heads", total, group)
    if group.size % total:
        raise bad(f"{group.size} ranks cannot share {total} key/value heads")
    first = group.rank * total // group.size
    return slice(first, first + 1)


def share_padded(total: int, group: Group) -> slice:
    """Like `share`, but the last parts may be smaller, or empty."""
    size = -(-total // group.size)
    return slice(min(group.rank * size, total), min((group.rank + 1) * size, total))
