"""How the ranks of a worker share a model out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from common.config.flags import bad
from common.dist.dispatch.base import ExpertDispatch
from common.dist.gather import TokenGather
from common.dist.group import ALONE, Group

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sharing:
    """Ranks that compute a layer together, each a part.

    Attributes:
        group: The ranks.
        gather: Brings their tokens together; None where they have the same ones.
    """

    group: Group = ALONE
    gather: TokenGather | None = None

    def whole(self, part: Product) -> Product:
        """From a rank's part to the layer: this rank's tokens in, the sum of all parts out."""
        summed = part if self.group is ALONE else lambda x: self.group.all_reduce(part(x))
        return summed if self.gather is None else self.gather.around(summed)


@dataclass(frozen=True)
class Parallel:
    """Which ranks share what.

    Attributes:
        attention: Shares the heads; these ranks have the same tokens.
        dense: Shares the feed-forward blocks that every token goes through.
        experts: Shares the routed experts.
        own_experts: Each rank of `experts` has some experts whole, rather than a part of each.
        dispatch: Brings tokens to the owners of their experts, instead of `experts.gather`.
        embedding: Shares the embedding; these ranks have the same tokens.
        head: Shares the head.
    """

    attention: Sharing = field(default_factory=Sharing)
    dense: Sharing = field(default_factory=Sharing)
    experts: Sharing = field(default_factory=Sharing)
    own_experts: bool = False
    dispatch: ExpertDispatch | None = None
    embedding: Sharing = field(default_factory=Sharing)
    head: Sharing = field(default_factory=Sharing)

    @property
    def gathers(self) -> bool:
        """Whether some layer gathers the tokens of ranks that have different ones."""
        return self.dense.gather is not None or self.experts.gather is not None


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
