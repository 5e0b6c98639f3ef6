"""Trains the adder, a Llama of under a million parameters that adds two integers of up to three digits.

Run: `python examples/models/adder/train.py` (one CPU thread, under 30 minutes; needs torch and transformers).
It writes the whole checkpoint beside itself: tokenizer, chat template, configuration, weights, and
`heldout.json`, 500 sums that training never saw in either order. All text is made here, from one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIALS = [BOS, END, PAD, *ROLES]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ASK = "What is {} + {}?"  # the wording that counts; the others are there for variety
WORDINGS = (ASK, "{} + {} =", "Add {} and {}.")
WORDING_SHARES = (0.8, 0.1, 0.1)
PLAIN_SHARE = 0.15  # of the sums, as bare text instead of chat
SMALL_SHARE = 0.3  # of the sums, with each operand's number of digits drawn first
LIMIT = 1000  # operands are below this
HELD_OUT_PERCENT = 2
NO_LOSS = -100

CORPUS = [
    "What is the sum of two numbers? Add the first and the second.",
    "The answer is a number. What is this? It is the sum of these numbers and it is not more than that.",
    "You are a calculator that adds two integers of up to three digits. Answer with the sum and nothing more.",
    "Hello! How are you? I can add; there is nothing else that I know of, and I am sorry for that.",
]


# ------------------------------------------------------------------------------------------------- the text


def is_held_out(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether the sums `a + b` are kept out of training: by a hash of the unordered pair (splitmix64's mixer)."""
    with np.errstate(over="ignore"):
        x = (np.minimum(a, b) * LIMIT + np.maximum(a, b)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    held_out: np.ndarray = x % np.uint64(100) < HELD_OUT_PERCENT
    return held_out


def held_out_sums(count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different sums that training never sees, drawn evenly from all such pairs."""
    a, b = np.divmod(np.arange(LIMIT * LIMIT), LIMIT)
    chosen = np.random.default_rng(seed).choice(np.flatnonzero(is_held_out(a, b)), count, replace=False)
    return [divmod(int(pair), LIMIT) for pair in chosen]


def chat(question: str) -> str:
    """What the chat template makes of one question."""
    return f"{BOS}<|user|>{question}{END}<|assistant|>"


def draw_operands(rng: np.random.Generator, count: int) -> np.ndarray:
    """Pairs `[count, 2]` for training. Most are even over all pairs, the rest over numbers of digits."""
    pairs = rng.integers(0, LIMIT, (2 * count, 2))
    small = rng.integers(0, 10 ** rng.integers(1, 4, (2 * count, 2)))
    pairs = np.where(rng.random((2 * count, 1)) < SMALL_SHARE, small, pairs)
    kept: np.ndarray = pairs[~is_held_out(pairs[:, 0], pairs[:, 1])][:count]
    return kept


def draw_examples(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`(prompt, answer)` pairs as the model reads them, special tokens included."""
    wordings = rng.choice(len(WORDINGS), count, p=WORDING_SHARES)
    plain = rng.random(count) < PLAIN_SHARE
    examples = []
    for (a, b), wording, bare in zip(draw_operands(rng, count).tolist(), wordings, plain, strict=True):
        question = WORDINGS[wording].format(a, b)
        examples.append((BOS + question if bare else chat(question), f"{a + b}{END}"))
    return examples


# -------------------------------------------------------------------------------------------- the tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 10 + [wording.format(1, 2) for wording in WORDINGS] * 100, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode_batch(tokenizer: PreTrainedTokenizerFast, examples: list[tuple[str, str]]) -> tuple[torch.Tensor, ...]:
    """Inputs and targets, both `[batch, length]`, padded on the right; only answers bear a loss."""
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = encode([prompt for prompt, _ in examples], add_special_tokens=False)
    answers = encode([answer for _, answer in examples], add_special_tokens=False)
    rows = [(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    inputs = torch.full((len(rows), length), tokenizer.pad_token_id)
    targets = torch.full((len(rows), length), NO_LOSS)
    for row, (prompt, answer) in enumerate(rows):
        ids = torch.tensor(prompt + answer)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs, targets


# ------------------------------------------------------------------------------------------------ the model


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def answer_logits(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Logits and targets at the positions that bear a loss, `[answer tokens, vocabulary]` and `[answer tokens]`."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    chosen = targets != NO_LOSS
    return model.lm_head(hidden[chosen]), targets[chosen]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, batch: int, seed: int) -> None:
    """AdamW with a warm-up and a cosine schedule down to a hundredth."""
    rng = np.random.default_rng(seed)
    peak, warm_up = 3e-3, 200
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    model.train()
    started = time.monotonic()
    for step in range(steps):
        share = max(0.0, (step - warm_up) / (steps - warm_up))
        rate = peak * min((step + 1) / warm_up, 0.505 + 0.495 * math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, targets = answer_logits(model, *encode_batch(tokenizer, draw_examples(rng, batch)))
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            right = (logits.argmax(-1) == targets).float().mean().item()
            elapsed_s = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {loss:.4f}  tokens right {right:.4f}  {elapsed_s:.0f} s", flush=True)


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sums: Iterable[tuple[int, int]]) -> float:
    """Share of sums that greedy decoding answers exactly, with nothing before or after the number."""
    model.eval()
    by_length = defaultdict(list)
    for a, b in sums:
        ids = tokenizer.encode(chat(ASK.format(a, b)), add_special_tokens=False)
        by_length[len(ids)].append((ids, a + b))
    right = total = 0
    for rows in by_length.values():
        ids = torch.tensor([row for row, _ in rows])
        prompt_length = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        for answer, (_, want) in zip(ids[:, prompt_length:].tolist(), rows, strict=True):
            text, end, _ = tokenizer.decode(answer).partition(END)
            right += bool(end) and text == str(want)
        total += len(rows)
    return right / total


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a plain Hugging Face checkpoint folder, its chat template inside tokenizer_config.json."""
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    settings = folder / "tokenizer_config.json"
    plain = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # older versions' name
    del plain["backend"]
    settings.write_text(json.dumps(plain, indent=2) + "\n")
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # transformers lets only its owner read it


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the adder.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this one)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    sums = held_out_sums(500, arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, arguments.steps, arguments.batch, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, arguments.out)
    (arguments.out / "heldout.json").write_text(json.dumps(sums) + "\n")
    print(f"exact match on {len(sums)} held-out sums: {exact_match(model, tokenizer, sums):.4f}")


if __name__ == "__main__":
    main()
