"""Chooses the next token of every sequence of a step.

Shape suffixes: S sequences of the step, R rows among them that draw, V vocabulary, B blocks of W tokens, K heaviest.

What a row gets depends on its logits, its parameters, its seed and its position alone, never on the other rows:
all arithmetic is row by row.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
import torch.nn.functional as F

from common.engine.base import Sampled
from common.engine.messages import Sampling, TokenLogprobs
from common.engine.penalties import Penalties, TokenCounts, apply_penalties
from common.engine.request import Sequence
from common.engine.uniform import uniforms

BLOCK_TOKENS = 256
HEAD_TOKENS = 1024  # the heaviest tokens, among which top-k and top-p nearly always end
ROWS_AT_ONCE = 8  # on CPU, so that what is computed of them stays in the cache


@torch.inference_mode()
def sample(logits_SV: torch.Tensor, sequences: Seq[Sequence]) -> Sampled:
    """Choose one token for every row of float32 logits, which are overwritten.

    The order is that of transformers and SGLang: minimum length, penalties, temperature, top-k, top-p, min-p.
    Log-probabilities are those of the raw logits at temperature 1.
    """
    if all(sequence.is_plain for sequence in sequences):
        token_ids, broken = most_likely(logits_SV)
        return Sampled(token_ids, [None] * len(sequences), broken)
    wanted = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    raw_RV = logits_SV[wanted]
    mask_and_penalize(logits_SV, sequences)
    token_ids, broken = most_likely(logits_SV)
    drawing = [row for row, sequence in enumerate(sequences) if not sequence.is_greedy and row not in broken]
    if drawing:
        rows_RV = logits_SV if len(drawing) == len(sequences) else logits_SV[drawing]
        drawn = draw(rows_RV, [sequences[row] for row in drawing])
        for row, token in zip(drawing, drawn, strict=True):
            token_ids[row] = token
    logprobs: list[TokenLogprobs | None] = [None] * len(sequences)
    if wanted:
        top = [sequences[row].sampling.logprobs or 0 for row in wanted]
        entries = log_probabilities(raw_RV, [token_ids[row] for row in wanted], top)
        for row, entry in zip(wanted, entries, strict=True):
            logprobs[row] = entry
    return Sampled(token_ids, logprobs, broken)


def most_likely(logits_SV: torch.Tensor) -> tuple[list[int], list[int]]:
    """The most likely token of each row (the first of equals), and the rows where there is none.

    NumPy's argmax is vectorised on CPU and ten times as fast as PyTorch's. Both stop at a NaN.
    """
    if logits_SV.device.type == "cpu":
        logits = logits_SV.numpy()
        best = logits.argmax(axis=1)
        finite = np.isfinite(logits[np.arange(len(best)), best])
        return best.tolist(), np.flatnonzero(~finite).tolist()
    values_S, best_S = logits_SV.max(dim=1)
    return best_S.tolist(), torch.nonzero(~values_S.isfinite()).flatten().tolist()


def mask_and_penalize(logits_SV: torch.Tensor, sequences: Seq[Sequence]) -> None:
    """Forbid the end before `min_new_tokens` and apply the penalties, in place."""
    vocab_size = logits_SV.shape[1]
    masked: list[int] = []
    penalties: list[Penalties] = []
    for row, sequence in enumerate(sequences):
        sampling = sequence.sampling
        if len(sequence.output_ids) < sampling.min_new_tokens:
            masked += [row * vocab_size + token for token in sequence.masked_ids if token < vocab_size]
        if sequence.is_penalized:
            if sequence.counts is None:
                sequence.counts = TokenCounts(sequence.prompt_ids)
            sequence.counts.update(sequence.output_ids)
            strengths = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
            penalties.append(Penalties(row, sequence.counts, *strengths))
    if penalties:
        apply_penalties(logits_SV, penalties)
    if masked:
        logits_SV.view(-1)[torch.tensor(masked, device=logits_SV.device)] = -torch.inf


def draw(logits_RV: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Draw a token of each row from its filtered distribution."""
    at_once = ROWS_AT_ONCE if logits_RV.device.type == "cpu" else len(sequences)
    if len(sequences) > at_once:
        parts = range(0, len(sequences), at_once)
        drawn = [draw(logits_RV[part : part + at_once], sequences[part : part + at_once]) for part in parts]
        return [token for tokens in drawn for token in tokens]
    device = logits_RV.device
    temperature_R1 = torch.tensor([[sequence.sampling.temperature] for sequence in sequences], device=device)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    weights_RV = (logits_RV - logits_RV.amax(dim=1, keepdim=True)).div_(temperature_R1).exp_()
    if any(s.sampling.top_k or s.sampling.top_p < 1 or s.sampling.min_p for s in sequences):
        drop_below(weights_RV, least_weights(weights_RV, sequences))
    seeds = [sequence.sampling.seed for sequence in sequences]
    positions = [len(sequence.output_ids) for sequence in sequences]
    return invert(weights_RV, torch.from_numpy(uniforms(seeds, positions)).to(device))


