"""What `Explain` says: the first cause, the worker's name, and the figures of that time, in one sentence."""

from __future__ import annotations

import pytest

from common.errors.base import Reason
from common.mesh import room as machine
from common.mesh.room import Party
from common.mesh.ticket import Ticket
from pdmesh.v1 import bootstrap_service_pb2 as pb
from services.bootstrap import timeline
from services.bootstrap.inspection_cause import Cause, Scene, explain, pending, router_failure
from services.bootstrap.timeline import Timeline
from tests.unit.test_timeline import TICKET, Entry, Mesh, opened

pytestmark = pytest.mark.unit

NO_SHARD = -1  # of rooms with a name as in these tests


class Story(Mesh):
    """A room's life, told step by step; the clock begins at its opening."""

    def __init__(self, **room: object) -> None:
        super().__init__()
        self.entry = Entry(machine.replace(opened(), prompt_tokens=100, **room))
        self.told("prefill-0", free=512)
        self.told("decode-0", free=512)
        self.journal.note(self.entry, timeline.OPENED, timeline.ROUTER)

    def after(self, seconds: float) -> Story:
        self.time = 100.0 + seconds
        return self

    def say(self, event: machine.Event, by: str) -> Story:
        self.apply(self.entry, event, by)
        return self

    def reserve(self) -> Story:
        return self.say(machine.Reserved(TICKET, "pages"), "decode-0")

    def success(self) -> Story:
        self.say(machine.Transferring(TICKET), "prefill-0")
        return self.say(machine.Transferred(TICKET), "decode-0")

    def expire(self) -> Story:
        return self.say(machine.DeadlinePassed(TICKET), timeline.TIMER)

    def abort(self, reason: Reason = Reason.ABORTED, message: str = "the client left") -> Story:
        return self.say(machine.Abort(TICKET, reason, message), timeline.ROUTER)

    def lose(self, worker_id: str, why: str) -> Story:
        message = f"worker {worker_id} is gone: {why}"
        self.journal.worker_lost(worker_id, message)
        return self.say(machine.WorkerLost(TICKET, Party(worker_id.partition("-")[0]), message), timeline.BOOTSTRAP)

    def cause(self, request_reason: str = "") -> Cause:
        return explain(Scene(self.entry, self.journal, self.time, lambda tokens: -(-tokens // 16), 1.5, request_reason))


def test_a_full_pool() -> None:
    story = Story(timeouts=machine.Timeouts(bootstrap_s=30.0)).after(29.8)
    story.told("decode-0", running=31, waiting=9, in_use=512)
    cause = story.after(30.0).expire().cause()
    assert cause.reason == Reason.BOOTSTRAP_TIMEOUT
    assert cause.sentence == (
        "decode-0 granted no pages for 30.0 s: 512 of 512 pages were in use by 31 sequences, "
        "0 free, 7 needed, 9 sequences waiting."
    )


def test_a_pool_in_quarantine() -> None:
    story = Story(timeouts=machine.Timeouts(bootstrap_s=30.0)).after(29.8)
    story.told("decode-0", running=1, in_use=100, quarantined=400, reserved=10, free=2)
    cause = story.after(30.0).expire().cause()
    assert (
        "100 of 512 pages were in use by 1 sequence, 10 reserved for rooms, 400 in quarantine, 2 free" in cause.sentence
    )


def test_a_decode_worker_that_is_silent() -> None:
    cause = Story(timeouts=machine.Timeouts(bootstrap_s=4.0)).after(4.0).expire().cause()
    assert cause.sentence == "decode-0 granted no pages for 4.0 s: it had not been heard from for 4.0 s."


def test_admission() -> None:
    story = Story(admission_deadline=102.0).after(1.9)
    story.told("decode-0", running=8, in_use=512)
    cause = story.after(2.0).expire().cause()
    assert cause.reason == Reason.OVERLOADED
    assert "decode-0 granted no pages for 2.0 s: 512 of 512 pages were in use by 8 sequences" in cause.sentence


def test_a_prefill_worker_that_stands_still() -> None:
    story = Story(timeouts=machine.Timeouts(waiting_s=3.0)).after(1.0).reserve().after(4.0).expire()
    assert story.cause() == Cause(
        "prefill-0 began no transfer for 3.0 s after decode-0 granted 7 pages: it had not been heard from for 4.0 s.",
        Reason.WAITING_TIMEOUT,
        104.0,
    )


def test_a_prefill_worker_that_is_busy() -> None:
    story = Story(timeouts=machine.Timeouts(waiting_s=3.0)).after(1.0).reserve().after(3.9)
    story.told("prefill-0", running=2, waiting=40, waiting_tokens=81_920)
    cause = story.after(4.0).expire().cause()
    assert cause.sentence.endswith(": it computed 2 sequences and 40 waited with 81920 prompt tokens.")


def test_a_transfer_that_does_not_end() -> None:
    story = Story(timeouts=machine.Timeouts(transfer_s=9.0)).reserve().say(machine.Transferring(TICKET), "prefill-0")
    story.after(8.9).told("decode-0")
    cause = story.after(9.0).expire().cause()
    assert cause.reason == Reason.TRANSFER_TIMEOUT
    assert cause.sentence == (
        "The transfer from prefill-0 to decode-0 did not end for 9.0 s: prefill-0 was silent for 9.0 s."
    )


def test_a_lost_worker_is_the_cause_whoever_noticed_first() -> None:
    story = Story().reserve().after(0.5).lose("prefill-0", "its session broke")
    expected = (
        "prefill-0 is gone, 0.500 s after the room was opened, while prefill-0 computed the prompt: its session broke."
    )
    assert story.cause().sentence == expected
    other = Story().reserve().after(0.4)
    other.say(machine.RoomFailed(TICKET, Reason.TRANSFER_FAILED, "connection reset"), "prefill-0")
    cause = other.after(0.6).lose("decode-0", "no sign of life for 10.5 s").cause()
    assert cause.reason == Reason.WORKER_LOST
    assert cause.sentence.startswith("decode-0 is gone")
    assert cause.sentence.endswith(": no sign of life for 10.5 s.")


def test_a_worker_lost_later_is_not_blamed() -> None:
    story = Story().reserve().after(0.4)
    story.say(machine.RoomFailed(TICKET, Reason.TRANSFER_FAILED, "connection reset"), "prefill-0")
    cause = story.after(60).lose("decode-0", "it closed its session").cause()
    assert cause.reason == Reason.TRANSFER_FAILED
    assert cause.sentence == (
        "prefill-0 gave the room up 0.400 s after the room was opened, while prefill-0 computed the prompt: "
        "connection reset."
    )


def test_a_client_that_leaves_and_an_operator() -> None:
    cause = Story().reserve().after(0.25).abort().cause()
    assert cause.reason == Reason.ABORTED
    assert cause.sentence == (
        "The router gave the request up 0.250 s after the room was opened, while prefill-0 computed the prompt: "
        "the client left."
    )
    story = Story().after(2.0).say(machine.Abort(TICKET, Reason.ABORTED, "maintenance"), timeline.OPERATOR)
    assert story.cause().sentence.startswith("An operator aborted the room 2.0 s after")


def test_the_routers_word_counts_when_a_worker_was_first_to_say_it() -> None:
    story = Story().reserve().after(0.25)
    story.say(machine.RoomFailed(TICKET, Reason.ABORTED, "the router aborted the sequence"), "decode-0")
    assert story.cause().sentence.startswith("decode-0 gave the room up 0.250 s after")
    story.after(0.26).abort()
    assert story.cause().sentence.endswith(": the client left.")
    assert story.cause().sentence.startswith("The router gave the request up 0.250 s after")

    lost = Story().reserve().after(0.25)
    lost.say(machine.RoomFailed(TICKET, Reason.ABORTED, "the router aborted the sequence"), "decode-0")
    lost.after(0.26).abort(Reason.WORKER_LOST, "worker prefill-0: Socket closed")
    assert lost.cause().reason == Reason.WORKER_LOST
    assert (
        lost.after(1.3).lose("prefill-0", "its session broke").cause().sentence.startswith("prefill-0 is gone, 1.3 s")
    )


@pytest.mark.parametrize("how", ["timer", "router", "client"])
def test_a_deadline_whoever_was_first_to_notice(how: str) -> None:
    story = Story(request_deadline=101.0).reserve().after(0.9)
    story.told("prefill-0", running=1)
    story.after(1.0)
    match how:
        case "timer":
            story.expire()
        case "router":
            story.abort(Reason.DEADLINE_EXCEEDED, "the request's deadline passed")
        case "client":
            story.abort()
    assert story.cause() == Cause(
        "The request's deadline of 1.0 s passed while prefill-0 began no transfer for 1.0 s after decode-0 granted "
        "7 pages: it computed 1 sequence and 0 waited.",
        Reason.DEADLINE_EXCEEDED,
        101.0,
    )


def test_after_a_hand_over_the_end_of_the_sequence_is_told() -> None:
    done = Story().reserve().after(0.02).success()
    assert (
        done.after(5.02).cause().sentence
        == "The hand-over succeeded in 0.020 s and decode-0 has generated for 5.0 s since."
    )
    done.journal.note(done.entry, timeline.CLOSED, timeline.ROUTER)
    assert done.cause() == Cause("The hand-over succeeded in 0.020 s.")

    lost = Story().reserve().after(0.02).success().after(1.02)
    lost.abort(Reason.WORKER_LOST, "worker decode-0 at 127.0.0.1:1: Socket closed")
    lost.journal.note(lost.entry, timeline.CLOSED, timeline.ROUTER)
    lost.after(1.03).lose("decode-0", "its session broke")
    cause = lost.cause()
    assert cause.reason == Reason.WORKER_LOST
    assert cause.sentence == (
        "decode-0 is gone, 1.0 s after the room was opened, while decode-0 generated: its session broke."
    )

    left = Story().reserve().after(0.02).success().after(1.02).abort()
    assert left.cause().sentence == (
        "The hand-over succeeded in 0.020 s, but the router gave the request up 1.0 s later, while decode-0 generated: "
        "the client left."
    )

    late = Story(request_deadline=101.0).reserve().after(0.02).success().after(0.99)
    late.told("decode-0", running=12)
    assert late.abort().cause().sentence == (
        "The request's deadline of 1.0 s passed while decode-0 generated (12 sequences ran there)."
    )


def test_a_long_wait_names_what_is_waited_for() -> None:
    story = Story().after(41.5)
    story.told("decode-0", running=31, in_use=512, waiting=1)
    assert story.after(42.0).cause() == Cause(
        "Under way for 42.0 s: decode-0 granted no pages for 42.0 s: 512 of 512 pages were in use by 31 sequences, "
        "0 free, 7 needed."
    )


def test_a_stale_ticket_does_not_end_up_as_the_cause() -> None:
    story = Story().reserve().say(machine.Transferred(Ticket("r", 1, 6)), "decode-0").after(1.0).abort()
    assert story.cause().reason == Reason.ABORTED


def test_a_room_that_was_taken_over_has_at_least_its_record() -> None:
    mesh = Mesh()
    entry = Entry(
        machine.replace(opened(), state=machine.State.FAILED, reason="WAITING_TIMEOUT", message="no transfer")
    )
    mesh.journal.taken_over(entry)
    cause = explain(Scene(entry, mesh.journal, 200.0, lambda tokens: 1))
    assert cause.reason == "WAITING_TIMEOUT"
    assert cause.sentence == "It had failed before this bootstrap took it over: no transfer."


TAKEN = "replica b2 (epoch 9) took over from replica a1 at 127.0.0.1:7001, epoch 7"


def test_a_new_owner_says_whence_the_room_came_and_how_it_was() -> None:
    story = Story().reserve().say(machine.Transferring(TICKET), "prefill-0").after(0.5)
    story.entry.timeline = Timeline()  # it is the old owner's
    story.journal.took_over(NO_SHARD, TAKEN)
    story.journal.taken_over(story.entry)
    (restored,) = story.entry.timeline.moments
    assert (restored.event, restored.at, restored.state) == ("Restored", 100.5, machine.State.TRANSFERRING)
    words = f"{TAKEN}, 0.500 s after the room was opened and 0.500 s after it was TRANSFERRING"
    assert restored.message == words
    story.after(0.7).say(machine.Transferred(TICKET), "decode-0")
    expected = f"The hand-over succeeded in 0.700 s and decode-0 has generated for 0.000 s since. R{words[1:]}."
    assert story.cause().sentence == expected


def test_a_room_that_its_router_brought_back() -> None:
    story = Story()
    story.entry.timeline = Timeline()
    story.journal.brought_back(story.entry, 9)
    assert story.cause().sentence.endswith(
        " Its router brought it from an earlier bootstrap, of epoch 7, to this one, of 9."
    )
    story.entry.timeline = Timeline()
    story.journal.took_over(NO_SHARD, TAKEN)
    story.journal.brought_back(story.entry, 9)
    assert story.cause().sentence.endswith(
        f" R{TAKEN[1:]}, who had not written of the room to the store yet; its router brought it."
    )


def test_a_room_that_waited_for_an_owner() -> None:
    story = Story()
    story.time = 98.0
    story.journal.took_over(NO_SHARD, TAKEN)
    story.time = 100.0
    assert story.cause().sentence.endswith(f" R{TAKEN[1:]}, 2.0 s before the room was opened.")
    story.time = 85.0
    story.journal.took_over(NO_SHARD, TAKEN)
    assert TAKEN[1:] not in story.after(0.0).cause().sentence, "that was long before"


def test_the_store_was_away_while_the_room_lived() -> None:
    story = Story().reserve().after(1.0)
    story.journal.store_lost(for_s=0.5)
    said = story.after(3.0).cause().sentence
    assert said.endswith("The store is out of reach since 2.5 s: what happens is in this replica's memory alone.")
    story.success().after(4.0).journal.store_back()
    assert story.cause().sentence.endswith(
        "The store was out of reach for 3.5 s at that time: what happened was written later."
    )
    assert "store" not in Story().cause().sentence


def test_a_retracted_sequence_went_on_elsewhere() -> None:
    story = Story().reserve().after(0.02).success().after(3.02)
    why = "worker decode-0 ran out of pages and retracted the sequence"
    story.journal.note(story.entry, timeline.CLOSED, timeline.ROUTER, message=why)
    assert story.cause() == Cause(f"The hand-over succeeded in 0.020 s; {why} 3.0 s later.")


def test_a_quarantine_names_who_is_waited_for() -> None:
    story = Story().reserve().after(1.0).abort()
    scene = Scene(story.entry, story.journal, 109.0, lambda tokens: 7)
    assert (
        pending(scene)
        == "7 pages of decode-0 are in quarantine since 8.0 s: prefill-0 has not said that it writes no more."
    )
    story.lose("prefill-0", "its session broke")
    scene = Scene(story.entry, story.journal, 109.0, lambda tokens: 7)
    assert pending(scene).endswith("prefill-0 is gone, and decode-0 has not fenced it off yet.")
    story.say(machine.Quiet(TICKET), "prefill-0")
    assert pending(Scene(story.entry, story.journal, 109.0, lambda tokens: 7)) == ""


def test_a_request_that_never_had_a_room_is_shown_with_the_load_of_that_time() -> None:
    mesh = Mesh()
    mesh.told("decode-0", running=3, in_use=30, free=2)
    mesh.journal.request_failed(pb.RequestFailed(request_id="q", reason="OVERLOADED", message="the mesh is full"))
    mesh.told("decode-0", free=32)
    failure = mesh.journal.failure_of("q")
    assert failure is not None
    assert router_failure(failure) == Cause(
        "The router refused or ended the request: the mesh is full; "
        "at that time 30 of 32 pages of decode-0 were in use by 3 sequences, 2 free.",
        "OVERLOADED",
        100.0,
    )
