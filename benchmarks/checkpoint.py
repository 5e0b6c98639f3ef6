"""Checkpoints with random weights, made once under the system's temporary folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA_125M: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def llama(shape: dict[str, Any] = LLAMA_125M, dtype: str = "bfloat16") -> Path:
    """The folder of a Llama of that shape, with a tokenizer of one visible word for every token."""
    name = hashlib.sha256(json.dumps([shape, dtype], sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"pdmesh-benchmark-llama-{name}"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        tokenizer(shape["vocab_size"]).save_pretrained(folder)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Whatever a random model says, each of its tokens is an event of the stream."""
    words = {f" w{number}": number for number in range(size)}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token=" w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token=" w0")
