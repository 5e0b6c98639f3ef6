"""Llama 2, 3, 3.1 and 3.2, and models saved in their form."""

from __future__ import annotations

from common.dist.parallel import Parallel
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.models.dense import DenseOptions, load_dense


def load(config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel) -> Decoder:
    """Biases, rare in this family, are on where the config says so."""
    options = DenseOptions(qkv_bias=config.attention_bias, output_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    return load_dense(config, checkpoint, context_length, parallel, options)
