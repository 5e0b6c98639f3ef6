"""Request bodies: bounded, parsed, refused in a way that clients understand."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from common.errors.base import MeshError, Reason

S = TypeVar("S", bound=BaseModel)


async def parse(request: Request, schema: type[S], limit: int) -> S:
    """The body as `schema`.

    Raises `MeshError`: BODY_TOO_LARGE over `limit` bytes, MALFORMED_REQUEST for what is not JSON,
    INVALID_PARAMETER with the field for a wrong or missing one, ABORTED for a client that left.
    """
    body = await read(request, limit)
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise MeshError(Reason.MALFORMED_REQUEST, f"the body is not valid JSON: {first['msg']}")
    if not first["loc"]:
        raise MeshError(Reason.MALFORMED_REQUEST, f"the body must be a JSON object: {first['msg']}")
    where = ".".join(map(str, first["loc"]))
    raise MeshError(Reason.INVALID_PARAMETER, f"{where}: {first['msg']}", parameter=str(first["loc"][0]))


async def read(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is known to exceed `limit`; the server discards the rest."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large(limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large(limit)
    except ClientDisconnect:
        raise MeshError(Reason.ABORTED, "the client left before its request was complete") from None
    return bytes(body)


def too_large(limit: int) -> MeshError:
    return MeshError(Reason.BODY_TOO_LARGE, f"the body exceeds {limit} bytes")
