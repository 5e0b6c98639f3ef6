"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.dense import DenseDecoder, DenseOptions


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int) -> DenseDecoder:
    """Queries, keys and values always have a bias, the output projection never."""
    return DenseDecoder(config, checkpoint, context_length, DenseOptions(qkv_bias=True))
