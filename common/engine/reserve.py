"""How much growth is counted for each sequence before more work is taken."""

from __future__ import annotations

MOST_CAUTION_TOKENS = 512


class Reserve:
    """The configured reserve, and more of it for a while after sequences had to be retracted.

    Without that, a pool whose sequences grow beyond the reserve would take the retracted ones back at once, only
    to retract again. Each retraction doubles the caution, each step without one takes a token off it: like
    SGLang's new-token ratio, which jumps and decays.
    """

    def __init__(self, configured_tokens: int, page_size: int) -> None:
        self._configured_tokens = configured_tokens
        self._least_caution = 2 * page_size
        self._caution_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens of growth to count for each sequence, at most."""
        return self._configured_tokens + self._caution_tokens

    def stepped(self, retracted: int) -> None:
        """A step was planned, and so many sequences gave their pages back for it."""
        if retracted:
            self._caution_tokens = min(MOST_CAUTION_TOKENS, max(self._least_caution, 2 * self._caution_tokens))
        elif self._caution_tokens:
            self._caution_tokens -= 1
