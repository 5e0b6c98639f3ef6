"""Errors in OpenAI's shape."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from starlette.responses import Response

from common.errors.base import MeshError, Reason

CODES = {Reason.CONTEXT_TOO_LONG: "context_length_exceeded", Reason.UNKNOWN_MODEL: "model_not_found"}


def error_body(error: MeshError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; the code is our reason, or OpenAI's word where it has one."""
    code = CODES.get(error.reason, error.reason.lower())
    return {
        "error": {
            "message": error.message,
            "type": error_type(error.status.http),
            "param": error.parameter,
            "code": code,
        }
    }


def error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 499 else "server_error"


def error_response(error: MeshError, request_id: str) -> Response:
    """The response for an error; `Retry-After` in whole seconds where waiting may help."""
    headers = {"x-request-id": request_id}
    if error.retryable:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    return json_response(error_body(error), error.status.http, headers)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")
