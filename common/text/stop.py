"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a stream of text right before the first stop string that is completed in it.

    Stop strings may span any number of pieces, so text that may still grow into one is held back. Of several
    matches the one that ends first wins, and of those the longest: the result does not depend on how the text
    was split into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take further text; returns what can be sent. Sets `matched` at a match, after which the rest is void."""
        if not self._stop or not piece or self.matched is not None:
            return piece if self.matched is None else ""
        text = self._held + piece
        matches = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if matches:
            _, start, self.matched = min(matches)
            self._held = ""
            return text[:start]
        keep = max(held_length(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text still held back. Call at the end of the sequence."""
        held, self._held = self._held, ""
        return held


def held_length(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
