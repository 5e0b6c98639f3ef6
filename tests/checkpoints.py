"""Checkpoints with random weights, and what transformers' own `generate` says about them: the oracle.

Plain random weights repeat one token, which would hide a corrupted page: the projections that make attention
scores are scaled up until greedy output wanders over the vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CONTEXT = 2048
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 256,
    },
}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-tied-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "deepseek-v3": (DeepseekV3Config, DeepseekV3ForCausalLM, DEEPSEEK | {"q_lora_rank": 24}),
    "deepseek-v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DEEPSEEK | {"q_lora_rank": 24, "topk_method": "group_limited_greedy"},
    ),
    "deepseek-v2-lite": (DeepseekV2Config, DeepseekV2ForCausalLM, DEEPSEEK | {"q_lora_rank": None}),
}


def train_tokenizer(folder: Path, vocab_size: int = 600) -> int:
    """A byte-level BPE tokenizer trained on made-up prose, with a chat template; returns its vocabulary's size."""
    rng = random.Random(7)
    syllables = ["ba", "ko", "ri", "ta", "mu", "lo", "ne", "shi", "ve", "zu", "pa", "el", "on", "qu", "é", "ü", "日"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2000)]
    text = [" ".join(rng.choices(words, k=12)) + rng.choice(".!?") for _ in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",'
        ' "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}assistant:"}'
    )
    return tokenizer.get_vocab_size()


def scale_attention(model: Any, factor: float) -> None:
    """Sharpen the attention scores, so that what stands in the cache decides what comes out."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            attention.o_proj.weight.mul_(2)
            if hasattr(attention, "kv_b_proj"):
                (attention.q_proj or attention.q_b_proj).weight.mul_(factor)
                continue
            if hasattr(attention, "q_norm"):
                attention.q_norm.weight.mul_(factor)
                attention.k_norm.weight.mul_(factor)
            else:
                attention.q_proj.weight.mul_(factor)
                attention.k_proj.weight.mul_(factor)
            attention.v_proj.weight.mul_(2)


def make_checkpoint(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a small checkpoint of `kind` whose greedy output varies; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = train_tokenizer(folder)
    config_type, model_type, extra = KINDS[kind]
    torch.manual_seed(seed)
    model = model_type(config_type(**SMALL | extra, vocab_size=vocab_size, initializer_range=0.1)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.1)
    for _ in range(6):
        if variety(model) >= 20:
            break
        scale_attention(model, 1.5)
    assert variety(model) >= 18, f"{kind}: greedy output repeats itself"
    model.save_pretrained(folder)
    return folder


def variety(model: Any) -> int:
    """Different tokens among 24 greedy ones."""
    prompt = torch.arange(20, 60).unsqueeze(0)
    out = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=1)
    return len(set(out[0, prompt.shape[1] :].tolist()))


@dataclass(frozen=True)
class Answer:
    """What the oracle generates for one prompt; `logprobs` are of the tokens it chose."""

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    closest: float  # smallest gap between the best two logits: below rounding there is no one right answer
    # (0 also where two experts' scores are that close)


class Oracle:
    """transformers on the same checkpoint, float32, one prompt at a time, end-of-sequence ignored."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.vocab_size: int = self.model.config.vocab_size
        self.routed_clearly = True
        for module in self.model.modules():
            if type(module).__name__.endswith("Router"):
                module.register_forward_hook(self.watch_router)

    def watch_router(self, router: Any, given: tuple[torch.Tensor], routed: tuple[torch.Tensor, ...]) -> None:
        """Note where the choice of experts turns on the last digits of their scores."""
        noisy = given[0] * (1 + 1e-5 * torch.randn_like(given[0]))
        self.routed_clearly &= router.forward(noisy)[2].sort().values.equal(routed[2].sort().values)

    def answer(self, prompt_ids: list[int], new_tokens: int) -> Answer:
        self.model.generation_config.eos_token_id = None
        self.routed_clearly = True
        out = self.model.generate(
            torch.tensor([prompt_ids]),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        token_ids = out.sequences[0, len(prompt_ids) :].tolist()
        logits_TV = torch.cat(out.logits)
        top_T2 = logits_TV.topk(2).values
        logprobs = logits_TV.log_softmax(-1)[torch.arange(len(token_ids)), token_ids].tolist()
        closest = float((top_T2[:, 0] - top_T2[:, 1]).min()) if self.routed_clearly else 0.0
        return Answer(prompt_ids, token_ids, logprobs, closest)

    def answers(self, count: int, longest: int, new_tokens: int, seed: int) -> list[Answer]:
        """`count` random prompts of 1 to `longest` tokens; such with a near-tie are drawn again."""
        rng = random.Random(seed)
        lengths = [1, longest, *(rng.randint(1, longest) for _ in range(count - 2))]
        found: list[Answer] = []
        while len(found) < count:
            prompt = [rng.randrange(2, self.vocab_size) for _ in range(lengths[len(found)])]
            candidate = self.answer(prompt, new_tokens)
            if candidate.closest > 2e-4:
                found.append(candidate)
        return found
