"""Which ranks of a worker do what together: from sizes to groups.

With `tp_size` ranks and `dp_size` data-parallel ones, `tp_size / dp_size` consecutive ranks share the heads of the same
tokens. The other layers are shared by all ranks, which then gather each other's tokens, or by none; experts may be
owned whole, and their tokens dispatched.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config.flags import bad
from common.dist.dispatch.base import ExpertDispatch
from common.dist.dispatch.modes import SplitDispatch
from common.dist.gather import TokenGather
from common.dist.group import Group
from common.dist.parallel import ONLY_STAGE, Parallel, Sharing, Stage


@dataclass(frozen=True)
class Layout:
    """The ranks of one stage of a worker; names and meaning are SGLang's.

    Attributes:
        tp_size: Ranks.
        dp_size: Data-parallel ranks of attention.
        ep_size: Ranks that own the experts: all, or 1 where all have a part of each.
        moe_dense_tp_size: Ranks that share dense layers: 1, or None for all.
        dp_lm_head: The head is shared by the ranks that have the same tokens.
    """

    tp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    moe_dense_tp_size: int | None = None
    dp_lm_head: bool = False

    def __post_init__(self) -> None:
        if self.tp_size % self.dp_size:
            raise bad(f"--dp-size: {self.tp_size} ranks (--tp-size) are not {self.dp_size} equal parts")
        if self.ep_size not in (1, self.tp_size):
            raise bad(f"--ep-size: {self.ep_size} is neither 1 nor --tp-size {self.tp_size}")
        if self.moe_dense_tp_size not in (None, 1):
            raise bad(f"--moe-dense-tp-size: {self.moe_dense_tp_size} is not 1; leave it out for all ranks")
        if self.dp_lm_head and self.dp_size == 1:
            raise bad("--enable-dp-lm-head: there is no data parallelism (--dp-size)")

    @property
    def attention_size(self) -> int:
        """Ranks that have the same tokens."""
        return self.tp_size // self.dp_size

    def attention_ranks(self) -> list[list[int]]:
        """Which ranks have the same tokens."""
        size = self.attention_size
        return [list(range(first, first + size)) for first in range(0, self.tp_size, size)]

    def peer_ranks(self) -> list[list[int]]:
        """Which ranks have all tokens together, one of each data-parallel rank."""
        return [list(range(first, self.tp_size, self.attention_size)) for first in range(self.attention_size)]


def make_parallel(
    layout: Layout, world: Group, dispatch: ExpertDispatch | None = None, stage: Stage = ONLY_STAGE
) -> Parallel:
    """This rank's part of a layout for the ranks of `world`. With `dispatch` tokens travel to their experts' owners.

    All ranks call it at once, as making a group is an exchange of all ranks.

    Raises:
        MeshError: BAD_CONFIG for a dispatch without owners.
    """
    if dispatch is not None and layout.ep_size != layout.tp_size:
        raise bad(f"expert dispatch wants --ep-size {layout.ep_size} to be --tp-size {layout.tp_size}")
    if world.size != layout.tp_size:
        raise ValueError(f"{world.size} ranks are not the layout's {layout.tp_size}")
    attention, peers = Sharing(world.subgroup(layout.attention_ranks())), world.subgroup(layout.peer_ranks())
    data_parallel = layout.dp_size > 1
    if dispatch is not None and layout.attention_size > 1:
        dispatch = SplitDispatch(dispatch, attention.group)
    gather = TokenGather(peers) if data_parallel else None
    return Parallel(
        stage=stage,
        attention=attention,
        dense=Sharing() if layout.moe_dense_tp_size == 1 else Sharing(world, gather),
        experts=Sharing(world, None if dispatch else gather),
        own_experts=layout.ep_size > 1,
        dispatch=dispatch,
        embedding=attention,
        # It sees fewer rows than the layers: those whose logits are wanted.
        head=attention if layout.dp_lm_head else Sharing(world, TokenGather(peers) if data_parallel else None),
    )
