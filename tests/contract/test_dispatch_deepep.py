"""The DeepEP backend against calls that are recorded and checked by DeepEP's own signatures; it needs no GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from common.dist.dispatch.deepep import DeepEpBuffer, check_limits
from common.dist.dispatch.modes import LowLatencyDispatch, NormalDispatch
from common.dist.group import Alone
from common.errors.base import MeshError, Reason
from common.layers.moe import Experts
from tests import recorded_deep_ep

pytestmark = pytest.mark.contract

EXPERTS, HIDDEN, TOP_K, MOST = 4, 2048, 2, 8


class OneRank(Alone):
    """A group of one that has a handle, as DeepEP wants it."""

    group = "the process group"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> recorded_deep_ep.Calls:
    monkeypatch.setitem(sys.modules, "deep_ep", recorded_deep_ep)
    recorded_deep_ep.CALLS.clear()
    return recorded_deep_ep.CALLS


def make_buffer(*, low_latency: bool) -> DeepEpBuffer:
    group = OneRank()
    return DeepEpBuffer(group, EXPERTS, HIDDEN, TOP_K, MOST, low_latency=low_latency)  # type: ignore[arg-type]


@pytest.mark.parametrize("low_latency", [False, True])
def test_each_token_gets_its_experts(low_latency: bool, calls: recorded_deep_ep.Calls) -> None:
    torch.manual_seed(0)
    x_TE = torch.randn(19, HIDDEN).bfloat16()
    expert_TK = torch.rand(19, EXPERTS).argsort(1)[:, :TOP_K]
    expert_TK[3], expert_TK[5, 1] = -1, -1
    weight_TK = torch.rand(19, TOP_K)
    buffer = make_buffer(low_latency=low_latency)
    dispatch: NormalDispatch | LowLatencyDispatch = NormalDispatch(buffer)
    if low_latency:
        dispatch = LowLatencyDispatch(buffer)
        dispatch.begin_step(19)
    out = dispatch(x_TE, expert_TK, weight_TK, Experts(0, [lambda x, k=k: x * (k + 1) for k in range(EXPERTS)]))

    factor_T = ((expert_TK + 1) * weight_TK * (expert_TK >= 0)).sum(1)
    torch.testing.assert_close(out.float(), x_TE.float() * factor_T[:, None], atol=0.05, rtol=0.03)
    names = [name for name, _ in calls]
    if low_latency:
        assert names == ["Buffer"] + ["low_latency_dispatch", "low_latency_combine"] * 3  # rounds of 8 tokens
        made = calls[0][1]
        assert (made["low_latency_mode"], made["num_qps_per_rank"]) == (True, EXPERTS)
        assert made["num_rdma_bytes"] == MOST * HIDDEN * EXPERTS
        assert calls[1][1]["num_max_dispatch_tokens_per_rank"] == MOST
    else:
        assert names == ["Buffer", "get_dispatch_layout", "dispatch", "combine"]
        assert calls[0][1]["num_nvl_bytes"] == HIDDEN * 2


def test_experts_are_numbered_in_the_whole_layer(calls: recorded_deep_ep.Calls) -> None:
    buffer = make_buffer(low_latency=False)
    buffer.first = 40  # as on a later rank
    expert_TK = torch.tensor([[0, 3], [2, -1]])
    received = buffer.dispatch(torch.zeros(2, HIDDEN).bfloat16(), expert_TK, torch.zeros(2, 2))
    assert received.expert_MK.tolist() == [[40, 43], [42, -1]]


def test_too_many_tokens(calls: recorded_deep_ep.Calls) -> None:
    buffer = make_buffer(low_latency=True)
    with pytest.raises(ValueError, match="9 tokens, but the buffer takes 8"):
        buffer.dispatch_fixed(torch.zeros(9, HIDDEN).bfloat16(), torch.zeros((9, TOP_K), dtype=torch.int64))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(MeshError, match="the package deep_ep is not installed; without it use") as caught:
        make_buffer(low_latency=True)
    assert caught.value.reason == Reason.BAD_CONFIG


def test_what_it_was_built_on_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "deep_ep":
                raise ImportError("No module named 'deep_ep_cpp'", name="deep_ep_cpp")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MeshError, match=r"deep_ep_cpp.*compiled kernels"):
        make_buffer(low_latency=True)


@pytest.mark.parametrize(
    ("experts", "hidden", "top_k", "tokens", "message"),
    [
        (6, 2048, 2, 0, "4 ranks cannot own 6 experts"),
        (8, 100, 2, 0, "hidden size of 100"),
        (16, 7168, 12, 128, "12 experts a token"),
        (8, 7168, 8, 512, "depth 1026, not 1024"),
    ],
)
def test_limits(experts: int, hidden: int, top_k: int, tokens: int, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        check_limits(Alone(0, 4), experts, hidden, top_k, tokens)
    check_limits(Alone(0, 4), 256, 7168, 8, 511)
