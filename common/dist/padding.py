"""The padding plan: with how many rows each data-parallel rank computes a step, from what all of them have.

Rows that nobody needs cost most where they travel: a token that is dispatched to its experts needs no other rank's
batch to be as long as its own. Only where ranks gather each other's tokens must they agree on a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PaddingPlan:
    """One step's shapes, the same on every rank.

    Attributes:
        tokens: Tokens of each rank.
        rows: Rows that each rank computes: its tokens and its padding.
        gathered: Rows of the tensor that every rank gathers; 0 where none does.
        even: The parts of that tensor are equally long, so that a plain all-gather makes it; else they are `rows`.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    gathered: int
    even: bool

    def part(self, rank: int) -> slice:
        """Where a rank's own tokens are in the gathered tensor."""
        first = rank * self.rows[rank] if self.even else sum(self.rows[:rank])
        return slice(first, first + self.tokens[rank])


def plan_padding(
    tokens: Sequence[int], *, gathers: bool, mixed: bool = False, align: int = 1, graphs: Sequence[int] = ()
) -> PaddingPlan:
    """The plan of a step.

    Without a gather a rank's rows are its own tokens. With one they are the most that a rank has; but in a `mixed`
    step, where prompts make ranks uneven, nobody is padded and the parts are as long as they are.

    Args:
        tokens: Tokens of each rank in this step.
        gathers: Some layer gathers the tokens of all ranks.
        mixed: Some rank computes a prompt.
        align: Rows are a multiple of it.
        graphs: Sizes of captured graphs, ascending: a step that fits one computes as many rows. A rank without tokens
            computes none, unless it must gather.
    """
    if not gathers:
        rows = tuple(bucket(count, align, graphs) if count else 0 for count in tokens)
        return PaddingPlan(tuple(tokens), rows, 0, False)
    if mixed:
        rows = tuple(bucket(count, align) for count in tokens)
        return PaddingPlan(tuple(tokens), rows, sum(rows), False)
    most = bucket(max(tokens), align, graphs)
    return PaddingPlan(tuple(tokens), (most,) * len(tokens), most * len(tokens), True)


def bucket(count: int, align: int, graphs: Sequence[int] = ()) -> int:
    """`count` rounded up to the next graph, or, beyond the largest, to a multiple of `align`."""
    aligned = -(-count // align) * align
    return next((size for size in graphs if size >= aligned), aligned)
