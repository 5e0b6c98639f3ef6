"""The workers: registration, heartbeats, and what becomes of one that is silent or gone."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from itertools import islice

from common.errors.base import MeshError, Reason
from common.mesh.outbox import Outbox
from common.obs.log import get_logger
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap import metrics
from services.bootstrap.timeline import Figures
from services.bootstrap.timers import Timers

log = get_logger(__name__)

# A heartbeat may be late by this much without harm.
SLACK_S = 0.5
# How long a worker that is offline is still shown.
FORGET_S = 300.0
# How long a worker whose session broke may take to open another before its life ends.
REATTACH_S = 1.0
# An alarm that rings later than this was not heard by a process that slept: what workers said meanwhile is unread.
OVERSLEPT_S = 1.0
# Decode workers whose load is shown with a request that failed.
SHOWN_DECODES = 4
# Workers whose last epoch is remembered after they are forgotten.
MAX_ENDED = 10_000


class Member:
    """One life of a worker: from a registration to the end of its session."""

    def __init__(self, record: types.Worker, outbox: Outbox[pb.ControlEvent], now: float) -> None:
        self.record = record
        self.outbox = outbox
        self.seen_at = now
        self.draining = False
        self.broken_at: float | None = None  # its session is gone, and another may take its place
        self.why = ""
        self.alarm_at = 0.0
        self.drain_told = asyncio.Event()
        self._figures: Figures | None = None

    @property
    def worker_id(self) -> str:
        return self.record.worker_id

    @property
    def online(self) -> bool:
        return self.record.state != types.WORKER_STATE_OFFLINE

    @property
    def figures(self) -> Figures:
        """What is known of it now. Made once after each change, when somebody asks."""
        if self._figures is None or self._figures.state != self.record.state or self._figures.told_at != self.seen_at:
            load = types.WorkerLoad()
            load.CopyFrom(self.record.load)
            self._figures = Figures(self.record.state, load, self.seen_at)
        return self._figures

    def send(self, event: pb.ControlEvent) -> None:
        self.outbox.put(event)


class Workers:
    """All workers by id. `on_changed` gets a record that changed (`stored` when the store should know as well),
    `on_gone` an id that is forgotten, `on_lost` an id whose life ended, with a sentence."""

    def __init__(
        self,
        now: Callable[[], float],
        timers: Timers[tuple[str, str]],
        *,
        epoch: int,
        heartbeat_interval_s: float,
        heartbeat_max_failure: int,
        on_changed: Callable[[types.Worker, bool], None],
        on_gone: Callable[[str], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        self._now = now
        self._timers = timers
        # Above every epoch that an earlier bootstrap gave, however many registrations it saw.
        self._last_epoch = epoch << 20
        self._interval_s = heartbeat_interval_s
        self._max_failure = heartbeat_max_failure
        self._on_changed, self._on_gone, self._on_lost = on_changed, on_gone, on_lost
        self._members: dict[str, Member] = {}
        self._ended: dict[str, int] = {}  # the last epoch of workers that are forgotten

    def get(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    @property
    def latest_epoch(self) -> int:
        """At least the epoch of every registration so far, here and by earlier bootstraps."""
        return self._last_epoch

    def is_process(self, worker_id: str, writer: types.Writer) -> bool:
        """Whether the worker's present process has the transfer endpoints of `writer`."""
        member = self._members.get(worker_id)
        return member is not None and list(member.record.endpoints) == list(writer.endpoints)

    def gave_up(self, worker_id: str, epoch: int) -> None:
        """A life that an earlier owner began has ended here: should the worker come back, its epoch is a new one."""
        if worker_id not in self._members:
            self._remember_end(worker_id, max(epoch, self._last_epoch))

    @property
    def silent_after_s(self) -> float:
        """After how long without a heartbeat a worker is suspect."""
        return self._interval_s + SLACK_S

    def figures(self, worker_id: str) -> Figures | None:
        """The worker's state and load at this moment; None for one that is not known."""
        member = self._members.get(worker_id)
        return member.figures if member else None

    def decode_figures(self) -> tuple[tuple[str, Figures], ...]:
        """Some decode and unified workers that are online, with their ids: SHOWN_DECODES at most."""
        roles = (types.WORKER_ROLE_DECODE, types.WORKER_ROLE_UNIFIED)
        chosen = (member for member in self._members.values() if member.online and member.record.role in roles)
        return tuple((member.worker_id, member.figures) for member in islice(chosen, SHOWN_DECODES))

    def records(self) -> list[types.Worker]:
        """All records, by id."""
        return [self._members[worker_id].record for worker_id in sorted(self._members)]

    def register(self, worker: types.Worker, outbox: Outbox[pb.ControlEvent]) -> Member:
        """Begin a worker's life, or go on with the one that has the proposed epoch.

        An earlier life under the same id ends, and its rooms fail. A life that ended here does not go on: the worker
        gets a higher epoch. Raises `MeshError` (INVALID_PARAMETER) for a record that lacks what others need.
        """
        check(worker)
        record = types.Worker()
        record.CopyFrom(worker)
        role = types.WorkerRole.Name(record.role).removeprefix("WORKER_ROLE_").lower()
        record.worker_id = record.worker_id or f"{role}-{secrets.token_hex(4)}"
        earlier = self._members.get(record.worker_id)
        record.epoch = self._epoch_for(record.worker_id, record.epoch, earlier)
        if earlier and earlier.record.epoch == record.epoch:
            self._detach(earlier)
        elif earlier:
            self.lost(earlier, "it registered anew")
            if record.worker_id in self._members:
                self._count(earlier.record, -1)
        record.registered_at.FromNanoseconds(round(self._now() * 1e9))
        record.state = types.WORKER_STATE_READY
        member = Member(record, outbox, self._now())
        self._members[record.worker_id] = member
        registered = pb.WorkerRegistered(worker_id=record.worker_id, epoch=record.epoch)
        registered.heartbeat_interval.FromNanoseconds(round(self._interval_s * 1e9))
        member.send(pb.ControlEvent(registered=registered))
        self._count(record, 1)
        self._on_changed(record, True)
        self._watch(member)
        log.info("worker registered", worker_id=record.worker_id, epoch=record.epoch, address=record.address)
        return member

    def _epoch_for(self, worker_id: str, proposed: int, earlier: Member | None) -> int:
        """The epoch of a registration: the proposed one if that life may go on here, or one above all before."""
        known = earlier.record.epoch if earlier else self._ended.get(worker_id, 0)
        alive = earlier is not None and earlier.online
        if proposed > known or (proposed == known and alive):
            return proposed
        self._last_epoch = max(self._last_epoch, known) + 1
        return self._last_epoch

    def _detach(self, member: Member) -> None:
        """Another session takes the member's place; it says and hears nothing more, and its life goes on."""
        self._count(member.record, -1)
        gone = types.Worker()
        gone.CopyFrom(member.record)
        gone.state = types.WORKER_STATE_OFFLINE
        member.record = gone
        member.outbox.close()

    def broken(self, member: Member, why: str) -> None:
        """The worker's session ended without a goodbye. Its life ends too, unless it comes back at once."""
        if member.online and self._members.get(member.worker_id) is member:
            member.outbox.close()
            member.broken_at, member.why = self._now(), why
            self._settle(member)
            self._watch(member)

    def heartbeat(self, member: Member, load: types.WorkerLoad) -> None:
        member.seen_at = self._now()
        changed = member.record.load != load
        member.record.load.CopyFrom(load)
        if self._settle(member):
            self._watch(member)  # else the alarm that is set looks again
        elif changed:
            self._on_changed(member.record, False)

    def draining(self, member: Member) -> None:
        member.draining = True
        member.drain_told.set()
        self._settle(member)

    def lost(self, member: Member, why: str) -> None:
        """End a worker's life: its session is closed, its rooms fail. One that was draining is forgotten at once."""
        if not member.online:
            return
        self._set_state(member, types.WORKER_STATE_OFFLINE)
        member.outbox.close()
        self._on_lost(member.worker_id, f"worker {member.worker_id} is gone: {why}")
        if member.draining:
            self._forget(member)
        else:
            self._timers.set(("worker", member.worker_id), self._now() + FORGET_S)
        log.info("worker offline", worker_id=member.worker_id, epoch=member.record.epoch, why=why)

    def alarm(self, worker_id: str) -> None:
        """The timer of a worker fired: look how long it has been silent."""
        member = self._members.get(worker_id)
        if member is None:
            return
        if member.online and self._now() - member.alarm_at > OVERSLEPT_S:
            member.seen_at = max(member.seen_at, self._now() - self._interval_s)
            self._watch(member)
            return
        silent_s = self._now() - member.seen_at
        if not member.online:
            self._forget(member)
        elif member.broken_at is not None and self._now() - member.broken_at >= REATTACH_S:
            self.lost(member, member.why)
        elif silent_s >= self._interval_s * self._max_failure + SLACK_S:
            self.lost(member, f"no sign of life for {silent_s:.1f} s")
        else:
            self._settle(member)
            self._watch(member)

    def _watch(self, member: Member) -> None:
        """Wake up when it would become suspect, or offline."""
        first, last = member.seen_at + self._interval_s, member.seen_at + self._interval_s * self._max_failure
        when = (first if self._now() < first + SLACK_S else last) + SLACK_S
        if member.broken_at is not None:
            when = min(when, member.broken_at + REATTACH_S)
        member.alarm_at = when
        self._timers.set(("worker", member.worker_id), when)

    def _settle(self, member: Member) -> bool:
        """Bring the state in line with what is known of the worker; tells whether it changed."""
        if not member.online:
            return False
        if member.broken_at is not None or self._now() - member.seen_at >= self._interval_s + SLACK_S:
            state: types.WorkerState.ValueType = types.WORKER_STATE_SUSPECT
        elif member.draining:
            state = types.WORKER_STATE_DRAINING
        else:
            state = types.WORKER_STATE_READY
        if state == member.record.state:
            return False
        self._set_state(member, state)
        return True

    def _set_state(self, member: Member, state: types.WorkerState.ValueType) -> None:
        self._count(member.record, -1)
        member.record.state = state
        self._count(member.record, 1)
        self._on_changed(member.record, True)

    def _forget(self, member: Member) -> None:
        self._count(member.record, -1)
        self._timers.cancel(("worker", member.worker_id))
        self._remember_end(member.worker_id, member.record.epoch)
        del self._members[member.worker_id]
        self._on_gone(member.worker_id)

    def _remember_end(self, worker_id: str, epoch: int) -> None:
        self._ended[worker_id] = max(epoch, self._ended.get(worker_id, 0))
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def _count(self, record: types.Worker, by: int) -> None:
        role = types.WorkerRole.Name(record.role).removeprefix("WORKER_ROLE_")
        state = types.WorkerState.Name(record.state).removeprefix("WORKER_STATE_")
        metrics.WORKERS.labels(role, state).inc(by)


def check(worker: types.Worker) -> None:
    for name, missing in (
        ("role", worker.role not in types.WorkerRole.values() or worker.role == types.WORKER_ROLE_UNSPECIFIED),
        ("address", not worker.address),
    ):
        if missing:
            raise MeshError(Reason.INVALID_PARAMETER, f"a registration needs {name}", parameter=name)