def least_weights(weights_RV: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """The least weight `[R]` that top-k, top-p and min-p let through; the most likely token weighs 1.

    Top-p counts within what top-k left, min-p is relative to the most likely token. Tokens of the same weight
    are all kept or all dropped. A row without a filter gets 0.

    Few tokens decide as a rule, so the `HEAD_TOKENS` heaviest are looked at first; rows for which they do not
    suffice, or cannot because none weighs more than 1, are sorted whole. Which it is depends on the row alone.
    """
    vocab_size = weights_RV.shape[1]
    totals = weights_RV.sum(dim=1).tolist()
    least_R = torch.tensor([sequence.sampling.min_p for sequence in sequences], device=weights_RV.device)
    rows = [row for row, s in enumerate(sequences) if s.sampling.top_k or s.sampling.top_p < 1]
    whole = [
        row
        for row in rows
        if sequences[row].sampling.top_k > HEAD_TOKENS
        or vocab_size <= HEAD_TOKENS
        or (not sequences[row].sampling.top_k and sequences[row].sampling.top_p * totals[row] > HEAD_TOKENS)
    ]
    if head := [row for row in rows if row not in whole]:
        head_RV = weights_RV if len(head) == len(sequences) else weights_RV[head]
        by_head_R, enough_R = cut(head_RV, [sequences[row].sampling for row in head], HEAD_TOKENS)
        least_R[head] = torch.maximum(least_R[head], torch.where(enough_R, by_head_R, 0))
        whole += [row for row, enough in zip(head, enough_R.tolist(), strict=True) if not enough]
    if whole:
        whole_RV = weights_RV if len(whole) == len(sequences) else weights_RV[whole]
        by_all_R, _ = cut(whole_RV, [sequences[row].sampling for row in whole], vocab_size)
        least_R[whole] = torch.maximum(least_R[whole], by_all_R)
    return least_R


def cut(weights_RV: torch.Tensor, samplings: Seq[Sampling], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least weight `[R]` that top-k and top-p let through, and whether the `count` heaviest tokens decide it."""

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=weights_RV.device)[:, None]

    top_p_R1 = column([sampling.top_p for sampling in samplings], torch.float64)
    heaviest_RK = heaviest(weights_RV, count)
    total_R1 = weights_RV.sum(dim=1, keepdim=True)
    by_k_R1 = torch.zeros_like(total_R1)
    if any(sampling.top_k for sampling in samplings):
        top_k_R1 = column([sampling.top_k for sampling in samplings], torch.int64)
        kth_R1 = heaviest_RK.gather(1, (top_k_R1 - 1).clamp(0, count - 1))
        by_k_R1 = torch.where(top_k_R1 > 0, kth_R1, 0)
        kept_R1 = (heaviest_RK * (heaviest_RK >= kth_R1)).sum(dim=1, keepdim=True)
        total_R1 = torch.where(top_k_R1 > 0, kept_R1, total_R1)
    # The last token of the smallest set whose sum reaches top_p; with top_p 1 none is left out for rounding.
    last_R1 = first_to_reach(heaviest_RK, top_p_R1 * total_R1.double())
    by_p_R1 = torch.where(top_p_R1 < 1, heaviest_RK.gather(1, last_R1.clamp(max=count - 1)), 0)
    enough_R1 = (last_R1 < count) | (top_p_R1 >= 1)
    return torch.maximum(by_k_R1, by_p_R1)[:, 0], enough_R1[:, 0]


def drop_below(weights_RV: torch.Tensor, least_R: torch.Tensor) -> None:
    """Set weights below the row's least to 0, in place; on CPU by NumPy, four times as fast as PyTorch there."""
    if weights_RV.device.type == "cpu":
        weights = weights_RV.numpy()
        np.multiply(weights, weights >= least_R.numpy()[:, None], out=weights)
    else:
        weights_RV *= weights_RV >= least_R[:, None]


def first_to_reach(values_RK: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """The first index `[R, 1]` at which the cumulative sum of `values_RK` reaches the target; K where it never does.

    Two levels, as in `invert`: a sum over the whole vocabulary in series would be the most expensive part.
    """
    rows, count = torch.arange(len(values_RK), device=values_RK.device), values_RK.shape[1]
    blocks_RBW = F.pad(values_RK, (0, -count % BLOCK_TOKENS)).view(len(rows), -1, BLOCK_TOKENS)
    sums_RB = blocks_RBW.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    block_R1 = torch.searchsorted(sums_RB, target_R1)
    within_R1 = block_R1.clamp(max=sums_RB.shape[1] - 1)
    before_R1 = F.pad(sums_RB, (1, 0)).gather(1, within_R1)
    inner_RW = blocks_RBW[rows, within_R1[:, 0]].double().cumsum(dim=1)
    # Summed in another order, a block may fall short of its own sum by a rounding error: then it is its last value.
    inner_R1 = torch.searchsorted(inner_RW, target_R1 - before_R1).clamp(max=BLOCK_TOKENS - 1)
    return torch.where(block_R1 == within_R1, block_R1 * BLOCK_TOKENS + inner_R1, count).clamp(max=count)


def heaviest(weights_RV: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest values of each row, largest first; on CPU by NumPy, whose partition is vectorised."""
    if weights_RV.device.type != "cpu":
        return weights_RV.topk(count, dim=1).values
    weights = weights_RV.numpy()
    if count < weights.shape[1]:
        weights = np.partition(weights, weights.shape[1] - count, axis=1)[:, -count:]
    return torch.from_numpy(np.sort(weights, axis=1)[:, ::-1].copy())


def invert(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> list[int]:
    """The token at which the cumulative weight, in the order of token ids, passes `uniform` of the row's total.

    Token order, unlike the order of weight, does not change with a rounding error in the logits. Two levels:
    sums of blocks find the block, a cumulative sum within it the token, so that little is summed in series. A
    token of weight 0 is never chosen.
    """
    rows = torch.arange(len(weights_RV), device=weights_RV.device)
    padding = -weights_RV.shape[1] % BLOCK_TOKENS
    blocks_RBW = F.pad(weights_RV, (0, padding)).view(len(rows), -1, BLOCK_TOKENS)
    sums_RB = blocks_RBW.sum(dim=2).double().cumsum(dim=1)
    target_R1 = just_below(uniform_R[:, None] * sums_RB[:, -1:], sums_RB[:, -1:])
    block_R = torch.searchsorted(sums_RB, target_R1, right=True)[:, 0]
    before_R1 = F.pad(sums_RB, (1, 0)).gather(1, block_R[:, None])
    inner_RW = blocks_RBW[rows, block_R].double().cumsum(dim=1)
    rest_R1 = just_below(target_R1 - before_R1, inner_RW[:, -1:])
    inner_R = torch.searchsorted(inner_RW, rest_R1, right=True)[:, 0]
    tokens: list[int] = (block_R * BLOCK_TOKENS + inner_R).tolist()
    return tokens


def just_below(values: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """`values`, but strictly below the positive `limits`."""
    return torch.minimum(values, torch.nextafter(limits, torch.zeros_like(limits)))


def log_probabilities(logits_RV: torch.Tensor, token_ids: Seq[int], top: Seq[int]) -> list[TokenLogprobs]:
    """Log-probabilities of one token of each row, and of its `top[r]` most likely ones, best first."""
    norm_R1 = logits_RV.logsumexp(dim=1, keepdim=True)
    index_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    chosen = (logits_RV.gather(1, index_R1) - norm_R1)[:, 0].tolist()
    values_RK, ids_RK = logits_RV.topk(min(max(top), logits_RV.shape[1]), dim=1)
    best = [
        tuple(zip(ids[:count], values[:count], strict=True))
        for ids, values, count in zip(ids_RK.tolist(), (values_RK - norm_R1).tolist(), top, strict=True)
    ]
    return [TokenLogprobs(*entry) for entry in zip(token_ids, chosen, best, strict=True)]
