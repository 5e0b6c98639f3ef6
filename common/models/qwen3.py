"""Qwen3, dense."""

from __future__ import annotations

from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.dense import DenseDecoder, DenseOptions


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int) -> DenseDecoder:
    """Each query and key head is normalised; heads have a size of their own."""
    options = DenseOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True)
    return DenseDecoder(config, checkpoint, context_length, options)
