"""Extents: runs of consecutive pages as `(first_page, page_count)`. Page lists travel and are stored as these."""

from __future__ import annotations

from collections.abc import Iterable

Extent = tuple[int, int]


def to_extents(pages: Iterable[int]) -> tuple[Extent, ...]:
    """The runs of consecutive pages in a page list, in the list's order."""
    extents: list[Extent] = []
    first = count = 0
    for page in pages:
        if count and page == first + count:
            count += 1
            continue
        if count:
            extents.append((first, count))
        first, count = page, 1
    if count:
        extents.append((first, count))
    return tuple(extents)


def from_extents(extents: Iterable[Extent]) -> list[int]:
    """The page list that `to_extents` was given."""
    return [page for first, count in extents for page in range(first, first + count)]
