"""Between the mesh's protos and the ranks' messages: one function a type, no decisions."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from common.engine.messages import Ledger, Load, Sampling, SequenceFailed, TokenLogprobs, Tokens
from common.errors.base import STATUS, Reason
from common.kvcache.ledger import Audit
from common.mesh.credit import Credit
from common.mesh.transfer_stats import TransferStats
from common.mesh.wire import ticket_from, ticket_to
from common.worker.messages import (
    RankReady,
    RankReservation,
    RoomEnded,
    RoomFailed,
    RoomFenced,
    RoomQuiet,
    RoomReleased,
    RoomReserved,
    RoomTransferred,
    RoomTransferring,
)
from pdmesh.v1 import bootstrap_service_pb2 as bootstrap_pb
from pdmesh.v1 import decode_service_pb2 as decode_pb
from pdmesh.v1 import prefill_service_pb2 as prefill_pb
from pdmesh.v1 import types_pb2 as pb

FINISH = {
    "": pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}

RoomNews = RoomReserved | RoomTransferring | RoomTransferred | RoomFailed | RoomQuiet | RoomFenced


# ---------------------------------------------------------------------------------------- from the mesh


def sampling_from(message: pb.SamplingParams) -> Sampling:
    """Every field that is set; the rest keep `Sampling`'s defaults, which are the proto's."""
    names = set(Sampling.__struct_fields__)
    values = {field.name: value for field, value in message.ListFields() if field.name in names}
    if "stop_token_ids" in values:
        values["stop_token_ids"] = tuple(values["stop_token_ids"])
    return Sampling(**values)


def control_from(event: bootstrap_pb.ControlEvent) -> RoomReserved | RoomEnded | RoomReleased | None:
    """What a rank has to know of bootstrap's event; None when it is the front's alone."""
    match event.WhichOneof("event"):
        case "reserved":
            reservation = event.reserved.reservation
            ranks = tuple(
                RankReservation(
                    rank.endpoint.rank,
                    rank.endpoint.backend,
                    rank.endpoint.descriptor,
                    tuple((extent.first_page, extent.page_count) for extent in rank.extents),
                )
                for rank in reservation.ranks
            )
            return RoomReserved(ticket_from(event.reserved.ticket), ranks, reservation.from_token)
        case "ended":
            return RoomEnded(ticket_from(event.ended.ticket), event.ended.reason, event.ended.message)
        case "released":
            released = event.released
            when_gone = tuple(endpoint.descriptor for endpoint in released.when_gone)
            return RoomReleased(ticket_from(released.ticket), when_gone, released.epoch)
    return None


# ---------------------------------------------------------------------------------------- to the mesh


def room_event_to(news: RoomNews) -> bootstrap_pb.WorkerEvent:
    """A rank's news of a room, for bootstrap."""
    ticket = ticket_to(news.ticket)
    match news:
        case RoomReserved():
            reservation = pb.Reservation(ranks=map(rank_reservation_to, news.ranks), from_token=news.from_token)
            return bootstrap_pb.WorkerEvent(reserved=bootstrap_pb.RoomReserved(ticket=ticket, reservation=reservation))
        case RoomTransferring():
            return bootstrap_pb.WorkerEvent(transferring=bootstrap_pb.RoomTransferring(ticket=ticket))
        case RoomTransferred():
            transfer = transfer_to(news.transfer)
            arrived = bootstrap_pb.RoomTransferred(ticket=ticket, bytes=news.nbytes, transfer=transfer)
            return bootstrap_pb.WorkerEvent(transferred=arrived)
        case RoomFailed():
            failed = bootstrap_pb.RoomFailed(ticket=ticket, reason=news.reason, message=news.message)
            return bootstrap_pb.WorkerEvent(failed=failed)
        case RoomQuiet():
            quiet = bootstrap_pb.RoomQuiet(ticket=ticket, transfer=transfer_to(news.transfer))
            return bootstrap_pb.WorkerEvent(quiet=quiet)
        case RoomFenced():
            return bootstrap_pb.WorkerEvent(fenced=bootstrap_pb.RoomFenced(ticket=ticket))


def transfer_to(stats: TransferStats | None) -> pb.TransferStats | None:
    if stats is None:
        return None
    return pb.TransferStats(
        backend=stats.backend,
        bytes=stats.nbytes,
        descriptors=stats.descriptors,
        duration=duration_to(stats.seconds),
        queued=duration_to(stats.queued_s),
        hidden=duration_to(stats.hidden_s),
        exposed=duration_to(stats.exposed_s),
        bytes_per_second=stats.bytes_per_s,
    )


def duration_to(seconds: float) -> Duration:
    whole, rest = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=rest)


def rank_reservation_to(rank: RankReservation) -> pb.RankReservation:
    return pb.RankReservation(
        endpoint=pb.RankEndpoint(rank=rank.rank, backend=rank.backend, descriptor=rank.descriptor),
        extents=[pb.Extent(first_page=first, page_count=count) for first, count in rank.extents],
    )


def ledger_to(ledger: Ledger) -> pb.Ledger:
    return pb.Ledger(
        free=ledger.free,
        reserved=ledger.reserved,
        in_use=ledger.in_use,
        cached=ledger.cached,
        quarantined=ledger.quarantined,
    )


def load_to(load: Load, audit: Audit) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        ledger=ledger_to(load.ledger),
        credit=credit_to(load.credit) if load.credit else None,
        retracted=load.retracted,
        audit=audit_to(audit),
    )


def audit_to(audit: Audit) -> pb.LedgerAudit:
    told = pb.LedgerAudit(
        runs=audit.runs,
        leaked_pages=audit.leaked_pages,
        disputed_pages=audit.disputed_pages,
        quarantine_page_seconds=audit.quarantine_page_seconds,
    )
    told.oldest_quarantine.FromNanoseconds(round(audit.oldest_quarantine_s * 1e9))
    return told


def credit_to(credit: Credit) -> pb.Credit:
    return pb.Credit(
        pages=credit.pages,
        sequences=credit.sequences,
        limit_pages=credit.limit_pages,
        reserved_tokens=credit.reserved_tokens,
    )


def layout_to(ready: RankReady) -> pb.KvLayout:
    layout = ready.layout
    return pb.KvLayout(
        kind=layout.kind,
        dtype=layout.dtype,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        page_size=layout.page_size,
        page_bytes=layout.page_bytes,
    )


def logprobs_to(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        chosen=pb.TokenLogprob(token_id=entry.token_id, logprob=entry.logprob),
        top=[pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
    )


def tokens_to(tokens: Tokens) -> decode_pb.SequenceTokens:
    return decode_pb.SequenceTokens(
        token_offset=tokens.offset,
        token_ids=tokens.token_ids,
        logprobs=map(logprobs_to, tokens.logprobs),
        finish_reason=FINISH[tokens.finish],
        cached_tokens=tokens.cached_tokens,
    )


def failed_to(failed: SequenceFailed) -> prefill_pb.SequenceFailed:
    retryable = STATUS[Reason(failed.reason)].retryable
    return prefill_pb.SequenceFailed(reason=failed.reason, message=failed.message, retryable=retryable)
