"""Text of a growing sequence, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from common.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_CHARACTER_BYTES = 4
WINDOW_TOKENS = 16  # decoded at once; trimmed to the newest CONTEXT_TOKENS when it is full
CONTEXT_TOKENS = 6


class Detokenizer:
    """Turns tokens into text as they come, in constant time for each.

    A token's text depends on its neighbours (spaces, characters that span tokens), so a short window of the
    newest tokens is decoded each time and what was not yet sent of it is given out: the offset method of
    Hugging Face's text-generation-inference and of vLLM's `detokenize_incrementally`. A character whose bytes
    are not all there decodes to U+FFFD at the window's end and is held back until it is whole, until no further
    byte can complete it, or until `flush`.

    `prompt_ids` gives the first token its left neighbours, so that prompt and text join as they should.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = [i for i in prompt_ids[-CONTEXT_TOKENS:] if i not in tokenizer.special_ids]
        self._text = tokenizer.decode(self._window)
        self._sent = len(self._text)
        self._tokens_held = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take further tokens; returns the text that became certain, often empty. Special tokens have no text."""
        new = [i for i in token_ids if i not in self._tokenizer.special_ids]
        if not new:
            return ""
        if len(self._window) > (2 if self._tokens_held else 1) * WINDOW_TOKENS:
            self._trim()
        self._window += new
        self._text = self._tokenizer.decode(self._window)
        held = len(self._text) - len(self._text.rstrip(REPLACEMENT))
        self._tokens_held = self._tokens_held + len(new) if held else 0
        if self._tokens_held > MAX_CHARACTER_BYTES:
            held = min(held, 1)  # a token has at least one byte: only the last character can still become whole
        end = max(self._sent, len(self._text) - held)
        text, self._sent = self._text[self._sent : end], end
        return text

    def flush(self) -> str:
        """The text still held back: an unfinished character becomes U+FFFD. Call at the end of the sequence."""
        text, self._sent = self._text[self._sent :], len(self._text)
        return text

    def _trim(self) -> None:
        """Forget old tokens, at a place where no character is cut and some sent text stays on its right.

        Otherwise a decoder would take the rest for broken, or for the start of a text. With endless broken
        bytes there is no such place, and the window is cut anyhow once it is long.
        """
        unsent = len(self._text) - self._sent
        for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_CHARACTER_BYTES):
            window = self._window[-size:]
            text = self._tokenizer.decode(window)
            fits = self._text.endswith(text) or len(self._window) > 4 * WINDOW_TOKENS
            if fits and len(text) > unsent:
                self._window, self._text, self._sent = window, text, len(text) - unsent
                return
