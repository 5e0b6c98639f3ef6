"""Log-probabilities as OpenAI's two APIs write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.text.tokenizer import Tokenizer
from pdmesh.v1.types_pb2 import TokenLogprob, TokenLogprobs

LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON does not have


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token alone as text; a part of a character shows as U+FFFD."""
    return tokenizer.token_bytes(token_id).decode(errors="replace") if tokenizer else f"token_id:{token_id}"


def chat_logprobs(tokenizer: Tokenizer | None, entries: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}]}`."""

    def one(entry: TokenLogprob) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes(entry.token_id)) if tokenizer else None
        text = token_text(tokenizer, entry.token_id)
        return {"token": text, "logprob": max(entry.logprob, LEAST), "bytes": raw}

    content = [{**one(entry.chosen), "top_logprobs": [one(top) for top in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer | None, entries: Iterable[TokenLogprobs], offset: int
) -> tuple[dict[str, Any], int]:
    """`{tokens, token_logprobs, top_logprobs, text_offset}` and the offset behind the last token.

    `offset` is where the first token's text begins in the answer's text.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for entry in entries:
        text = token_text(tokenizer, entry.chosen.token_id)
        tokens.append(text)
        logprobs.append(max(entry.chosen.logprob, LEAST))
        candidates = (*entry.top, entry.chosen)
        tops.append({token_text(tokenizer, one.token_id): max(one.logprob, LEAST) for one in candidates})
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}, offset
