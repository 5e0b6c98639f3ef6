"""Every model family against transformers: logits and greedy tokens, in chunks, mixed batches and scattered pages."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from common.engine.config import EngineConfig
from common.engine.runner import Chunk, ModelRunner
from common.kvcache.pool import KvPool
from tests.checkpoints import scale_attention, variety

pytestmark = pytest.mark.unit

VOCAB, PAGE, PAGES = 320, 8, 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.0,
}
GROUPS = {"n_group": 4, "topk_group": 2}
DEEPSEEK_YARN = YARN | {"rope_theta": 5000.0, "mscale": 1.0, "mscale_all_dim": 0.8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [1.0 + i / 2 for i in range(8)],
    "original_max_position_embeddings": 256,
    "factor": 4.0,
}


def llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**SMALL | changes)


def deepseek_v3(**changes: Any) -> PreTrainedConfig:
    return DeepseekV3Config(**SMALL | LATENT | GROUPS | {"q_lora_rank": 24} | changes)


def deepseek_v2(**changes: Any) -> PreTrainedConfig:
    return DeepseekV2Config(**SMALL | LATENT | {"n_shared_experts": 2} | changes)


def qwen3_moe(**changes: Any) -> PreTrainedConfig:
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 32}
    return Qwen3MoeConfig(**SMALL | experts | changes)


def mixtral(**changes: Any) -> PreTrainedConfig:
    return MixtralConfig(**SMALL | {"num_local_experts": 4} | changes)


def scaled(**rope: Any) -> PreTrainedConfig:
    return llama(rope_parameters={"rope_theta": 5000.0} | rope)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama,
    "llama-tied-biased": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-multi-head": lambda: llama(num_key_value_heads=4),
    "llama-one-kv-head": lambda: llama(num_key_value_heads=1),
    "llama-wide-heads": lambda: llama(head_dim=32),
    "llama-linear": lambda: scaled(rope_type="linear", factor=2.0),
    "llama-dynamic": lambda: scaled(rope_type="dynamic", factor=2.0),
    "llama-llama3": lambda: scaled(**LLAMA3),
    "llama-yarn": lambda: scaled(**YARN),
    "llama-yarn-mscale": lambda: scaled(**YARN, mscale=1.2, mscale_all_dim=0.8, beta_fast=16, beta_slow=2),
    "llama-yarn-continuous": lambda: scaled(**YARN, truncate=False, attention_factor=1.3),
    "llama-longrope": lambda: scaled(**LONGROPE),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen2-tied": lambda: Qwen2Config(**SMALL | {"tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "qwen3-biased": lambda: Qwen3Config(**SMALL | {"tie_word_embeddings": True, "attention_bias": True}, head_dim=16),
    "qwen3-moe": lambda: qwen3_moe(norm_topk_prob=True),
    "qwen3-moe-some-dense": lambda: qwen3_moe(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1]),
    "mixtral": mixtral,
    "deepseek-v3": deepseek_v3,
    "deepseek-v3-yarn": lambda: deepseek_v3(rope_parameters=DEEPSEEK_YARN),
    "deepseek-v3-halves": lambda: deepseek_v3(rope_interleave=False, n_group=1, topk_group=1, attention_bias=True),
    "deepseek-v3-not-normalised": lambda: deepseek_v3(norm_topk_prob=False, q_lora_rank=None, n_shared_experts=2),
    "deepseek-v2-lite": lambda: deepseek_v2(q_lora_rank=None, rope_parameters=DEEPSEEK_YARN),
    "deepseek-v2": lambda: deepseek_v2(q_lora_rank=24, topk_method="group_limited_greedy", **GROUPS),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(
    config: PreTrainedConfig, folder: Path, dtype: torch.dtype = torch.float32, *, varied: bool = True
) -> PreTrainedModel:
    """A model whose greedy text varies, with biases and norms that are not the identity."""
    torch.manual_seed(0)
    config.initializer_range = 0.1
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.1 * torch.randn_like(buffer))
    for _ in range(6 if varied else 0):
        if variety(model) >= 18:
            break
        scale_attention(model, 1.5)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model


def load_runner(folder: Path, **changes: Any) -> ModelRunner:
    runner = ModelRunner.load(EngineConfig(model_path=str(folder), page_size=PAGE, device="cpu", **changes))
    runner.attach_pool(KvPool(runner.layout, PAGES))
    return runner


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(3, VOCAB), k=length)


def scattered_pages(seed: int = 0) -> list[int]:
    pages = list(range(PAGES))
    random.Random(seed).shuffle(pages)
    return pages


@dataclass
class Sequence:
    """A sequence that is prefilled in chunks and then decoded greedily, one step at a time."""

    prompt: list[int]
    pages: list[int]
    chunk: int
    output: list[int] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    computed: int = 0

    def next_chunk(self) -> Chunk:
        known = self.prompt + self.output
        ids = known[self.computed : self.computed + self.chunk]
        return Chunk(self.computed, ids, self.pages, self.computed + len(ids) == len(known))

    def take(self, chunk: Chunk, row: torch.Tensor | None) -> None:
        self.computed += len(chunk.token_ids)
        if row is not None:
            self.rows.append(row)
            self.output.append(int(row.argmax()))


def step(runner: ModelRunner, sequences: list[Sequence]) -> None:
    chunks = [sequence.next_chunk() for sequence in sequences]
    rows = iter(runner.run(chunks))
    for sequence, chunk in zip(sequences, chunks, strict=True):
        sequence.take(chunk, next(rows) if chunk.sample else None)


def expected(model: PreTrainedModel, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of transformers, and the logits that chose them."""
    result = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits).float()


