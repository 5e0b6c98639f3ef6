"""Parts of bootstrap by themselves: alarms, pairing, settings, write-behind, the registry of workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from common.config.flags import resolve
from common.errors.base import MeshError, Reason
from common.mesh.outbox import Outbox
from pdmesh.v1 import bootstrap_service_pb2 as pb
from pdmesh.v1 import types_pb2 as types
from services.bootstrap.config import BootstrapConfig
from services.bootstrap.pairing import check_pair
from services.bootstrap.records import Records
from services.bootstrap.store.base import Outcome, Write
from services.bootstrap.store.memory import MemoryStore
from services.bootstrap.timers import Timers
from services.bootstrap.workers import REATTACH_S, Workers

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_timers_ring_once_in_order_and_can_be_moved() -> None:
    clock = Clock()
    timers: Timers[str] = Timers(clock)
    for key, when in (("c", 1003.0), ("a", 1001.0), ("b", 1002.0), ("gone", 1001.0)):
        timers.set(key, when)
    timers.set("a", 1002.5)
    timers.cancel("gone")
    assert timers.due() == []
    clock.time = 1002.6
    assert timers.due() == ["b", "a"]
    clock.time = 2000.0
    assert timers.due() == ["c"]
    assert len(timers) == 0


def test_timers_do_not_grow_with_what_is_moved() -> None:
    timers: Timers[int] = Timers(Clock())
    for n in range(20_000):
        timers.set(n % 10, 2000.0 + n)
    assert len(timers) == 10
    assert len(timers._heap) < 2000


async def test_timers_run_in_a_loop() -> None:
    loop = asyncio.get_running_loop()
    timers: Timers[str] = Timers(loop.time)
    rung: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(timers.run(rung.put_nowait))
    timers.set("later", loop.time() + 0.05)
    await asyncio.sleep(0)
    timers.set("now", loop.time())
    assert [await rung.get(), await rung.get()] == ["now", "later"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def worker(role: types.WorkerRole.ValueType, name: str = "w") -> types.Worker:
    made = types.Worker(worker_id=name, role=role, address="127.0.0.1:1", state=types.WORKER_STATE_READY)
    made.model.fingerprint = "f"
    made.kv_layout.CopyFrom(types.KvLayout(kind="mha", dtype="float32", num_layers=2, page_size=16))
    made.endpoints.add(rank=0, backend="local")
    return made


def pair() -> tuple[types.Worker, types.Worker]:
    return worker(types.WORKER_ROLE_PREFILL, "p"), worker(types.WORKER_ROLE_DECODE, "d")


def test_equal_workers_pair() -> None:
    check_pair(*pair())


def test_a_mismatch_names_the_field() -> None:
    for change, field in (
        (lambda w: setattr(w.model, "fingerprint", "g"), "model.fingerprint"),
        (lambda w: setattr(w.kv_layout, "page_size", 32), "kv_layout.page_size"),
        (lambda w: setattr(w.kv_layout, "dtype", "bfloat16"), "kv_layout.dtype"),
        (lambda w: setattr(w.endpoints[0], "backend", "nixl"), "endpoints.backend"),
    ):
        prefill, decode = pair()
        change(decode)
        with pytest.raises(MeshError) as caught:
            check_pair(prefill, decode)
        assert caught.value.reason is Reason.LAYOUT_MISMATCH
        assert caught.value.parameter == field
        assert field in caught.value.message


def test_roles_and_states_that_do_not_fit() -> None:
    prefill, decode = pair()
    with pytest.raises(MeshError) as caught:
        check_pair(decode, prefill)
    assert caught.value.reason is Reason.INVALID_PARAMETER
    decode.state = types.WORKER_STATE_DRAINING
    with pytest.raises(MeshError) as caught:
        check_pair(prefill, decode)
    assert caught.value.reason is Reason.NO_WORKER


def test_settings_bear_sglangs_names() -> None:
    environ = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "7", "PDMESH_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "8"}
    config = resolve(BootstrapConfig, environ=environ)
    assert (config.timeouts.waiting_s, config.timeouts.bootstrap_s, config.timeouts.transfer_s) == (7.0, 8.0, 300.0)
    assert (config.disaggregation_heartbeat_interval, config.disaggregation_heartbeat_max_failure) == (5.0, 2)
    for variable, value in (
        ("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "soon"),
        ("PDMESH_DISAGGREGATION_HEARTBEAT_INTERVAL", "0"),
    ):
        with pytest.raises(MeshError) as caught:
            resolve(BootstrapConfig, environ={variable: value})
        assert caught.value.reason is Reason.BAD_CONFIG


class Registry:
    """Workers with a clock that the test turns."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.timers: Timers[tuple[str, str]] = Timers(self.clock)
        self.states: list[str] = []
        self.lost: list[str] = []
        self.gone: list[str] = []
        self.workers = Workers(
            self.clock,
            self.timers,
            epoch=3,
            heartbeat_interval_s=5.0,
            heartbeat_max_failure=2,
            on_changed=lambda record, stored: self.states.append(types.WorkerState.Name(record.state)[13:]),
            on_gone=self.gone.append,
            on_lost=lambda worker_id, message: self.lost.append(worker_id),
        )

    def advance(self, seconds: float) -> None:
        end = self.clock.time + seconds
        while self.clock.time < end:
            self.clock.time = min(end, self.clock.time + 0.25)
            for _, worker_id in self.timers.due():
                self.workers.alarm(worker_id)


