"""Credit: KV pages and places that a decode worker can still promise, and what a sequence takes of it.

The worker and the router must count alike, so the arithmetic stands here once. Plain functions over plain data.
"""

from __future__ import annotations

import msgspec


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """What a worker can still promise.

    Attributes:
        pages: Pages below the high-water mark that nobody holds, was promised or may soon grow into.
        sequences: Places in the running batch that nobody has or waits for.
        limit_pages: The high-water mark, in pages; `pages` of a worker that has nothing to do.
        reserved_tokens: Growth that is counted for each sequence, at most.
        page_size: Tokens of a page.
    """

    pages: int
    sequences: int
    limit_pages: int
    reserved_tokens: int
    page_size: int

    @property
    def untouched(self) -> bool:
        """Whether the worker has promised nothing and holds nothing back."""
        return self.pages >= self.limit_pages

    def less(self, pages: int, sequences: int) -> Credit:
        """What is left when more is promised."""
        return msgspec.structs.replace(self, pages=self.pages - pages, sequences=self.sequences - sequences)

    def cost(self, tokens: int, remaining: int) -> int:
        """Pages that a sequence takes here; see `promised_pages`."""
        return promised_pages(tokens, remaining, self.reserved_tokens, self.page_size)

    def fits(self, cost_pages: int) -> bool:
        """Whether one sequence more may be promised `cost_pages`.

        One that is larger than the mark gets a worker to itself: else it could run nowhere.
        """
        return self.sequences > 0 and (cost_pages <= self.pages or self.untouched)


def promised_pages(tokens: int, remaining: int, reserved_tokens: int, page_size: int) -> int:
    """Pages of a sequence that has `tokens` and may generate `remaining` more, `reserved_tokens` of them counted.

    The last token's KV is never computed.
    """
    growth = min(remaining, reserved_tokens)
    return -(-max(tokens, tokens + growth - 1) // page_size)


def most_pages(tokens: int, remaining: int, page_size: int) -> int:
    """Pages of that sequence at its end."""
    return promised_pages(tokens, remaining, remaining, page_size)
