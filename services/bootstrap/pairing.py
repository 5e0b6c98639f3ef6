"""Which prefill and decode workers fit each other."""

from __future__ import annotations

from common.errors.base import MeshError, Reason
from common.mesh.fit import difference
from pdmesh.v1 import types_pb2 as types


def check_pair(prefill: types.Worker, decode: types.Worker) -> None:
    """Raises `MeshError` when a room of the two could not work.

    INVALID_PARAMETER for a wrong role, NO_WORKER for one that takes no work, LAYOUT_MISMATCH when they differ in
    model or shape of pages; the message names the field.
    """
    for worker, role in ((prefill, types.WORKER_ROLE_PREFILL), (decode, types.WORKER_ROLE_DECODE)):
        if worker.role != role:
            names = types.WorkerRole.Name
            message = f"worker {worker.worker_id} is {names(worker.role)}, not {names(role)}"
            raise MeshError(Reason.INVALID_PARAMETER, message)
        if worker.state != types.WORKER_STATE_READY:
            message = f"worker {worker.worker_id} is {types.WorkerState.Name(worker.state)}"
            raise MeshError(Reason.NO_WORKER, message)
    if found := difference(prefill, decode):
        field, here, there = found
        message = (
            f"prefill worker {prefill.worker_id} and decode worker {decode.worker_id} differ in {field}: "
            f"{here!r} and {there!r}"
        )
        raise MeshError(Reason.LAYOUT_MISMATCH, message, parameter=field)
