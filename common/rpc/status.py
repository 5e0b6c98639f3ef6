"""`MeshError` to and from the wire: a canonical status with `google.rpc.ErrorInfo` and `RetryInfo`."""

from __future__ import annotations

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from common.errors.base import DOMAIN, MeshError, Reason

DETAILS_KEY = "grpc-status-details-bin"

# What a status means when the server said no more: it is not one of ours, or the network made it.
REASON_OF_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: Reason.INVALID_PARAMETER,
    grpc.StatusCode.OUT_OF_RANGE: Reason.INVALID_PARAMETER,
    grpc.StatusCode.NOT_FOUND: Reason.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.OVERLOADED,
    grpc.StatusCode.FAILED_PRECONDITION: Reason.WRONG_STATE,
    grpc.StatusCode.UNAVAILABLE: Reason.WORKER_LOST,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED: Reason.ABORTED,
    grpc.StatusCode.UNIMPLEMENTED: Reason.UNSUPPORTED,
}


def to_trailers(error: MeshError) -> tuple[grpc.StatusCode, tuple[tuple[str, str | bytes], ...]]:
    """The status code of an error and the trailing metadata that carries its details."""
    code = grpc.StatusCode[error.status.grpc]
    metadata = {"parameter": error.parameter} if error.parameter else {}
    status = status_pb2.Status(code=code.value[0], message=error.message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=str(error.reason), domain=DOMAIN, metadata=metadata))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return code, ((DETAILS_KEY, status.SerializeToString()),)


def error_from(error: grpc.aio.AioRpcError) -> MeshError:
    """The `MeshError` that a server raised, or the nearest one for a status that carries no reason of ours."""
    message = error.details() or error.code().name
    reason, parameter, retry_after_s = REASON_OF_CODE.get(error.code(), Reason.INTERNAL), None, None
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == DOMAIN and info.reason in Reason.__members__:
                reason, parameter = Reason(info.reason), info.metadata.get("parameter")
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return MeshError(reason, message, parameter=parameter, retry_after_s=retry_after_s)
