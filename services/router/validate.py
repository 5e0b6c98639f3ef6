"""From a draft to a request that workers can take, or to a `MeshError` that says what is wrong with it."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.errors.base import MeshError, Reason
from common.text.tokenizer import Tokenizer
from services.router.request import Draft, GenerationRequest, Sampling, ServedModel

MAX_N = 128
MAX_SEQUENCES = 1024
MAX_STOP_STRINGS, MAX_STOP_CHARACTERS, MAX_STOP_TOKENS = 32, 1024, 256
MAX_LOGPROBS = 20
GREEDY_BELOW = 1e-5  # a smaller temperature would overflow the logits
LARGEST = 1e6  # of anything unbounded: stays finite in float32
MAX_SEED = (1 << 64) - 1
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def check_request_id(request_id: str, names: Mapping[str, str]) -> None:
    """Ids go into headers and logs: no spaces, no control characters."""
    if not REQUEST_ID.fullmatch(request_id):
        raise refusal("request_id", "must be 1 to 128 visible ASCII characters", names)


def validate(
    draft: Draft, model: ServedModel, tokenizer: Tokenizer | None, prompts: list[list[int]], deadline: float
) -> GenerationRequest:
    """Check `draft`, whose prompts were tokenized to `prompts`, and fill in what it leaves open.

    Raises `MeshError` with INVALID_PARAMETER, EMPTY_PROMPT, TOKEN_OUT_OF_RANGE or CONTEXT_TOO_LONG and the name
    of the field at fault, as the client's API calls it.
    """
    names = draft.names
    sampling = check_sampling(draft.sampling, model, names)
    if not prompts:
        raise MeshError(Reason.EMPTY_PROMPT, "there is no prompt", parameter=names.get("prompt", "prompt"))
    if len(prompts) * sampling.n > MAX_SEQUENCES:
        raise refusal("n", f"times the number of prompts must be at most {MAX_SEQUENCES}", names)
    for prompt in prompts:
        check_prompt(prompt, model, names)
        check_room(len(prompt), sampling, model, names)
    if sampling.max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=draft.default_max_new_tokens)
        shortest = min(model.context_length - max(map(len, prompts)), sampling.max_new_tokens or model.context_length)
        if sampling.min_new_tokens > shortest:
            raise refusal("min_new_tokens", f"must be at most {shortest}, the most that can be generated", names)
    return GenerationRequest(draft.request_id, draft.api, model, prompts, sampling, tokenizer, deadline)


def check_sampling(sampling: Sampling, model: ServedModel, names: Mapping[str, str]) -> Sampling:
    """Ranges that depend on no prompt. Returns the parameters with seed and greedy temperature settled."""
    check_count("max_new_tokens", sampling.max_new_tokens, 1, None, names)
    check_count("min_new_tokens", sampling.min_new_tokens, 0, sampling.max_new_tokens, names)
    check_count("n", sampling.n, 1, MAX_N, names)
    check_count("logprobs", sampling.logprobs, 0, MAX_LOGPROBS, names)
    check_count("top_k", sampling.top_k, 0, None, names)
    check_count("seed", sampling.seed, 0, MAX_SEED, names)
    check_number("temperature", sampling.temperature, 0, LARGEST, names)
    check_number("top_p", sampling.top_p, 0, 1, names, above=True)
    check_number("min_p", sampling.min_p, 0, 1, names)
    check_number("repetition_penalty", sampling.repetition_penalty, 0, LARGEST, names, above=True)
    check_number("frequency_penalty", sampling.frequency_penalty, -2, 2, names)
    check_number("presence_penalty", sampling.presence_penalty, -2, 2, names)
    check_stop(sampling, model, names)
    return replace(
        sampling,
        temperature=0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature,
        top_k=min(sampling.top_k, model.vocab_size),
        seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
    )


def check_stop(sampling: Sampling, model: ServedModel, names: Mapping[str, str]) -> None:
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise refusal("stop", f"must be at most {MAX_STOP_STRINGS} strings", names)
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in sampling.stop):
        raise refusal("stop", f"must hold strings of 1 to {MAX_STOP_CHARACTERS} characters", names)
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise refusal("stop_token_ids", f"must be at most {MAX_STOP_TOKENS} ids", names)
    check_ids("stop_token_ids", sampling.stop_token_ids, model, names)


def check_prompt(prompt: Sequence[int], model: ServedModel, names: Mapping[str, str]) -> None:
    name = names.get("prompt", "prompt")
    if not prompt:
        raise MeshError(Reason.EMPTY_PROMPT, f"{name} has no token", parameter=name)
    check_ids("prompt", prompt, model, names)


def check_ids(parameter: str, ids: Sequence[int], model: ServedModel, names: Mapping[str, str]) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
        wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
        name = names.get(parameter, parameter)
        message = f"{name} holds token id {wrong}, outside the vocabulary of {model.vocab_size}"
        raise MeshError(Reason.TOKEN_OUT_OF_RANGE, message, parameter=name)


def check_room(prompt_tokens: int, sampling: Sampling, model: ServedModel, names: Mapping[str, str]) -> None:
    """Prompt and output must fit the context; at least one token is always generated."""
    context = model.context_length
    if prompt_tokens >= context:
        message = f"the prompt has {prompt_tokens} tokens; the context of {context} leaves no room to generate"
        raise MeshError(Reason.CONTEXT_TOO_LONG, message, parameter=names.get("prompt", "prompt"))
    if sampling.max_new_tokens is not None and prompt_tokens + sampling.max_new_tokens > context:
        name = names.get("max_new_tokens", "max_new_tokens")
        message = f"{prompt_tokens} prompt tokens and {name} {sampling.max_new_tokens} exceed the context of {context}"
        raise MeshError(Reason.CONTEXT_TOO_LONG, message, parameter=name)


def check_count(parameter: str, value: int | None, low: int, high: int | None, names: Mapping[str, str]) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise refusal(parameter, f"must be {bounds}, got {value}", names)


def check_number(
    parameter: str, value: float, low: float, high: float, names: Mapping[str, str], *, above: bool = False
) -> None:
    """`above`: `low` itself is out of range."""
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise refusal(parameter, f"must be {bounds}, got {value:g}", names)


def refusal(parameter: str, problem: str, names: Mapping[str, str]) -> MeshError:
    name = names.get(parameter, parameter)
    return MeshError(Reason.INVALID_PARAMETER, f"{name} {problem}", parameter=name)
