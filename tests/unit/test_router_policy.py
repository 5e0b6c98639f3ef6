"""Policies choose as they say, over workers that come and go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest

from pdmesh.v1 import types_pb2
from services.router.policy.least_loaded import LeastLoaded
from services.router.policy.random import Random
from services.router.policy.registry import NAMES, make_policy
from services.router.policy.round_robin import RoundRobin
from services.router.request import GenerationRequest, Sampling, ServedModel

pytestmark = pytest.mark.unit

REQUEST = GenerationRequest("id", "grpc", ServedModel("m", "", 9, 9, 0.0), [[1]], Sampling(seed=0), None, 0.0)


@dataclass
class Stub:
    """A candidate."""

    worker_id: str
    in_flight: int = 0
    record: types_pb2.Worker = field(default_factory=lambda: types_pb2.Worker(max_running_requests=10))


def workers(*names: str) -> list[Stub]:
    return [Stub(name) for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_chooses_one_of_those_given(name: str) -> None:
    policy = make_policy(name)
    for count in (1, 2, 5):
        given = workers(*(str(number) for number in range(count)))
        for _ in range(20):
            assert policy.choose(given, REQUEST) in given


def test_random_reaches_all_alike() -> None:
    policy = Random(seed=1)
    counts = Counter(policy.choose(workers("a", "b", "c"), REQUEST).worker_id for _ in range(3000))
    assert all(900 < count < 1100 for count in counts.values())


def test_round_robin_goes_on_when_workers_come_and_go() -> None:
    policy = RoundRobin()
    chosen = [policy.choose(workers("b", "a", "c"), REQUEST).worker_id for _ in range(4)]
    assert chosen == ["a", "b", "c", "a"]
    assert policy.choose(workers("a", "c"), REQUEST).worker_id == "c"
    assert policy.choose(workers("a", "b", "d"), REQUEST).worker_id == "d"
    assert policy.choose(workers("a", "b"), REQUEST).worker_id == "a"


def test_least_loaded_follows_what_is_sent_and_what_is_told() -> None:
    policy = LeastLoaded(seed=1)
    light, heavy = Stub("light", in_flight=1), Stub("heavy", in_flight=2)
    assert {policy.choose([light, heavy], REQUEST).worker_id for _ in range(20)} == {"light"}
    light.record.load.running, light.record.load.waiting = 3, 4
    assert {policy.choose([light, heavy], REQUEST).worker_id for _ in range(20)} == {"heavy"}
    heavy.record.max_running_requests = 2
    assert {policy.choose([light, heavy], REQUEST).worker_id for _ in range(20)} == {"light"}


def test_least_loaded_spreads_evenly() -> None:
    policy, given = LeastLoaded(seed=1), workers(*"abcd")
    for _ in range(400):
        policy.choose(given, REQUEST).in_flight += 1
    assert all(95 <= worker.in_flight <= 105 for worker in given)
