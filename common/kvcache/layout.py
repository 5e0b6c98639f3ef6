"""The shape of a page of KV cache."""

from __future__ import annotations

import msgspec

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PLANES = {"mha": 2, "mla": 1}


class KvLayout(msgspec.Struct, frozen=True):
    """One page holds `page_size` tokens of all layers: `[num_layers, planes, num_kv_heads, page_size, head_dim]`.

    A page is one piece of memory, so that a hand-over moves few, large pieces and consecutive pages
    make one. Within a layer a head's tokens are one piece, which attention reads and a hand-over between
    different numbers of ranks may cut. Two workers pair only when their layouts are equal.

    The kind "mha" keeps two planes, the keys and the values of each head. The kind "mla", multi-head latent
    attention, keeps one plane with one head: what all heads' keys and values are made of, the latent vector and
    behind it the rotated key part, `head_dim` elements together.
    """

    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    kind: str = "mha"

    @property
    def planes(self) -> int:
        """What is kept of each token, layer and head: a key and a value, or a latent alone."""
        return PLANES[self.kind]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all layers and planes."""
        elements = self.num_layers * self.planes * self.page_size * self.num_kv_heads * self.head_dim
        return elements * ELEMENT_BYTES[self.dtype]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)
