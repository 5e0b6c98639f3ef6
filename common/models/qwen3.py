"""Qwen3, dense."""

from __future__ import annotations

from common.dist.parallel import Parallel
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.models.dense import DenseOptions, load_dense


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel) -> Decoder:
    """Each query and key head is normalised; heads have a size of their own."""
    options = DenseOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, qk_norm=True)
    return load_dense(config, checkpoint, context_length, parallel, options)
