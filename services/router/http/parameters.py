"""From OpenAI's fields to sampling parameters."""

from __future__ import annotations

from typing import Any

from common.errors.base import MeshError, Reason
from services.router.http.schemas import CommonRequest
from services.router.request import Sampling

NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "request_id": "X-Request-Id"}
RENAMED = {"min_tokens": "min_new_tokens"}
TAKEN_OVER = (
    "temperature",
    "top_p",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
)


def sampling_from(body: CommonRequest, max_new_tokens: int | None, logprobs: int | None) -> Sampling:
    """Fields that are unset or null keep our defaults, which are OpenAI's."""
    values: dict[str, Any] = {
        RENAMED.get(name, name): value for name in TAKEN_OVER if (value := getattr(body, name)) is not None
    }
    if body.top_k is not None:
        values["top_k"] = 0 if body.top_k == -1 else body.top_k
    if body.seed is not None:
        values["seed"] = body.seed + (1 << 64) if -(1 << 63) <= body.seed < 0 else body.seed
    if body.stop is not None:
        values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    values["stop_token_ids"] = tuple(body.stop_token_ids or ())
    return Sampling(max_new_tokens=max_new_tokens, logprobs=logprobs, **values)


def check_common(body: CommonRequest) -> None:
    """Refuse what would otherwise be ignored in silence. Raises `MeshError`."""
    if body.logit_bias:
        raise unsupported("logit_bias")
    if body.stream_options is not None and not body.stream:
        message = "stream_options is only allowed when stream is true"
        raise MeshError(Reason.INVALID_PARAMETER, message, parameter="stream_options")


def unsupported(parameter: str, detail: str = "is not supported") -> MeshError:
    return MeshError(Reason.UNSUPPORTED, f"{parameter} {detail}", parameter=parameter)
