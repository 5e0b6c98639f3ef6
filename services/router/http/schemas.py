"""What OpenAI's clients send, with the extra fields of vLLM and SGLang. Unknown fields are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Schema(BaseModel):
    """Strict: a number in quotes is not a number."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Schema):
    """How to stream."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")


class CommonRequest(Schema):
    """Fields that completions and chat share; null means unset."""

    model: str | None = Field(None, description="Served model; may be left out when there is one alone.")
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = Field(None, description="Not supported.")
    user: str | None = None
    # as vLLM and SGLang have them
    top_k: int | None = Field(None, description="-1 or 0 keeps all tokens.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None


class CompletionRequest(CommonRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = Field(None, description="Not supported.")
    best_of: int | None = Field(None, description="Only equal to n.")
    echo: bool | None = None
    logprobs: int | None = None


class TextPart(BaseModel):
    """A part of a message's content. Other types than text are not supported."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message; fields beside these reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None


class ResponseFormat(BaseModel):
    """Only `{"type": "text"}` is supported."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str


class ChatRequest(CommonRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = Field(None, description="Not supported.")
    # as vLLM and SGLang have them
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
