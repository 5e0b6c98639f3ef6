"""What every store promises; the same tests for each, etcd as a real server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from common.errors.base import MeshError, Reason
from services.bootstrap.store.base import ABSENT, MAX_WRITES, Change, Changes, Guard, Store, Write
from services.bootstrap.store.etcd import EtcdStore
from services.bootstrap.store.etcd_client import EtcdClient
from services.bootstrap.store.etcd_server import EtcdServer, find_etcd
from services.bootstrap.store.memory import MemoryStore
from services.bootstrap.store.registry import make_store, parse_etcd

pytestmark = pytest.mark.contract


@pytest.fixture(params=["memory", "etcd"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    made: Store = make_store(request.param)
    await made.start()
    yield made
    await made.close()
    await made.close()


async def put(store: Store, key: str, value: bytes, expected: int | None = None) -> int:
    [outcome] = await store.commit([Write(key, value, expected)])
    assert outcome.applied
    assert outcome.current
    return outcome.current.revision


async def test_what_is_written_is_read(store: Store) -> None:
    assert await store.get("/a") is None
    revision = await put(store, "/a", b"1")
    entry = await store.get("/a")
    assert entry
    assert (entry.value, entry.revision) == (b"1", revision)
    assert await put(store, "/a", b"2") > revision
    await store.commit([Write("/a", None)])
    assert await store.get("/a") is None


async def test_scan_gives_a_prefix_in_order(store: Store) -> None:
    for key in ("/b/2", "/b/1", "/c/1", "/b0"):
        await put(store, key, key.encode())
    entries, revision = await store.scan("/b/")
    assert [entry.key for entry in entries] == ["/b/1", "/b/2"]
    assert revision >= max(entry.revision for entry in entries)


async def test_guards_hold(store: Store) -> None:
    revision = await put(store, "/a", b"1", ABSENT)
    [second] = await store.commit([Write("/a", b"2", ABSENT)])
    assert not second.applied
    assert second.current
    assert second.current.value == b"1"
    await put(store, "/a", b"3", revision)
    [stale] = await store.commit([Write("/a", None, revision)])
    assert not stale.applied
    [gone] = await store.commit([Write("/nothing", b"x", revision)])
    assert not gone.applied
    assert gone.current is None


async def test_a_guard_may_be_another_key(store: Store) -> None:
    claim = await put(store, "/claim", b"mine")
    [held] = await store.commit([Write("/a", b"1", None, Guard("/claim", claim))])
    assert held.applied
    await put(store, "/claim", b"theirs")
    [fenced] = await store.commit([Write("/a", b"2", None, Guard("/claim", claim))])
    assert not fenced.applied
    assert fenced.current == held.current
    [gone] = await store.commit([Write("/a", None, None, Guard("/nobody", ABSENT))])
    assert gone.applied
    [one_of_two] = await store.commit([Write("/a", b"3", ABSENT, Guard("/claim", claim))])
    assert not one_of_two.applied


async def test_one_guard_does_not_hinder_the_others(store: Store) -> None:
    await put(store, "/a", b"1")
    outcomes = await store.commit([Write("/a", b"2", ABSENT), Write("/b", b"2", ABSENT), Write("/c", None)])
    assert [outcome.applied for outcome in outcomes] == [False, True, True]
    entry = await store.get("/b")
    assert entry
    assert outcomes[1].current == entry


async def test_a_full_commit_has_one_revision(store: Store) -> None:
    outcomes = await store.commit([Write(f"/{n}", b"x" * 256, ABSENT) for n in range(MAX_WRITES)])
    assert len({outcome.current.revision for outcome in outcomes if outcome.current}) == 1
    with pytest.raises(ValueError, match="at most"):
        await store.commit([Write(f"/{n}", b"") for n in range(MAX_WRITES + 1)])
    with pytest.raises(ValueError, match="twice"):
        await store.commit([Write("/a", b"1"), Write("/a", b"2")])


async def test_of_many_that_race_one_wins(store: Store) -> None:
    results = await asyncio.gather(*(store.commit([Write("/one", b"%d" % n, ABSENT)]) for n in range(8)))
    assert sum(outcome.applied for [outcome] in results) == 1


async def test_watch_begins_with_a_snapshot_and_misses_nothing(store: Store) -> None:
    await put(store, "/w/old", b"0")
    async with aclosing(store.watch("/w/")) as changes:  # type: ignore[type-var]
        first = await anext(changes)
        assert first.snapshot
        assert [change.key for change in first.changes] == ["/w/old"]
        for n in range(10):
            await put(store, f"/w/{n}", b"%d" % n)
        await put(store, "/elsewhere", b"")
        await store.commit([Write("/w/0", None)])
        seen = await collect(changes, 11)
    assert [change.key for change in seen] == [*(f"/w/{n}" for n in range(10)), "/w/0"]
    assert seen[-1].value is None


async def test_watch_resumes_after_a_revision(store: Store) -> None:
    await put(store, "/w/1", b"")
    revision = await put(store, "/w/2", b"")
    await put(store, "/w/3", b"")
    async with aclosing(store.watch("/w/", revision)) as changes:  # type: ignore[type-var]
        assert [change.key for change in await collect(changes, 1)] == ["/w/3"]


async def test_what_was_announced_goes_with_its_process() -> None:
    server = EtcdServer()
    await server.start()
    try:
        first, second = (EtcdStore(EtcdClient([server.endpoint])) for _ in range(2))
        await first.start()
        await second.start()
        await first.announce("/here/1", b"x")
        assert await second.get("/here/1")
        await first.close()
        assert await second.get("/here/1") is None
        await second.close()
    finally:
        await server.stop()


@pytest.mark.parametrize("kind", ["memory", "etcd"])
async def test_a_watch_from_a_forgotten_revision_gives_a_snapshot(kind: str) -> None:
    store: Store = MemoryStore(history=2) if kind == "memory" else make_store("etcd")
    await store.start()
    try:
        first = await put(store, "/w/1", b"1")
        for n in range(5):
            last = await put(store, "/w/2", b"%d" % n)
        if isinstance(store, EtcdStore):
            await store.client.compact(last)
        async with aclosing(store.watch("/w/", first)) as changes:  # type: ignore[type-var]
            snapshot = await anext(changes)
            assert snapshot.snapshot
            assert [(c.key, c.value) for c in snapshot.changes] == [("/w/1", b"1"), ("/w/2", b"4")]
    finally:
        await store.close()


async def test_etcd_keeps_what_was_written_and_a_watch_survives_its_restart() -> None:
    server = EtcdServer()
    await server.start()
    store = EtcdStore(EtcdClient(["127.0.0.1:1", server.endpoint], timeout_s=10))  # the first is nobody
    try:
        await store.start()
        await put(store, "/w/1", b"1")
        async with aclosing(store.watch("/w/")) as changes:  # type: ignore[type-var]
            assert (await anext(changes)).snapshot
            await server.stop(remove=False)
            await server.start()
            assert (await store.get("/w/1")) is not None
            await put(store, "/w/2", b"2")
            assert [change.key for change in await collect(changes, 1)] == ["/w/2"]
    finally:
        await store.close()
        await server.stop()


async def test_etcd_with_passwords() -> None:
    """A real server that wants them; its restart makes every token void."""
    server = EtcdServer()
    await server.start()
    await etcdctl(server, "user", "add", "root", "--new-user-password", "secret")
    await etcdctl(server, "user", "grant-role", "root", "root")
    await etcdctl(server, "auth", "enable")
    wrong = EtcdStore(EtcdClient([server.endpoint], user="root", password="guess", timeout_s=1))
    nobody = EtcdStore(EtcdClient([server.endpoint], timeout_s=1))
    store = EtcdStore(EtcdClient([server.endpoint], user="root", password="secret", timeout_s=10))
    try:
        with pytest.raises(MeshError, match="authentication failed"):
            await wrong.start()
        await nobody.start()  # that etcd is there may be asked by everybody
        with pytest.raises(MeshError, match="user name is empty"):
            await nobody.get("/a")
        await store.start()
        await store.announce("/here", b"x")
        await put(store, "/w/1", b"1")
        async with aclosing(store.watch("/w/")) as changes:  # type: ignore[type-var]
            assert (await anext(changes)).snapshot
            await server.stop(remove=False)
            await server.start()
            await put(store, "/w/2", b"2")
            assert [change.key for change in await collect(changes, 1)] == ["/w/2"]
            await etcdctl(server, "--user", "root:secret", "user", "add", "other", "--new-user-password", "x")
            await put(store, "/w/3", b"3")
            assert [change.key for change in await collect(changes, 1)] == ["/w/3"]
        assert await store.get("/here")
    finally:
        for made in (wrong, nobody, store):
            await made.close()
        await server.stop()


async def etcdctl(server: EtcdServer, *arguments: str) -> None:
    """The server's own tool: what it does is none of the store's business."""
    tool = find_etcd().parent / "etcdctl"
    command = (str(tool), "--endpoints", server.endpoint, *arguments)
    environ = os.environ | {"ETCDCTL_API": "3"}
    process = await asyncio.create_subprocess_exec(*command, env=environ, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


async def test_an_etcd_that_is_not_there_is_a_store_error() -> None:
    store = EtcdStore(EtcdClient(["127.0.0.1:1"], timeout_s=0.2))
    with pytest.raises(MeshError) as caught:
        await store.start()
    assert caught.value.reason is Reason.STORE_FAILED
    await store.close()


def test_names_of_stores() -> None:
    assert parse_etcd("etcd://a:1,b:2") == ("", "", ["a:1", "b:2"])
    assert parse_etcd("etcd://user:p@ss@a:1") == ("user", "p@ss", ["a:1"])
    for wrong in ("redis", "etcd://", "etcd://host", "etcd://host:x", "etcd://a:1,,b:2"):
        with pytest.raises(MeshError) as caught:
            make_store(wrong)
        assert caught.value.reason is Reason.BAD_CONFIG


async def collect(changes: AsyncIterator[Changes], count: int) -> list[Change]:
    seen: list[Change] = []
    async with asyncio.timeout(20):
        while len(seen) < count:
            seen += (await anext(changes)).changes
    return seen
