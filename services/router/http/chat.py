"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from common.errors.base import MeshError, Reason
from services.router.http.answer import Answer, Json, Shape, usage_json
from services.router.http.completions import FINISH, joined
from services.router.http.logprobs import chat_logprobs
from services.router.http.parameters import NAMES, check_common, sampling_from, unsupported
from services.router.http.schemas import ChatMessage, ChatRequest
from services.router.request import Delta, Draft, GenerationRequest, Usage
from services.router.router import Router

CHAT_NAMES = NAMES | {"prompt": "messages", "logprobs": "top_logprobs"}
NEWER_NAMES = CHAT_NAMES | {"max_new_tokens": "max_completion_tokens"}


async def chat(router: Router, body: ChatRequest, request_id: str) -> Answer:
    """Check and answer. Raises `MeshError`."""
    check(body)
    newer = body.max_completion_tokens is not None
    max_new_tokens = body.max_completion_tokens if newer else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    draft = Draft(
        request_id=request_id,
        api="chat",
        model=body.model or "",
        prompts=[await render(router, body)],
        sampling=sampling_from(body, max_new_tokens, logprobs),
        default_max_new_tokens=None,
        add_special_tokens=False,
        names=NEWER_NAMES if newer else CHAT_NAMES,
    )
    request = await router.prepare(draft)
    usage = bool(body.stream_options and body.stream_options.include_usage)
    return Answer(router, request, ChatShape(request), bool(body.stream), usage)


def check(body: ChatRequest) -> None:
    check_common(body)
    if body.tools and body.tool_choice != "none":
        raise unsupported("tools")
    if body.functions:
        raise unsupported("functions")
    if body.response_format is not None and body.response_format.type != "text":
        raise unsupported("response_format", f"of type {body.response_format.type!r} is not supported")
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs is only allowed when logprobs is true"
        raise MeshError(Reason.INVALID_PARAMETER, message, parameter="top_logprobs")


async def render(router: Router, body: ChatRequest) -> str:
    """The conversation as a prompt, by the model's chat template."""
    if not body.messages:
        raise MeshError(Reason.EMPTY_PROMPT, "messages is empty", parameter="messages")
    texts = await router.directory.texts(router.directory.get(body.model or ""))
    return texts.need_template().render(
        [to_template(message) for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=body.chat_template_kwargs,
    )


def to_template(message: ChatMessage) -> dict[str, Any]:
    """A message as templates know it: parts of text joined to one."""
    fields = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text":
                raise unsupported("messages", f"hold content of type {part.type!r}, which is not supported")
        fields["content"] = "".join(part.text or "" for part in message.content)
    elif message.content is None:
        fields["content"] = ""
    return fields


class ChatShape(Shape):
    """`chat.completion` objects and `chat.completion.chunk` ones."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._created = int(time.time())
        self._greeted = [False] * request.sequences

    def chunks(self, delta: Delta) -> Iterable[Json]:
        if not self._greeted[delta.index]:
            self._greeted[delta.index] = True
            yield self._chunk(delta.index, {"role": "assistant", "content": ""}, None, None)
        logprobs = self._logprobs(delta) if delta.logprobs else None
        if delta.text or logprobs or delta.finish:
            content = {"content": delta.text} if delta.text or logprobs else {}
            yield self._chunk(delta.index, content, logprobs, delta)

    def usage_chunk(self, usage: Usage) -> Json:
        return self._object("chat.completion.chunk", []) | {"usage": usage_json(usage)}

    def whole(self, deltas: list[list[Delta]], usage: Usage) -> Json:
        choices = [self._choice(joined(pieces)) for pieces in deltas]
        return self._object("chat.completion", choices) | {"usage": usage_json(usage)}

    def _choice(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta),
            "finish_reason": FINISH[delta.finish],
            "stop_reason": delta.stop_reason,
        }

    def _chunk(self, index: int, content: Json, logprobs: Json | None, delta: Delta | None) -> Json:
        finish = FINISH[delta.finish] if delta else None
        choice = {"index": index, "delta": content, "logprobs": logprobs, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def _logprobs(self, delta: Delta) -> Json | None:
        if self._request.sampling.logprobs is None:
            return None
        return chat_logprobs(self._request.tokenizer, delta.logprobs)

    def _object(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._request.request_id,
            "object": kind,
            "created": self._created,
            "model": self._request.model.name,
            "choices": choices,
        }