def test_a_silent_worker_becomes_suspect_and_then_offline() -> None:
    registry = Registry()
    outbox: Outbox[pb.ControlEvent] = Outbox()
    member = registry.workers.register(worker(types.WORKER_ROLE_DECODE), outbox)
    for _ in range(3):
        registry.advance(5.0)
        registry.workers.heartbeat(member, types.WorkerLoad(running=1))
    assert set(registry.states) == {"READY"}
    registry.advance(6.0)
    assert registry.states[-1] == "SUSPECT"
    registry.workers.heartbeat(member, types.WorkerLoad())
    assert registry.states[-1] == "READY"
    registry.advance(11.0)  # interval times failures, and a second
    assert registry.states[-1] == "OFFLINE"
    assert registry.lost == ["w"]
    assert registry.gone == []
    registry.advance(400.0)
    assert registry.gone == ["w"]
    assert registry.workers.records() == []


def test_a_new_registration_ends_the_earlier_life() -> None:
    registry = Registry()
    first_outbox: Outbox[pb.ControlEvent] = Outbox()
    first = registry.workers.register(worker(types.WORKER_ROLE_DECODE), first_outbox)
    second = registry.workers.register(worker(types.WORKER_ROLE_DECODE), Outbox())
    assert second.record.epoch > first.record.epoch > 3
    assert not first.online
    assert registry.lost == ["w"]
    registry.workers.lost(first, "its session broke")  # the old handler ends late
    assert second.online
    assert registry.workers.get("w") is second


def test_a_life_goes_on_through_a_broken_session_and_a_new_replica() -> None:
    registry = Registry()
    first = registry.workers.register(worker(types.WORKER_ROLE_DECODE), Outbox())
    again = worker(types.WORKER_ROLE_DECODE)
    again.epoch = first.record.epoch
    registry.workers.broken(first, "its session broke")
    assert registry.states[-1] == "SUSPECT"
    registry.advance(REATTACH_S / 2)
    second = registry.workers.register(again, Outbox())
    registry.workers.lost(first, "the old handler ends late")
    registry.advance(REATTACH_S)
    assert second.online
    assert second.record.epoch == again.epoch
    assert registry.states[-1] == "READY"
    assert registry.lost == []
    elsewhere = Registry()  # one that has never heard of it
    assert elsewhere.workers.register(again, Outbox()).record.epoch == again.epoch


def test_a_life_that_ended_does_not_go_on() -> None:
    registry = Registry()
    first = registry.workers.register(worker(types.WORKER_ROLE_DECODE), Outbox())
    again = worker(types.WORKER_ROLE_DECODE)
    again.epoch = first.record.epoch
    registry.workers.broken(first, "its session broke")
    registry.advance(REATTACH_S + 0.25)
    assert registry.lost == ["w"]
    second = registry.workers.register(again, Outbox())
    assert second.record.epoch > again.epoch
    registry.workers.lost(second, "it closed its session")
    registry.advance(400.0)
    assert registry.gone == ["w"]
    assert registry.workers.register(again, Outbox()).record.epoch > second.record.epoch, "though it is forgotten"
    registry.workers.register(worker(types.WORKER_ROLE_DECODE), Outbox())
    assert registry.lost == ["w"] * 3


