"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from common.dist.parallel import Parallel
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.models.dense import DenseOptions, load_dense


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel) -> Decoder:
    """Queries, keys and values always have a bias, the output projection never."""
    return load_dense(config, checkpoint, context_length, parallel, DenseOptions(qkv_bias=True))
