"""What a client sees of one sequence: tokens in, deltas of tokens and text out."""

from __future__ import annotations

from common.errors.base import MeshError, Reason
from common.text.detokenizer import Detokenizer
from common.text.stop import StopMatcher
from pdmesh.v1 import types_pb2
from pdmesh.v1.decode_service_pb2 import SequenceTokens
from services.router.request import Delta, GenerationRequest

RUNNING = types_pb2.FINISH_REASON_UNSPECIFIED
STOP = types_pb2.FINISH_REASON_STOP
ABORT = types_pb2.FINISH_REASON_ABORT


class SequenceOutput:
    """One sequence's output so far. Plain data and functions: no I/O, no clock.

    `finish` is set once the client's sequence is over, which a stop string may decide before the worker knows.
    """

    def __init__(self, request: GenerationRequest, index: int) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.cached_tokens = 0
        self.finish: types_pb2.FinishReason.ValueType = RUNNING
        self._min_new_tokens = request.sampling.min_new_tokens
        self._stop = StopMatcher(request.sampling.stop) if request.sampling.stop else None
        prompt = request.prompt_of(index)
        self._detokenizer = Detokenizer(request.tokenizer, prompt) if request.tokenizer else None

    @property
    def tokens(self) -> int:
        """How many there are so far."""
        return len(self.token_ids)

    def accept(self, news: SequenceTokens) -> Delta:
        """The delta that new tokens make. Raises `MeshError` (INTERNAL) if tokens were lost on the way."""
        if news.token_offset != self.tokens:
            message = f"expected token {self.tokens} of the sequence, got {news.token_offset}"
            raise MeshError(Reason.INTERNAL, message)
        self.cached_tokens = max(self.cached_tokens, news.cached_tokens)
        self.finish = news.finish_reason
        delta = Delta(self.index, list(news.token_ids), "", self.tokens, list(news.logprobs))
        if self._stop:
            self._add_text_with_stop(delta, self._stop)
        elif self._detokenizer:
            delta.text = self._detokenizer.feed(self._spoken(delta.token_ids))
            delta.text += self._detokenizer.flush() if self.finish else ""
        self.token_ids += delta.token_ids
        delta.finish = self.finish
        return delta

    def abort(self) -> Delta:
        """The last delta of a sequence that is given up: the text held back so far."""
        self.finish = ABORT
        delta = Delta(self.index, [], "", self.tokens, [], ABORT)
        if self._detokenizer:
            text = self._detokenizer.flush()
            delta.text = self._stop.feed(text) + self._stop.flush() if self._stop else text
        return delta

    def _spoken(self, ids: list[int]) -> list[int]:
        """The ids that have text: the token that ended the sequence has none."""
        return ids[:-1] if self.finish == STOP else ids

    def _add_text_with_stop(self, delta: Delta, stop: StopMatcher) -> None:
        """Token by token, so that the sequence ends with the very token that completes a stop string."""
        assert self._detokenizer is not None
        for count, token_id in enumerate(self._spoken(delta.token_ids), 1):
            text = self._detokenizer.feed([token_id])
            if self.tokens + count <= self._min_new_tokens:
                delta.text += text
                continue
            delta.text += stop.feed(text)
            if stop.matched is not None:
                delta.token_ids, delta.logprobs = delta.token_ids[:count], delta.logprobs[:count]
                delta.stop_reason, self.finish = stop.matched, STOP
                return
        if self.finish:
            delta.text += stop.feed(self._detokenizer.flush())
            delta.stop_reason = stop.matched
            delta.text += stop.flush()
