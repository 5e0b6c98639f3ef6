"""Every bad value is refused with a reason and the field's name; everything else passes through."""

from __future__ import annotations

import math
from typing import Any

import pytest

from common.errors.base import MeshError, Reason
from services.router.request import Draft, GenerationRequest, Sampling, ServedModel, derive_seed
from services.router.validate import MAX_SEQUENCES, check_request_id, validate

pytestmark = pytest.mark.unit

MODEL = ServedModel("m", "/m", context_length=100, vocab_size=50, ready_at_s=0.0)


def check(prompts: list[list[int]] | None = None, default: int | None = 128, **sampling: Any) -> GenerationRequest:
    prompts = [[1, 2, 3]] if prompts is None else prompts
    draft = Draft("id", "grpc", "m", prompts, Sampling(**sampling), default_max_new_tokens=default)
    return validate(draft, MODEL, None, prompts, 1.0)


BAD: list[tuple[dict[str, Any], Reason, str]] = [
    ({"temperature": -0.1}, Reason.INVALID_PARAMETER, "temperature"),
    ({"temperature": math.nan}, Reason.INVALID_PARAMETER, "temperature"),
    ({"temperature": math.inf}, Reason.INVALID_PARAMETER, "temperature"),
    ({"temperature": 1e39}, Reason.INVALID_PARAMETER, "temperature"),
    ({"top_p": 0.0}, Reason.INVALID_PARAMETER, "top_p"),
    ({"top_p": 1.01}, Reason.INVALID_PARAMETER, "top_p"),
    ({"top_p": math.nan}, Reason.INVALID_PARAMETER, "top_p"),
    ({"top_k": -1}, Reason.INVALID_PARAMETER, "top_k"),
    ({"min_p": -0.1}, Reason.INVALID_PARAMETER, "min_p"),
    ({"min_p": 1.1}, Reason.INVALID_PARAMETER, "min_p"),
    ({"repetition_penalty": 0.0}, Reason.INVALID_PARAMETER, "repetition_penalty"),
    ({"frequency_penalty": 2.1}, Reason.INVALID_PARAMETER, "frequency_penalty"),
    ({"presence_penalty": -2.1}, Reason.INVALID_PARAMETER, "presence_penalty"),
    ({"max_new_tokens": 0}, Reason.INVALID_PARAMETER, "max_new_tokens"),
    ({"max_new_tokens": 98}, Reason.CONTEXT_TOO_LONG, "max_new_tokens"),
    ({"min_new_tokens": 5, "max_new_tokens": 4}, Reason.INVALID_PARAMETER, "min_new_tokens"),
    ({"min_new_tokens": 98}, Reason.INVALID_PARAMETER, "min_new_tokens"),
    ({"min_new_tokens": -1}, Reason.INVALID_PARAMETER, "min_new_tokens"),
    ({"n": 0}, Reason.INVALID_PARAMETER, "n"),
    ({"n": 129}, Reason.INVALID_PARAMETER, "n"),
    ({"logprobs": 21}, Reason.INVALID_PARAMETER, "logprobs"),
    ({"logprobs": -1}, Reason.INVALID_PARAMETER, "logprobs"),
    ({"seed": -1}, Reason.INVALID_PARAMETER, "seed"),
    ({"seed": 1 << 64}, Reason.INVALID_PARAMETER, "seed"),
    ({"stop": ("",)}, Reason.INVALID_PARAMETER, "stop"),
    ({"stop": ("a" * 1025,)}, Reason.INVALID_PARAMETER, "stop"),
    ({"stop": ("a",) * 33}, Reason.INVALID_PARAMETER, "stop"),
    ({"stop_token_ids": (50,)}, Reason.TOKEN_OUT_OF_RANGE, "stop_token_ids"),
    ({"stop_token_ids": (1,) * 257}, Reason.INVALID_PARAMETER, "stop_token_ids"),
    ({"prompts": []}, Reason.EMPTY_PROMPT, "prompt"),
    ({"prompts": [[1], []]}, Reason.EMPTY_PROMPT, "prompt"),
    ({"prompts": [[1, 50]]}, Reason.TOKEN_OUT_OF_RANGE, "prompt"),
    ({"prompts": [[-1]]}, Reason.TOKEN_OUT_OF_RANGE, "prompt"),
    ({"prompts": [[1 << 70]]}, Reason.TOKEN_OUT_OF_RANGE, "prompt"),
    ({"prompts": [[1] * 100]}, Reason.CONTEXT_TOO_LONG, "prompt"),
    ({"prompts": [[1]] * (MAX_SEQUENCES // 100 + 1), "n": 100}, Reason.INVALID_PARAMETER, "n"),
]


@pytest.mark.parametrize(("values", "reason", "parameter"), BAD, ids=[str(case[0])[:60] for case in BAD])
def test_bad_values_are_refused(values: dict[str, Any], reason: Reason, parameter: str) -> None:
    with pytest.raises(MeshError) as caught:
        check(**values)
    assert (caught.value.reason, caught.value.parameter) == (reason, parameter)
    assert caught.value.status.http == 400


def test_names_are_those_of_the_clients_api() -> None:
    draft = Draft("id", "chat", "m", [[1]], Sampling(max_new_tokens=0), names={"max_new_tokens": "max_tokens"})
    with pytest.raises(MeshError, match="max_tokens must be at least 1, got 0") as caught:
        validate(draft, MODEL, None, [[1]], 1.0)
    assert caught.value.parameter == "max_tokens"


def test_edges_pass() -> None:
    assert check(max_new_tokens=97).sampling.max_new_tokens == 97
    assert check(prompts=[[1] * 99], max_new_tokens=1).prompt_tokens == 99
    assert check(temperature=0.0, top_p=1.0, min_p=1.0, n=128, logprobs=20, seed=(1 << 64) - 1).sequences == 128
    assert check(temperature=1e-9).sampling.temperature == 0.0
    assert check(top_k=1 << 40).sampling.top_k == 50


def test_defaults_end_where_the_context_ends() -> None:
    request = check(prompts=[[1], [1] * 90])
    assert [request.sampling_of(index).max_new_tokens for index in range(2)] == [99, 10]
    assert check(default=16).sampling_of(0).max_new_tokens == 16
    assert check(default=None).sampling_of(0).max_new_tokens == 97


def test_every_default_is_told_to_workers() -> None:
    message = check(seed=9).sampling_of(0)
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and field.name not in ("n", "logprobs"):
            assert message.HasField(field.name), field.name
    assert not message.HasField("logprobs")
    assert check(logprobs=0).sampling_of(0).HasField("logprobs")


def test_sequences_of_a_prompt_differ_in_seed_alone() -> None:
    request = check(prompts=[[1], [2]], n=3, seed=9)
    assert [request.prompt_of(index) for index in range(6)] == [[1]] * 3 + [[2]] * 3
    seeds = [request.sampling_of(index).seed for index in range(6)]
    assert seeds[0] == 9
    assert seeds[:3] == seeds[3:]
    assert len({derive_seed(seed, index) for seed in range(50) for index in range(50)}) == 2500
    assert check().sampling.seed != check().sampling.seed


@pytest.mark.parametrize("request_id", ["", "a b", "a\nb", "ä", "x" * 129])
def test_request_ids_fit_into_headers(request_id: str) -> None:
    with pytest.raises(MeshError, match="request_id"):
        check_request_id(request_id, {})
    check_request_id("req-1/ok", {})
