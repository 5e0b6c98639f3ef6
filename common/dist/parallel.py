"""How the ranks of a worker share a model out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from common.config.flags import bad
from common.dist.dispatch.base import ExpertDispatch
from common.dist.gather import TokenGather
from common.dist.group import ALONE, Group
from common.dist.padding import plan_padding
from common.kvcache.reshard import cut_layers

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
class Stage:
    """One of the stages that a model's layers are cut into, of a pipeline."""

    number: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def layers(self, num_layers: int) -> range:
        """Numbers of this stage's layers in the whole model. Raises `MeshError` (BAD_CONFIG) if there are too few."""
        try:
            return range(*cut_layers(num_layers, self.count)[self.number])
        except ValueError as error:
            raise bad(f"--pp-size: {error}") from None


ONLY_STAGE = Stage()


@dataclass(frozen=True)
class Parallel:
    """Which ranks share what. All but the stage is about the ranks of one stage.

    Attributes:
        stage: Layers that these ranks have.
        attention: Shares the heads; these ranks have the same tokens.
        dense: Shares the feed-forward blocks that every token goes through.
        experts: Shares the routed experts.
        own_experts: Each rank of `experts` has some experts whole, rather than a part of each.
        dispatch: Brings tokens to the owners of their experts, instead of `experts.gather`.
        embedding: Shares the embedding; these ranks have the same tokens.
        head: Shares the head.
    """

    stage: Stage = ONLY_STAGE
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

    def begin_step(self, tokens: Sequence[int], wanted: Sequence[int], mixed: bool) -> None:
        """Say what each data-parallel rank has in the step that follows; all ranks must say the same.

        Args:
            tokens: Tokens of each.
            wanted: Tokens of each whose logits are wanted.
            mixed: Some rank computes a prompt.
        """
        for gather in (self.dense.gather, self.experts.gather):
            if gather is not None:
                gather.begin_step(plan_padding(tokens, gathers=True, mixed=mixed))
        if self.head.gather is not None:
            self.head.gather.begin_step(plan_padding(wanted, gathers=True, mixed=mixed))
        if self.dispatch is not None:
            self.dispatch.begin_step(max(tokens))


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
