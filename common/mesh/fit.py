"""Whether a prefill and a decode worker can hand over to each other."""

from __future__ import annotations

from pdmesh.v1 import types_pb2 as types


def difference(prefill: types.Worker, decode: types.Worker) -> tuple[str, object, object] | None:
    """The first field in which the two differ though they must not, with its values.

    The pages' shape comes before the model's fingerprint, which differs with it and says less.
    """
    for field in types.KvLayout.DESCRIPTOR.fields:
        here, there = getattr(prefill.kv_layout, field.name), getattr(decode.kv_layout, field.name)
        if here != there:
            return f"kv_layout.{field.name}", here, there
    if prefill.model.fingerprint != decode.model.fingerprint:
        return "model.fingerprint", prefill.model.fingerprint, decode.model.fingerprint
    ours, theirs = ({endpoint.backend for endpoint in worker.endpoints} for worker in (prefill, decode))
    if ours and theirs and ours != theirs:
        return "endpoints.backend", ", ".join(sorted(ours)), ", ".join(sorted(theirs))
    return None
