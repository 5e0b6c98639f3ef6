"""Dispatch by DeepEP (https://github.com/deepseek-ai/DeepEP), the `Buffer` of its first generation, on NVIDIA GPUs.

See `base.ExpertBuffer`; shape suffixes there. `deep_ep` is imported when a buffer is made.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from common.config.flags import bad
from common.dist.dispatch.base import Received, ReceivedFixed
from common.dist.group import Group, TorchGroup

HIDDEN_SIZES = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)  # that its kernels were compiled for
MOST_TOP_K = 11  # in low-latency mode
QUEUE_DEPTH = 1024  # of a queue pair, unless NVSHMEM_QP_DEPTH says otherwise


class DeepEpBuffer:
    """Tensors are bfloat16: DeepEP moves no other type but FP8, which the experts here do not take."""

    def __init__(
        self, group: TorchGroup, num_experts: int, hidden: int, top_k: int, max_tokens: int, *, low_latency: bool
    ) -> None:
        """`num_experts` of the whole layer, which the ranks own in equal parts.

        Raises:
            MeshError: BAD_CONFIG for what DeepEP does not have, or a machine that has no DeepEP.
        """
        deep_ep = import_deep_ep()
        check_limits(group, num_experts, hidden, top_k, max_tokens if low_latency else 0)
        self.first = group.rank * num_experts // group.size
        self.num_experts = num_experts
        self.max_tokens = max_tokens
        hidden_bytes = hidden * torch.bfloat16.itemsize
        if low_latency:
            rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, group.size, num_experts)
            self.buffer = deep_ep.Buffer(
                group.group,
                num_rdma_bytes=rdma_bytes,
                low_latency_mode=True,
                num_qps_per_rank=num_experts // group.size,
            )
            return
        configs = (deep_ep.Buffer.get_dispatch_config(group.size), deep_ep.Buffer.get_combine_config(group.size))
        self.buffer = deep_ep.Buffer(
            group.group,
            num_nvl_bytes=max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size) for config in configs),
            num_rdma_bytes=max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size) for config in configs),
        )

    def dispatch(self, x_TE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> Received:
        """See `base.ExpertBuffer.dispatch`."""
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(expert_TK, self.num_experts)
        x_ME, local_MK, weight_MK, _, handle, _ = self.buffer.dispatch(
            x_TE,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=expert_TK,
            topk_weights=weight_TK.float(),
        )
        expert_MK = (local_MK + self.first).where(local_MK >= 0, -1)  # it numbers this rank's experts from 0
        return Received(x_ME, expert_MK, weight_MK, handle)

    def combine(self, sums_ME: torch.Tensor, handle: Any) -> torch.Tensor:
        """See `base.ExpertBuffer.combine`."""
        out_TE: torch.Tensor = self.buffer.combine(sums_ME, handle)[0]
        return out_TE

    def dispatch_fixed(self, x_TE: torch.Tensor, expert_TK: torch.Tensor) -> ReceivedFixed:
        """See `base.ExpertBuffer.dispatch_fixed`."""
        if len(x_TE) > self.max_tokens:
            raise ValueError(f"{len(x_TE)} tokens, but the buffer takes {self.max_tokens} of a rank at once")
        x_LSE, count_L, handle, _, _ = self.buffer.low_latency_dispatch(
            x_TE, expert_TK, self.max_tokens, self.num_experts, use_fp8=False
        )
        return ReceivedFixed(x_LSE, count_L, handle)

    def combine_fixed(
        self, y_LSE: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, handle: Any
    ) -> torch.Tensor:
        """See `base.ExpertBuffer.combine_fixed`."""
        out_TE: torch.Tensor = self.buffer.low_latency_combine(y_LSE, expert_TK, weight_TK.float(), handle)[0]
        return out_TE


def import_deep_ep() -> Any:
    try:
        return importlib.import_module("deep_ep")
    except ImportError as error:
        missing = error.name or str(error)
        what = (
            "the package deep_ep is not installed"
            if missing == "deep_ep"
            else f"deep_ep cannot be imported ({error}); it wants CUDA, NVSHMEM and its own compiled kernels"
        )
        raise bad(f"--moe-a2a-backend deepep: {what}; without it use --moe-a2a-backend torch") from None


def check_limits(group: Group, num_experts: int, hidden: int, top_k: int, max_tokens: int) -> None:
    """Raises `MeshError` (BAD_CONFIG) for what DeepEP's kernels do not do; `max_tokens` is 0 in normal mode."""
    depth = int(os.environ.get("NVSHMEM_QP_DEPTH", QUEUE_DEPTH))
    problems: Sequence[tuple[bool, str]] = (
        (num_experts % group.size != 0, f"{group.size} ranks cannot own {num_experts} experts in equal parts"),
        (hidden not in HIDDEN_SIZES, f"a hidden size of {hidden} is not one of {', '.join(map(str, HIDDEN_SIZES))}"),
        (max_tokens > 0 and top_k > MOST_TOP_K, f"{top_k} experts a token is more than {MOST_TOP_K}"),
        (
            2 * (max_tokens + 1) > depth,
            f"{max_tokens} tokens of a rank at once want queue pairs of depth {2 * (max_tokens + 1)}, "
            f"not {depth} (NVSHMEM_QP_DEPTH)",
        ),
    )
    for present, what in problems:
        if present:
            raise bad(f"--moe-a2a-backend deepep: {what}")
