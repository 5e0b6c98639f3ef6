"""`MeshError`, the one exception that crosses a service's edge, and its table of statuses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DOMAIN = "pdmesh"


class Reason(StrEnum):
    """Why something was refused or failed; the names are those of `pdmesh.v1.ErrorReason`."""

    INVALID_PARAMETER = "INVALID_PARAMETER"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    TOKEN_OUT_OF_RANGE = "TOKEN_OUT_OF_RANGE"
    BODY_TOO_LARGE = "BODY_TOO_LARGE"
    MALFORMED_REQUEST = "MALFORMED_REQUEST"
    UNSUPPORTED = "UNSUPPORTED"
    NO_WORKER = "NO_WORKER"
    OVERLOADED = "OVERLOADED"
    DRAINING = "DRAINING"
    BOOTSTRAP_UNREACHABLE = "BOOTSTRAP_UNREACHABLE"
    WORKER_LOST = "WORKER_LOST"
    BOOTSTRAP_TIMEOUT = "BOOTSTRAP_TIMEOUT"
    WAITING_TIMEOUT = "WAITING_TIMEOUT"
    TRANSFER_TIMEOUT = "TRANSFER_TIMEOUT"
    TRANSFER_FAILED = "TRANSFER_FAILED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    ABORTED = "ABORTED"
    STALE_TICKET = "STALE_TICKET"
    WRONG_STATE = "WRONG_STATE"
    NOT_FOUND = "NOT_FOUND"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    ENGINE_FAILED = "ENGINE_FAILED"
    STORE_FAILED = "STORE_FAILED"
    BAD_CHECKPOINT = "BAD_CHECKPOINT"
    BAD_CONFIG = "BAD_CONFIG"
    INTERNAL = "INTERNAL"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    NOT_OWNER = "NOT_OWNER"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"


@dataclass(frozen=True)
class Status:
    """How a reason looks from outside: gRPC status name, HTTP status, and whether a retry may help."""

    grpc: str
    http: int
    retryable: bool = False


STATUS: dict[Reason, Status] = {
    Reason.INVALID_PARAMETER: Status("INVALID_ARGUMENT", 400),
    Reason.EMPTY_PROMPT: Status("INVALID_ARGUMENT", 400),
    Reason.CONTEXT_TOO_LONG: Status("INVALID_ARGUMENT", 400),
    Reason.UNKNOWN_MODEL: Status("NOT_FOUND", 404),
    Reason.TOKEN_OUT_OF_RANGE: Status("INVALID_ARGUMENT", 400),
    Reason.BODY_TOO_LARGE: Status("INVALID_ARGUMENT", 413),
    Reason.MALFORMED_REQUEST: Status("INVALID_ARGUMENT", 400),
    Reason.UNSUPPORTED: Status("INVALID_ARGUMENT", 400),
    Reason.NO_WORKER: Status("UNAVAILABLE", 503, retryable=True),
    Reason.OVERLOADED: Status("RESOURCE_EXHAUSTED", 429, retryable=True),
    Reason.DRAINING: Status("UNAVAILABLE", 503, retryable=True),
    Reason.BOOTSTRAP_UNREACHABLE: Status("UNAVAILABLE", 503, retryable=True),
    Reason.WORKER_LOST: Status("UNAVAILABLE", 503, retryable=True),
    Reason.BOOTSTRAP_TIMEOUT: Status("UNAVAILABLE", 503, retryable=True),
    Reason.WAITING_TIMEOUT: Status("UNAVAILABLE", 503, retryable=True),
    Reason.TRANSFER_TIMEOUT: Status("UNAVAILABLE", 503, retryable=True),
    Reason.TRANSFER_FAILED: Status("UNAVAILABLE", 503, retryable=True),
    Reason.DEADLINE_EXCEEDED: Status("DEADLINE_EXCEEDED", 504),
    Reason.ABORTED: Status("CANCELLED", 499),
    Reason.STALE_TICKET: Status("FAILED_PRECONDITION", 409),
    Reason.WRONG_STATE: Status("FAILED_PRECONDITION", 409),
    Reason.NOT_FOUND: Status("NOT_FOUND", 404),
    Reason.LAYOUT_MISMATCH: Status("FAILED_PRECONDITION", 409),
    Reason.ENGINE_FAILED: Status("INTERNAL", 500, retryable=True),
    Reason.STORE_FAILED: Status("UNAVAILABLE", 503, retryable=True),
    Reason.BAD_CHECKPOINT: Status("FAILED_PRECONDITION", 500),
    Reason.BAD_CONFIG: Status("FAILED_PRECONDITION", 500),
    Reason.INTERNAL: Status("INTERNAL", 500),
    Reason.UNIMPLEMENTED: Status("UNIMPLEMENTED", 501),
    Reason.NOT_OWNER: Status("UNAVAILABLE", 503, retryable=True),
    Reason.CHECKSUM_MISMATCH: Status("UNAVAILABLE", 503, retryable=True),
}


class MeshError(Exception):
    """An error with a reason that a client or an operator can act on.

    `message` is one sentence for a person. `parameter` names the request's field that is at fault.
    `retry_after_s` is a hint; only retryable reasons carry one.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        parameter: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.parameter = parameter
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> Status:
        return STATUS[self.reason]

    @property
    def retryable(self) -> bool:
        return self.status.retryable

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"