def test_a_life_that_was_given_up_unseen_does_not_go_on() -> None:
    """An earlier bootstrap's worker did not come back in time: its writes are fenced off in the life that it had."""
    registry = Registry()
    again = worker(types.WORKER_ROLE_PREFILL)
    again.epoch = 7
    registry.workers.gave_up(again.worker_id, again.epoch)
    latest = registry.workers.latest_epoch
    assert registry.workers.register(again, Outbox()).record.epoch > max(latest, again.epoch)
    registry.workers.gave_up(again.worker_id, 1 << 40)
    assert registry.workers.get(again.worker_id).online  # type: ignore[union-attr]


def test_who_slept_gives_the_workers_another_chance() -> None:
    registry = Registry()
    member = registry.workers.register(worker(types.WORKER_ROLE_DECODE), Outbox())
    registry.clock.time += 60.0  # nothing ran meanwhile
    registry.advance(0.25)
    assert registry.lost == []
    registry.workers.heartbeat(member, types.WorkerLoad())
    registry.advance(4.0)
    assert registry.states[-1] == "READY"
    registry.clock.time += 60.0
    registry.advance(12.0)
    assert registry.lost == ["w"], "it had its chance"


def test_a_registration_without_role_or_address_is_refused() -> None:
    registry = Registry()
    for broken in (worker(types.WORKER_ROLE_UNSPECIFIED), types.Worker(role=types.WORKER_ROLE_PREFILL)):
        with pytest.raises(MeshError) as caught:
            registry.workers.register(broken, Outbox())
        assert caught.value.reason is Reason.INVALID_PARAMETER


class Flaky(MemoryStore):
    """Loses the answer to the first commits, after applying them or not; counts."""

    def __init__(self, failures: int, apply: bool) -> None:
        super().__init__()
        self.failures, self.apply = failures, apply
        self.sizes: list[int] = []

    async def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        self.sizes.append(len(writes))
        if self.failures:
            self.failures -= 1
            if self.apply:
                await super().commit(writes)
            raise MeshError(Reason.STORE_FAILED, "lost")
        return await super().commit(writes)


async def written(store: MemoryStore, steps: int = 200) -> dict[str, bytes]:
    records = Records(store, [])
    task = asyncio.create_task(records.run())
    for n in range(steps):
        records.set(f"/{n}", lambda n=n: b"old %d" % n)  # type: ignore[misc]
        records.set(f"/{n}", lambda n=n: b"%d" % n)  # type: ignore[misc]
    records.set("/gone", lambda: b"")
    records.delete("/gone")
    async with asyncio.timeout(10):
        await records.flush()
        records.set("/0", lambda: b"again")
        records.delete("/1")
        await records.flush()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    entries, _ = await store.scan("/")
    return {entry.key: entry.value for entry in entries}


@pytest.mark.parametrize(("failures", "apply"), [(0, False), (1, False), (2, True)])
async def test_records_are_written_in_groups_also_when_answers_are_lost(failures: int, apply: bool) -> None:
    store = Flaky(failures, apply)
    expected = {f"/{n}": b"%d" % n for n in range(200)} | {"/0": b"again"}
    del expected["/1"]
    assert await written(store) == expected
    assert max(store.sizes) == 64
    assert len(store.sizes) <= 4 + failures + 2


async def test_a_record_of_another_bootstrap_is_left_alone() -> None:
    store = MemoryStore()
    await store.commit([Write("/a", b"theirs")])
    records = Records(store, [])
    task = asyncio.create_task(records.run())
    records.set("/a", lambda: b"ours")
    await records.flush()
    entry = await store.get("/a")
    assert entry
    assert entry.value == b"theirs"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_outbox_gathers_and_ends() -> None:
    outbox: Outbox[int] = Outbox(limit=5)
    for n in range(3):
        outbox.put(n)
    batches = outbox.batches()
    assert await anext(batches) == [0, 1, 2]
    for n in range(6):
        outbox.put(n)
    with pytest.raises(MeshError) as caught:
        await anext(batches)
    assert caught.value.reason is Reason.OVERLOADED
