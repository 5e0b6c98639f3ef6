"""What of `deep_ep` is called, with the signatures that it documents, for one rank: it records, and moves nothing.

Parameters and results are those of `deep_ep/buffer.py` (version 1) as its docstrings give them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Calls = list[tuple[str, dict[str, Any]]]
CALLS: Calls = []


def record(name: str, values: dict[str, Any]) -> None:
    CALLS.append((name, {key: value for key, value in values.items() if key != "self"}))


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    """One rank that owns all experts, so that what is sent is what comes."""

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
        allow_nvlink_for_low_latency_mode: bool = True,
    ) -> None:
        record("Buffer", locals())
        self.low_latency_mode = low_latency_mode

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config()

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        return num_max_dispatch_tokens_per_rank * hidden * num_ranks * num_experts

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, Any]:
        record("get_dispatch_layout", locals())
        assert topk_idx.dtype == torch.int64
        some_T1 = (topk_idx >= 0).any(1, keepdim=True)
        per_expert = topk_idx[topk_idx >= 0].bincount(minlength=num_experts).int()
        return some_T1.sum(0).int(), None, per_expert, some_T1, None

    def dispatch(
        self,
        x: torch.Tensor,
        handle: Any = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Any, Any]:
        record("dispatch", locals())
        assert not self.low_latency_mode
        assert x.dtype == torch.bfloat16
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert is_token_in_rank is not None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        went = is_token_in_rank[:, 0]
        assert int(num_tokens_per_rank) == int(went.sum())
        return x[went], topk_idx[went], topk_weights[went], num_tokens_per_expert.tolist(), went, None

    def combine(
        self,
        x: torch.Tensor,
        handle: Any,
        topk_weights: torch.Tensor | None = None,
        config: Any = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        record("combine", locals())
        assert x.dtype == torch.bfloat16
        out = x.new_zeros((len(handle), x.shape[1]))
        out[handle] = x
        return out, None, None

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, Any, Any, Callable[[], None] | None]:
        record("low_latency_dispatch", locals())
        assert self.low_latency_mode
        assert (x.dtype, topk_idx.dtype, use_fp8) == (torch.bfloat16, torch.int64, False)
        packed = x.new_full((num_experts, num_max_dispatch_tokens_per_rank, x.shape[1]), torch.nan)
        counts = torch.zeros(num_experts, dtype=torch.int32)
        source = torch.full(packed.shape[:2], -1)
        for token, experts in enumerate(topk_idx.tolist()):
            for expert in experts:
                if expert >= 0:
                    slot = int(counts[expert])
                    packed[expert, slot], source[expert, slot] = x[token], token
                    counts[expert] += 1
        return packed, counts, source, None, None

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any, Callable[[], None] | None]:
        record("low_latency_combine", locals())
        assert topk_weights.dtype == torch.float32
        combined = torch.zeros(len(topk_idx), x.shape[2])
        for expert, slot in (handle >= 0).nonzero().tolist():
            token = int(handle[expert, slot])
            combined[token] += topk_weights[token][topk_idx[token] == expert] * x[expert, slot].float()
        return combined.to(x.dtype), None, None
