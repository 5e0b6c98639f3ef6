"""Embedding and head, shared out by tokens of the vocabulary.

Shape suffixes: T tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from common.dist.group import Group
from common.dist.parallel import Sharing
from common.ops.linear import Product


class Embedding:
    """Rows `first .. first + len - 1` of the table; the others are on the other ranks of `group`."""

    def __init__(self, table_VE: torch.Tensor, first: int, group: Group) -> None:
        self.table_VE = table_VE
        self.first = first
        self.group = group

    def __call__(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        if self.group.size == 1:
            return F.embedding(token_ids_T, self.table_VE)
        local_T = token_ids_T - self.first
        mine_T = (local_T >= 0) & (local_T < len(self.table_VE))
        x_TE = self.table_VE.new_zeros((len(token_ids_T), self.table_VE.shape[1]))
        x_TE[mine_T] = self.table_VE[local_T[mine_T]]
        return self.group.all_reduce(x_TE)


class Head:
    """Logits of this rank's part of the vocabulary, put together by its group; the last parts may be smaller."""

    def __init__(self, product: Product, vocab_size: int, sharing: Sharing) -> None:
        self.product = product
        self.vocab_size = vocab_size
        self.group = sharing.group
        self.whole = sharing.gather.around(self.join) if sharing.gather else self.join

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self.whole(x_TE)

    def join(self, x_TE: torch.Tensor) -> torch.Tensor:
        """Logits of tokens that all ranks have."""
        logits_TV = self.product(x_TE)
        if self.group.size == 1:
            return logits_TV
        most = -(-self.vocab_size // self.group.size)
        return self.group.all_gather(F.pad(logits_TV, (0, most - logits_TV.shape[1])))[:, : self.vocab_size]