def assert_equal_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal but for the order of sums, which sharp attention magnifies: both stray as far from float64."""
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def in_float32(folder: Path) -> PreTrainedModel:
    """The saved model, loaded anew: `model.float()` would keep rotary frequencies that were rounded."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(CONFIGS[name](), tmp_path)
    runner = load_runner(tmp_path)
    ids, logits = expected(model, prompt_of(45), 64)
    assert len(set(ids)) > 16  # a varied text is what makes this test see anything
    sequence = Sequence(prompt_of(45), scattered_pages(), chunk=19)
    while len(sequence.output) < 64:
        step(runner, [sequence])
    assert sequence.output == ids
    rows = torch.stack(sequence.rows)
    assert_equal_logits(rows, logits)
    torch.testing.assert_close(rows.log_softmax(-1), logits.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_to_rounding(name: str, tmp_path: Path) -> None:
    """Where attention is mild, all that is left is rounding."""
    model = make_model(CONFIGS[name](), tmp_path, varied=False)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_of(200)])).logits[0, -1]
    row = load_runner(tmp_path).run([Chunk(0, prompt_of(200), scattered_pages(), True)])[0]
    torch.testing.assert_close(row, logits, atol=1e-5, rtol=0)


def test_dynamic_scaling_beyond_the_trained_length(tmp_path: Path) -> None:
    config = llama(rope_parameters={"rope_theta": 5000.0, "rope_type": "dynamic", "factor": 4.0})
    config.max_position_embeddings = 64
    model = make_model(config, tmp_path)
    runner = load_runner(tmp_path)
    assert runner.context_length == 256
    sequence = Sequence(prompt_of(40), scattered_pages(), chunk=64)
    while len(sequence.output) < 64:
        step(runner, [sequence])
    assert sequence.output == expected(model, prompt_of(40), 64)[0]


