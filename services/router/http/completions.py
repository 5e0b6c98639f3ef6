"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from common.errors.base import MeshError, Reason
from pdmesh.v1 import types_pb2
from services.router.http.answer import Answer, Json, Shape, usage_json
from services.router.http.logprobs import completion_logprobs
from services.router.http.parameters import NAMES, check_common, sampling_from, unsupported
from services.router.http.schemas import CompletionRequest
from services.router.request import Delta, Draft, GenerationRequest, Usage
from services.router.router import Router

DEFAULT_MAX_TOKENS = 16  # as OpenAI documents it

FINISH = {
    types_pb2.FINISH_REASON_UNSPECIFIED: None,
    types_pb2.FINISH_REASON_STOP: "stop",
    types_pb2.FINISH_REASON_LENGTH: "length",
    types_pb2.FINISH_REASON_ABORT: "abort",
}


async def complete(router: Router, body: CompletionRequest, request_id: str) -> Answer:
    """Check and answer. Raises `MeshError`."""
    check(body)
    draft = Draft(
        request_id=request_id,
        api="completions",
        model=body.model or "",
        prompts=prompts_of(body),
        sampling=sampling_from(body, body.max_tokens, body.logprobs),
        default_max_new_tokens=DEFAULT_MAX_TOKENS,
        names=NAMES,
    )
    request = await router.prepare(draft)
    echo = [echoed(prompt, request, index) for index, prompt in enumerate(draft.prompts)] if body.echo else []
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return Answer(router, request, CompletionShape(request, echo), bool(body.stream), usage)


def check(body: CompletionRequest) -> None:
    check_common(body)
    if body.suffix:
        raise unsupported("suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported("best_of", "is supported only when it equals n")
    if body.echo and body.logprobs is not None:
        raise unsupported("echo", "together with logprobs is not supported")


def prompts_of(body: CompletionRequest) -> Sequence[str | Sequence[int]]:
    """One or several prompts, each text or token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise MeshError(Reason.EMPTY_PROMPT, "prompt is empty", parameter="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def echoed(prompt: str | Sequence[int], request: GenerationRequest, index: int) -> str:
    if isinstance(prompt, str):
        return prompt
    if request.tokenizer is None:
        raise unsupported("echo", "needs a tokenizer, which the model does not have")
    return request.tokenizer.decode(request.prompts[index])


class CompletionShape(Shape):
    """`text_completion` objects. `echo` holds the text to put before each prompt's answers, or nothing."""

    def __init__(self, request: GenerationRequest, echo: list[str]) -> None:
        self._request = request
        self._created = int(time.time())
        before = [echo[index // request.sampling.n] if echo else "" for index in range(request.sequences)]
        self._before = before
        self._offsets = [len(text) for text in before]

    def chunks(self, delta: Delta) -> Iterable[Json]:
        before, self._before[delta.index] = self._before[delta.index], ""
        delta.text = before + delta.text
        if delta.text or delta.logprobs or delta.finish:
            yield self._object([self._choice(delta)])

    def usage_chunk(self, usage: Usage) -> Json:
        return self._object([]) | {"usage": usage_json(usage)}

    def whole(self, deltas: list[list[Delta]], usage: Usage) -> Json:
        choices = [self._choice(joined(pieces)) for pieces in deltas]
        for choice in choices:
            choice["text"] = self._before[choice["index"]] + choice["text"]
        return self._object(choices) | {"usage": usage_json(usage)}

    def _choice(self, delta: Delta) -> Json:
        logprobs = None
        if self._request.sampling.logprobs is not None:
            offset = self._offsets[delta.index]
            logprobs, offset = completion_logprobs(self._request.tokenizer, delta.logprobs, offset)
            self._offsets[delta.index] = offset
        choice: Json = {"index": delta.index, "text": delta.text, "logprobs": logprobs}
        return choice | {"finish_reason": FINISH[delta.finish], "stop_reason": delta.stop_reason}

    def _object(self, choices: list[Json]) -> Json:
        return {
            "id": self._request.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": self._request.model.name,
            "choices": choices,
        }


def joined(deltas: list[Delta]) -> Delta:
    """All deltas of a sequence as one."""
    last = deltas[-1]
    return Delta(
        index=last.index,
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        text="".join(delta.text for delta in deltas),
        token_offset=0,
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        finish=last.finish,
        stop_reason=last.stop_reason,
    )
