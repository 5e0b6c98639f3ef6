"""Expert dispatch: whatever the mode, buffer and shapes, each token gets the weighted sum of its experts.

Ranks are threads here; over gloo the same runs with whole models in test_tensor_parallel.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from common.dist.dispatch.base import ExpertBuffer, ExpertDispatch
from common.dist.dispatch.modes import LowLatencyDispatch, NormalDispatch
from common.dist.dispatch.torch import TorchBuffer
from common.dist.group import ALONE
from common.layers.moe import Experts
from tests.thread_group import ThreadGroup, World, run_threads

pytestmark = pytest.mark.contract

EXPERTS, HIDDEN, MOST = 8, 6, 16
WEIGHT_XEE = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(1))


@dataclass
class Load:
    """One rank's tokens."""

    x_TE: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor

    def wanted(self) -> torch.Tensor:
        """The answer by loops."""
        out_TE = torch.zeros_like(self.x_TE)
        for token, (experts, weights) in enumerate(zip(self.expert_TK.tolist(), self.weight_TK.tolist(), strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                if expert >= 0:
                    out_TE[token] += weight * (WEIGHT_XEE[expert] @ self.x_TE[token])
        return out_TE


def make_load(tokens: int, top_k: int, seed: int, *, one_expert: bool = False, some_none: bool = False) -> Load:
    draw = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(tokens, EXPERTS, generator=draw).argsort(1)[:, :top_k]
    if one_expert:
        expert_TK = torch.zeros_like(expert_TK)
        expert_TK[:, 1:] = -1
    if some_none:
        expert_TK = expert_TK.masked_fill(torch.rand(expert_TK.shape, generator=draw) < 0.4, -1)
    x_TE, weight_TK = torch.randn(tokens, HIDDEN, generator=draw), torch.rand(tokens, top_k, generator=draw)
    return Load(x_TE, expert_TK, weight_TK)


def owned_by(rank: int, size: int) -> Experts:
    each = EXPERTS // size
    owned = WEIGHT_XEE[rank * each : (rank + 1) * each]
    return Experts(rank * each, [lambda x, w=weight: x @ w.T for weight in owned])


def make_dispatch(mode: str, buffer: ExpertBuffer, most_tokens: int) -> ExpertDispatch:
    if mode == "normal":
        return NormalDispatch(buffer)
    dispatch = LowLatencyDispatch(buffer)
    dispatch.begin_step(most_tokens)
    return dispatch


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "kind"),
    [
        ((7,), 3, {}),
        ((5, 9), 1, {}),
        ((0, 9), 2, {}),
        ((0, 0), 2, {}),
        ((3, 0, 16, 1), 4, {}),
        ((40, 2, 0, 33), 2, {}),  # more than the low-latency buffer takes at once
        ((16, 16, 16, 16), 3, {"one_expert": True}),
        ((9, 12), 3, {"some_none": True}),
    ],
    ids=str,
)
def test_each_token_gets_its_experts(mode: str, tokens: tuple[int, ...], top_k: int, kind: dict[str, bool]) -> None:
    size = len(tokens)
    loads = [make_load(count, top_k, seed, **kind) for seed, count in enumerate(tokens)]

    def rank_main(group: ThreadGroup) -> list[torch.Tensor]:
        dispatch = make_dispatch(mode, TorchBuffer(group, EXPERTS, MOST), max(tokens))
        experts, load = owned_by(group.rank, size), loads[group.rank]
        return [dispatch(load.x_TE, load.expert_TK, load.weight_TK, experts) for _ in range(2)]

    for load, outs in zip(loads, run_threads(size, rank_main), strict=True):
        for out in outs:
            torch.testing.assert_close(out, load.wanted(), atol=1e-5, rtol=1e-5)


def test_random_shapes() -> None:
    rng = random.Random(5)
    for seed in range(30):
        size = rng.choice([1, 2, 4, 8])
        tokens = tuple(rng.choice([0, 1, rng.randrange(40)]) for _ in range(size))
        kind = {"some_none": rng.random() < 0.3}
        test_each_token_gets_its_experts(rng.choice(["normal", "low-latency"]), tokens, rng.randrange(1, 9), kind)
        print(seed, size, tokens)  # of the one that fails


def test_the_fixed_shape() -> None:
    """`[local experts, ranks * most, hidden]` with counts, whoever has how many tokens; the rest means nothing."""
    tokens = (16, 3)
    loads = [make_load(count, 2, seed) for seed, count in enumerate(tokens)]
    everybodys = torch.cat([load.expert_TK.flatten() for load in loads]).bincount(minlength=EXPERTS)

    def rank_main(group: ThreadGroup) -> torch.Tensor:
        load, experts = loads[group.rank], owned_by(group.rank, 2)
        buffer = TorchBuffer(group, EXPERTS, MOST)
        received = buffer.dispatch_fixed(load.x_TE, load.expert_TK)
        assert received.x_LSE.shape == (EXPERTS // 2, 2 * MOST, HIDDEN)
        assert received.count_L.tolist() == everybodys[experts.first : experts.first + experts.count].tolist()
        y_LSE = torch.full_like(received.x_LSE, torch.nan)
        for expert, count in enumerate(received.count_L.tolist()):
            y_LSE[expert, :count] = experts.blocks[expert](received.x_LSE[expert, :count])
        return buffer.combine_fixed(y_LSE, load.expert_TK, load.weight_TK, received.handle)

    for load, out in zip(loads, run_threads(2, rank_main), strict=True):
        torch.testing.assert_close(out, load.wanted(), atol=1e-5, rtol=1e-5)


def test_too_many_tokens_are_refused_not_overflowed() -> None:
    load = make_load(MOST + 1, 2, 0)
    buffer = TorchBuffer(ALONE, EXPERTS, MOST)
    with pytest.raises(ValueError, match="17 tokens, but the buffer takes 16"):
        buffer.dispatch_fixed(load.x_TE, load.expert_TK)
    dispatch = LowLatencyDispatch(buffer)
    with pytest.raises(ValueError, match="17 tokens in 1 rounds of 16"):
        dispatch(load.x_TE, load.expert_TK, load.weight_TK, owned_by(0, 1))
    for wrong in (0, 1025):
        with pytest.raises(ValueError, match="between 1 and 1024"):
            TorchBuffer(ALONE, EXPERTS, wrong)
    with pytest.raises(ValueError, match="cannot own 9 experts"):
        TorchBuffer(ThreadGroup(0, 2, World()), 9)


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
def test_only_tokens_that_exist_travel(mode: str) -> None:
    """In normal mode once to each other rank that owns an expert of them, else once to each such expert."""
    tokens = (40, 1, 0, 7)
    loads = [make_load(count, 3, seed) for seed, count in enumerate(tokens)]

    def rank_main(group: ThreadGroup) -> tuple[int, int, int]:
        buffer, load = TorchBuffer(group, EXPERTS, MOST), loads[group.rank]
        make_dispatch(mode, buffer, max(tokens))(load.x_TE, load.expert_TK, load.weight_TK, owned_by(group.rank, 4))
        ranks = [[expert // 2 for expert in experts] for experts in load.expert_TK.tolist()]
        if mode == "normal":
            ranks = [list(set(owners)) for owners in ranks]
        return buffer.dispatched, buffer.combined, sum(owner != group.rank for owners in ranks for owner in owners)

    told = run_threads(4, rank_main)
    for dispatched, _, wanted in told:
        assert dispatched == wanted
    assert sum(combined for _, combined, _ in told) == sum(wanted for _, _, wanted in told)