@pytest.mark.parametrize("make_config", [lambda: Qwen3Config(**SMALL, head_dim=16), deepseek_v3, mixtral])
def test_mixed_batch_equals_each_alone(make_config: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    """Prompts of many lengths, chunked, join at different steps; each gets transformers' tokens."""
    model = make_model(make_config(), tmp_path)
    runner = load_runner(tmp_path)
    pages = iter(scattered_pages(1))
    lengths = [1, 2, 7, 8, 9, 16, 33, 64, 100]
    waiting = [
        Sequence(prompt_of(length, 7), [next(pages) for _ in range(runner.layout.pages_for(length + 12))], chunk=16)
        for length in lengths
    ]
    everyone = list(waiting)
    running: list[Sequence] = []
    while waiting or running:
        if waiting:
            running.append(waiting.pop(len(waiting) // 2))
        step(runner, running)
        running = [sequence for sequence in running if len(sequence.output) < 12]
    for sequence in everyone:
        assert sequence.output == expected(model, sequence.prompt, 12)[0]


def test_rows_follow_the_chunks(tmp_path: Path) -> None:
    """Logits come in the caller's order, whatever the layout of the step, and only where they are wanted."""
    make_model(llama(), tmp_path)
    runner = load_runner(tmp_path)
    prompts = [prompt_of(length, 3) for length in (5, 1, 9, 1, 3)]
    chunks = [Chunk(0, ids, [2 * i, 2 * i + 1], True) for i, ids in enumerate(prompts)]
    together = runner.run(chunks)
    assert together.dtype == torch.float32
    assert together.shape == (5, VOCAB)
    for row, chunk in zip(together, chunks, strict=True):
        torch.testing.assert_close(row, runner.run([chunk])[0], atol=1e-5, rtol=1e-5)
    chunks[0].sample = chunks[3].sample = False
    torch.testing.assert_close(runner.run(chunks), together[[1, 2, 4]], atol=1e-5, rtol=1e-5)
    assert runner.run(chunks[:1]).shape == (0, VOCAB)


@pytest.mark.parametrize("make_config", [llama, deepseek_v3])
def test_an_overwritten_page_changes_the_output(make_config: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    """The control: the models of these tests do depend on every page."""
    make_model(make_config(), tmp_path)
    runner = load_runner(tmp_path)
    pool = KvPool(runner.layout, PAGES)
    runner.attach_pool(pool)
    pages, prompt = scattered_pages()[:6], prompt_of(41)
    runner.run([Chunk(0, prompt[:40], pages, False)])
    whole = runner.run([Chunk(40, prompt[40:], pages, True)])
    pool.tensor[pages[2]] = pool.tensor[pages[1]]
    damaged = runner.run([Chunk(40, prompt[40:], pages, True)])
    assert (whole - damaged).abs().max() > 1e-2


@pytest.mark.parametrize("make_config", [llama, deepseek_v3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, make_config: Callable[[], PreTrainedConfig], tmp_path: Path) -> None:
    """Close to the same weights in float32; chunks and single tokens agree with one another."""
    make_model(make_config(), tmp_path, getattr(torch, dtype))
    runner = load_runner(tmp_path)
    assert runner.layout.dtype == dtype
    prompt = prompt_of(50)
    with torch.no_grad():
        logits = in_float32(tmp_path)(torch.tensor([prompt])).logits[0]
    sequence = Sequence(prompt, scattered_pages(), chunk=23)
    while not sequence.output:
        step(runner, [sequence])
    apart = (sequence.rows[0] - logits[-1]).abs().max()
    assert apart < (0.1 if dtype == "bfloat16" else 0.02) * logits[-1].abs().max()


def test_float16_checkpoint_in_float32(tmp_path: Path) -> None:
    make_model(llama(), tmp_path, torch.float16)
    runner = load_runner(tmp_path, dtype="float32")
    with torch.no_grad():
        logits = in_float32(tmp_path)(torch.tensor([prompt_of(20)])).logits[0, -1]
    row = runner.run([Chunk(0, prompt_of(20), scattered_pages(), True)])[0]
    assert_equal_logits(row, logits)


def test_config_of_transformers_4(tmp_path: Path) -> None:
    """`rope_theta`, `rope_scaling` and `torch_dtype`, with the kind called `type`."""
    model = make_model(scaled(**YARN), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"]
    path.write_text(json.dumps(config))
    runner = load_runner(tmp_path)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_of(30)])).logits[0, -1]
    row = runner.run([Chunk(0, prompt_of(30), scattered_pages(), True)])[0]
    assert_equal_logits(row, logits)
