"""What this router may still send to a decode worker. Plain data and functions: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common.mesh.credit import Credit


@dataclass(slots=True, eq=False)
class Spend:
    """Credit that a sequence took. It has a number from when the worker was told to start it."""

    pages: int
    number: int | None = None


class CreditAccount:
    """One worker's credit as published last, less what was spent since.

    The worker says with each figure which of this router's sequences it reflects; what it does not reflect yet is
    taken off here. So a sequence is counted once, by the worker or here, from the moment it is given credit until
    the worker tells that it has ended. What other routers spend is known when the worker publishes it: several
    routers together may overspend, and then rooms wait at the worker.
    """

    on_change: Callable[[Credit | None], None] | None = None

    def __init__(self) -> None:
        self._credit: Credit | None = None
        self._spends: set[Spend] = set()

    @property
    def credit(self) -> Credit | None:
        """What is left; None of a worker that publishes none: such a one takes what it gets."""
        return self._credit

    def _set(self, credit: Credit | None) -> None:
        self._credit = credit
        if self.on_change:
            self.on_change(credit)

    def publish(self, credit: Credit, last_start: int) -> None:
        """The worker's figure, which reflects our sequences up to number `last_start`."""
        self._spends = {spend for spend in self._spends if spend.number is None or spend.number > last_start}
        self._set(credit.less(sum(spend.pages for spend in self._spends), len(self._spends)))

    def forget(self) -> None:
        """The stream to the worker broke: it gives up what it was sent, and its figures mean nothing any more."""
        self._spends = {spend for spend in self._spends if spend.number is None}
        self._set(None)

    def spend(self, tokens: int, remaining: int) -> Spend:
        """Take credit for a sequence of `tokens` that may generate `remaining` more."""
        spend = Spend(self.credit.cost(tokens, remaining) if self.credit else 0)
        self._spends.add(spend)
        if self.credit:
            self._set(self.credit.less(spend.pages, 1))
        return spend

    def sent(self, spend: Spend, number: int) -> None:
        """The worker was told to start the sequence under `number`: from now on its figures decide."""
        spend.number = number

    def give_back(self, spend: Spend) -> None:
        """The sequence is not started after all. Idempotent, and without effect on one that was sent."""
        if spend.number is None and spend in self._spends:
            self._spends.discard(spend)
            if self.credit:
                self._set(self.credit.less(-spend.pages, -1))
