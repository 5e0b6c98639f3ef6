"""The sampler, against transformers' own logits processors and plain counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.engine.messages import Sampling
from common.engine.penalties import Penalties, TokenCounts, apply_penalties
from common.engine.request import Sequence
from common.engine.sampler import cut, draw, first_to_reach, invert, least_weights, sample
from common.engine.uniform import GOLDEN_GAMMA, mix, uniforms

pytestmark = pytest.mark.unit

VOCAB = 1000


def sequence(prompt: list[int] | None = None, output: list[int] | None = None, **sampling: Any) -> Sequence:
    made = Sequence(0, prompt or [1], Sampling(**sampling), output_ids=output or [])
    made.masked_ids = (7, *made.sampling.stop_token_ids)
    return made


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_most_likely() -> None:
    logits = random_logits(5)
    expected = logits.argmax(dim=1).tolist()
    assert sample(logits.clone(), [sequence(temperature=0.0)] * 5).token_ids == expected
    assert sample(logits.clone(), [sequence(temperature=1e-9, logprobs=0)] * 5).token_ids == expected


@pytest.mark.parametrize("temperature", [1e-4, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (20, 1.0, 0.0),
        (5000, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1e-6, 0.0),
        (50, 0.8, 0.0),
        (0, 1.0, 0.05),
        (0, 1.0, 1.0),
        (50, 0.95, 0.02),
    ],
)
def test_the_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(4)
    expected = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    weights = ((logits - logits.amax(1, keepdim=True)) / temperature).exp()
    rows = [sequence(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)] * 4
    kept = weights >= least_weights(weights, rows)[:, None]
    # A token whose weight underflows to 0 cannot be drawn; that it is not filtered does not matter.
    assert torch.equal(kept & (weights > 0), expected.isfinite() & (weights > 0))


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.1), (0, 0.9), (0, 0.999999), (100, 0.9), (1024, 0.99), (1025, 1.0), (3000, 0.99)]
)
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
def test_the_head_decides_like_the_whole(top_k: int, top_p: float, spread: float) -> None:
    logits = random_logits(3, vocab=5000) * spread
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    rows = [sequence(top_k=top_k, top_p=top_p)] * 3
    with_head = least_weights(weights, rows)
    whole, _ = cut(weights, [row.sampling for row in rows], 5000)
    assert torch.equal(with_head, whole)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
def test_the_first_to_reach_is_that_of_the_plain_cumulative_sum(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randint(0, 9, (50, count), generator=generator).float()  # whole numbers: no sum is rounded
    sums = values.double().cumsum(1)
    targets = (torch.rand(50, 1, generator=generator) * 1.1 * sums[:, -1:]).round()
    assert torch.equal(first_to_reach(values, targets), torch.searchsorted(sums, targets))
    beyond = sums[:, -1:] + 1
    assert first_to_reach(values, beyond).unique().tolist() == [count]


def test_equal_tokens_are_kept_together() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.5, 0.5, 0.1]])
    assert least_weights(weights, [sequence(top_k=2)]).tolist() == [0.5]
    assert least_weights(weights, [sequence(top_p=0.5)]).tolist() == [0.5]


@pytest.mark.parametrize("vocab", [3, 256, 257, 1000])
def test_inversion_walks_the_tokens_in_order(vocab: int) -> None:
    weights = random_logits(1, vocab=vocab).exp()
    weights[0, ::3] = 0
    total = weights.double().sum()
    cumulative = weights.double().cumsum(1)[0] / total
    for uniform in np.linspace(0, 0.999, 40):
        token = invert(weights, torch.tensor([uniform], dtype=torch.float64))[0]
        assert weights[0, token] > 0
        assert cumulative[token] > uniform - 1e-6
        assert token == 0 or cumulative[token - 1] <= uniform + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_inversion_never_gives_a_token_without_weight(uniform: float) -> None:
    weights = torch.zeros(1, VOCAB)
    weights[0, 300:310] = torch.rand(10) * 1e-6 + 1e-9
    token = invert(weights, torch.tensor([uniform], dtype=torch.float64))[0]
    assert token == (300 if uniform == 0 else 309)


def test_draws_follow_the_distribution() -> None:
    vocab, draws = 40, 20_000
    logits = random_logits(1, vocab=vocab) * 0.3
    rows = [sequence(seed=seed % 100, output=[0] * (seed // 100), top_k=30) for seed in range(draws)]
    counts = np.bincount(draw(logits.expand(draws, -1), rows), minlength=vocab)
    expected = TopKLogitsWarper(30)(None, logits.clone()).softmax(dim=1)[0].numpy() * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < 29 + 4 * (2 * 29) ** 0.5  # chi-square with 29 degrees of freedom, four sigmas


def test_the_generator_is_splitmix64() -> None:
    counters = np.arange(1, 4, dtype=np.uint64) * GOLDEN_GAMMA
    assert [hex(value) for value in mix(counters)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_random_numbers_are_even_and_unrelated() -> None:
    numbers = uniforms([seed for seed in range(200) for _ in range(100)], list(range(100)) * 200).reshape(200, 100)
    assert ((numbers >= 0) & (numbers < 1)).all()
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((histogram - 1000) ** 2 / 1000).sum() < 19 + 4 * (2 * 19) ** 0.5
    for one, other in [(numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03
    assert len(np.unique(numbers)) == numbers.size
    assert uniforms([2**64 - 1, -1], [0, 0]).tolist() == [uniforms([2**64 - 1], [0])[0]] * 2


def mixed_batch() -> list[Sequence]:
    return [
        sequence(temperature=0.0),
        sequence(seed=1),
        sequence(seed=2, temperature=0.7, top_p=0.9, output=[4, 5]),
        sequence(seed=3, top_k=10, logprobs=3),
        sequence(seed=4, min_p=0.1, repetition_penalty=1.3, prompt=[3, 3, 9], output=[8]),
        sequence(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5, output=[8, 8, 2], logprobs=0),
        sequence(seed=5, top_k=3, top_p=0.99, min_p=0.01, min_new_tokens=4, stop_token_ids=(17,)),
    ]


def test_a_result_does_not_depend_on_the_batch() -> None:
    logits = random_logits(7)
    together = sample(logits.clone(), mixed_batch())
    for row, alone in enumerate(mixed_batch()):
        single = sample(logits[row : row + 1].clone(), [alone])
        assert single.token_ids == together.token_ids[row : row + 1]
        assert single.logprobs == together.logprobs[row : row + 1]
    order = [6, 2, 4, 0, 5, 1, 3]
    batch = mixed_batch()
    shuffled = sample(logits[order], [batch[row] for row in order])
    assert shuffled.token_ids == [together.token_ids[row] for row in order]


def test_a_seed_and_a_position_decide() -> None:
    logits = random_logits(1) * 0.1
    by_position = [draw(logits, [sequence(seed=3, output=[0] * n)])[0] for n in range(20)]
    assert by_position == [draw(logits, [sequence(seed=3, output=[5] * n)])[0] for n in range(20)]
    assert len(set(by_position)) > 15
    assert by_position != [draw(logits, [sequence(seed=4, output=[0] * n)])[0] for n in range(20)]


def test_penalties_are_what_they_say() -> None:
    prompt, output = [3, 3, 9, 500], [9, 8, 8, 8]
    logits = random_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    for token in set(output):
        expected[0, token] -= 0.5 * output.count(token) + 0.25
    counts = TokenCounts(prompt)
    for length in range(len(output) + 1):
        counts.update(output[:length])
    apply_penalties(logits, [Penalties(0, counts, 1.3, 0.5, 0.25)])
    torch.testing.assert_close(logits, expected)


def test_counts_grow_with_a_long_output() -> None:
    counts = TokenCounts([1, 2])
    output = [token % 77 for token in range(1000)]
    for length in range(0, 1001, 7):
        counts.update(output[:length])
    counts.update(output)
    found = dict(zip(counts.ids.tolist(), counts.generated.tolist(), strict=True))
    assert found == {token: output.count(token) for token in range(77)}


def test_the_end_is_forbidden_before_the_minimum() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 17], logits[0, 5] = 9, 8, 7
    options: dict[str, Any] = {"temperature": 0.0, "min_new_tokens": 2, "stop_token_ids": (17, VOCAB + 5)}
    assert sample(logits.clone(), [sequence(output=[1], **options)]).token_ids == [5]
    assert sample(logits.clone(), [sequence(output=[1, 1], **options)]).token_ids == [7]


def test_log_probabilities_are_raw() -> None:
    logits = random_logits(3)
    raw = logits.log_softmax(dim=1)
    rows = [
        sequence(temperature=0.0, logprobs=4, repetition_penalty=2.0),
        sequence(temperature=0.3, logprobs=0),
        sequence(temperature=0.3, top_k=2),
    ]
    sampled = sample(logits.clone(), rows)
    first, second, third = sampled.logprobs
    assert first is not None
    assert second is not None
    assert third is None
    top = raw[0].topk(4)
    assert [token for token, _ in first.top] == top.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert first.token_id == sampled.token_ids[0]
    assert second.logprob == pytest.approx(raw[1, second.token_id].item(), abs=1e-5)
    assert second.top == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(value: float) -> None:
    logits = random_logits(3)
    logits[1, 400] = value
    for options in ({"temperature": 0.0}, {"seed": 1, "logprobs": 1}):
        sampled = sample(logits.clone(), [sequence(**options)] * 3)
        assert sampled.broken == [1]
    clean = sample(random_logits(3), [sequence(seed=1)] * 3)
    assert [sampled.token_ids[row] for row in (0, 2)] == [clean.token_ids[row] for row in (0, 2)]
