"""The official client against the router's HTTP API; the workers are scripted, so that answers are known."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.mesh.scripted import BOS, CONTEXT, Scripted, failing, saying, scripted, stalling, until

pytestmark = pytest.mark.mesh

HI: Any = [{"role": "user", "content": "hi"}]
LIMIT = 100_000


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Scripted]:
    async with scripted(tmp_path, "unified", max_payload_size=LIMIT) as mesh:
        yield mesh


@pytest.fixture
async def client(mesh: Scripted) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mesh.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(mesh: Scripted) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.http, timeout=20) as client:
        yield client


# ---------------------------------------------------------------------------------------- models


async def test_models(client: AsyncOpenAI) -> None:
    [model] = [model async for model in client.models.list()]
    assert (model.id, model.object, model.owned_by) == ("bytes", "model", "pdmesh")
    assert (await client.models.retrieve("bytes")).id == "bytes"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        await client.models.retrieve("other")


# ---------------------------------------------------------------------------------------- completions


async def test_completion(mesh: Scripted, client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="bytes", prompt="hi", max_tokens=40, seed=-1, temperature=0)
    assert (answer.object, answer.model) == ("text_completion", "bytes")
    [choice] = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "Hello!", "stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 7, 10)
    [start] = mesh.workers["unified"].starts
    assert (start.sampling.seed, start.sampling.temperature) == ((1 << 64) - 1, 0)
    assert list(start.prompt_ids) == [BOS, *b"hi"]


async def test_completion_defaults_to_sixteen_tokens(mesh: Scripted, client: AsyncOpenAI) -> None:
    mesh.workers["unified"].script = saying("x" * 100)
    answer = await client.completions.create(model="bytes", prompt="hi")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")


async def test_completion_streams(mesh: Scripted, client: AsyncOpenAI) -> None:
    mesh.workers["unified"].script = saying("Grüße 😀")
    stream = await client.completions.create(
        model="bytes", prompt="hi", stream=True, n=2, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in choices) == "Grüße 😀"
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
        assert not any("\ufffd" in choice.text for choice in choices)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * 13
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("prompt", "sent", "echo"),
    [
        ("ab", [[BOS, *b"ab"]], ["ab"]),
        (["ab", "c"], [[BOS, *b"ab"], [BOS, *b"c"]], ["ab", "c"]),
        ([97, 98], [[97, 98]], ["ab"]),
        ([[97, 98], [99]], [[97, 98], [99]], ["ab", "c"]),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_forms_of_prompts_with_echo(
    mesh: Scripted, client: AsyncOpenAI, prompt: Any, sent: list[list[int]], echo: list[str], stream: bool
) -> None:
    request: dict[str, Any] = {"model": "bytes", "prompt": prompt, "echo": True, "n": 2}
    texts: dict[int, str] = {}
    if stream:
        async for chunk in await client.completions.create(stream=True, **request):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
    else:
        answer = await client.completions.create(**request)
        texts = {choice.index: choice.text for choice in answer.choices}
    assert texts == {index: echo[index // 2] + "Hello!" for index in range(2 * len(echo))}
    prompts = [list(start.prompt_ids) for start in mesh.workers["unified"].starts]
    assert sorted(prompts) == sorted(sent * 2)


async def test_completion_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="bytes", prompt="hi", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [*"Hello!", "</s>"]
    assert logprobs.token_logprobs == [-0.5] * 7
    assert logprobs.text_offset == [0, 1, 2, 3, 4, 5, 6]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"H": -0.5, "I": -1.5}


async def test_extra_fields_reach_the_worker(mesh: Scripted, client: AsyncOpenAI) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "nobody_knows_this": 1,
    }
    await client.completions.create(
        model="bytes", prompt="hi", extra_body=extra, top_p=0.5, frequency_penalty=0.5, presence_penalty=-0.5
    )
    sampling = mesh.workers["unified"].starts[0].sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.25, 1.5)
    assert (sampling.ignore_eos, sampling.min_new_tokens, list(sampling.stop_token_ids)) == (True, 2, [7])
    assert (sampling.top_p, sampling.frequency_penalty, sampling.presence_penalty) == (0.5, 0.5, -0.5)
    await client.completions.create(model="bytes", prompt="hi", extra_body={"top_k": -1})
    assert mesh.workers["unified"].starts[1].sampling.top_k == 0


# ---------------------------------------------------------------------------------------- chat


async def test_chat(mesh: Scripted, client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="bytes", messages=HI, n=2)
    assert answer.object == "chat.completion"
    for index, choice in enumerate(answer.choices):
        assert (choice.index, choice.message.role, choice.message.content) == (index, "assistant", "Hello!")
        assert choice.finish_reason == "stop"
    assert answer.usage is not None
    prompt = [BOS, *b"user: hi\nassistant:"]
    assert answer.usage.prompt_tokens == len(prompt)
    start = mesh.workers["unified"].starts[0]
    assert list(start.prompt_ids) == prompt
    assert start.sampling.max_new_tokens == CONTEXT - len(prompt)


async def test_chat_streams_with_the_role_first(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="bytes", messages=HI, stream=True, stream_options={"include_usage": True}, max_completion_tokens=3
    )
    chunks = [chunk async for chunk in stream]
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    deltas = [choice.delta for chunk in chunks[1:] for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hel"
    assert all(delta.role is None for delta in deltas)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_chat_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="bytes", messages=HI, logprobs=True, top_logprobs=2, max_tokens=2
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [(entry.token, entry.bytes, entry.logprob) for entry in content] == [("H", [72], -0.5), ("e", [101], -0.5)]
    assert [top.token for top in content[0].top_logprobs] == ["H", "I"]
    stream = await client.chat.completions.create(model="bytes", messages=HI, logprobs=True, stream=True, max_tokens=2)
    entries = [
        entry.token
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content or []
    ]
    assert entries == ["H", "e"]


@pytest.mark.parametrize("stream", [True, False])
async def test_chat_stops(client: AsyncOpenAI, stream: bool) -> None:
    request: dict[str, Any] = {"model": "bytes", "messages": HI, "stop": ["lo", "xyz"]}
    if stream:
        chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **request)]
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = (await client.chat.completions.create(**request)).choices[0].message.content or ""
    assert text == "Hel"


async def test_chat_content_may_come_in_parts(mesh: Scripted, client: AsyncOpenAI) -> None:
    parts: Any = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    await client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": parts}])
    assert bytes(mesh.workers["unified"].starts[0].prompt_ids[1:]).startswith(b"user: hi\n")
    image: Any = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        await client.chat.completions.create(model="bytes", messages=[{"role": "user", "content": image}])


# ---------------------------------------------------------------------------------------- refusals


COMPLETION = {"model": "bytes", "prompt": "hi"}
CHAT = {"model": "bytes", "messages": HI}
REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    (COMPLETION | {"model": "other"}, 404, "model", "model_not_found"),
    (COMPLETION | {"prompt": ""}, 400, "prompt", "empty_prompt"),
    (COMPLETION | {"prompt": []}, 400, "prompt", "empty_prompt"),
    (COMPLETION | {"prompt": [[]]}, 400, "prompt", "empty_prompt"),
    (COMPLETION | {"prompt": [1, "a"]}, 400, "prompt", "invalid_parameter"),
    (COMPLETION | {"prompt": {"a": 1}}, 400, "prompt", "invalid_parameter"),
    (COMPLETION | {"prompt": [300]}, 400, "prompt", "token_out_of_range"),
    (COMPLETION | {"prompt": "x" * CONTEXT}, 400, "prompt", "context_length_exceeded"),
    (COMPLETION | {"max_tokens": CONTEXT}, 400, "max_tokens", "context_length_exceeded"),
    (COMPLETION | {"max_tokens": 0}, 400, "max_tokens", "invalid_parameter"),
    (COMPLETION | {"max_tokens": "5"}, 400, "max_tokens", "invalid_parameter"),
    (COMPLETION | {"max_tokens": True}, 400, "max_tokens", "invalid_parameter"),
    (COMPLETION | {"temperature": float("nan")}, 400, "temperature", "invalid_parameter"),
    (COMPLETION | {"temperature": -1}, 400, "temperature", "invalid_parameter"),
    (COMPLETION | {"suffix": "x"}, 400, "suffix", "unsupported"),
    (COMPLETION | {"best_of": 2}, 400, "best_of", "unsupported"),
    (COMPLETION | {"echo": True, "logprobs": 1}, 400, "echo", "unsupported"),
    (COMPLETION | {"logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported"),
    (COMPLETION | {"stream_options": {}}, 400, "stream_options", "invalid_parameter"),
    (COMPLETION | {"stop": [1]}, 400, "stop", "invalid_parameter"),
    ({"model": "bytes"}, 400, "prompt", "invalid_parameter"),
    (CHAT | {"messages": []}, 400, "messages", "empty_prompt"),
    (CHAT | {"messages": "hi"}, 400, "messages", "invalid_parameter"),
    (CHAT | {"messages": [{"content": "hi"}]}, 400, "messages", "invalid_parameter"),
    (CHAT | {"tools": [{"type": "function"}]}, 400, "tools", "unsupported"),
    (CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported"),
    (CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "invalid_parameter"),
    (CHAT | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_parameter"),
    (CHAT | {"max_completion_tokens": 0}, 400, "max_completion_tokens", "invalid_parameter"),
    (CHAT | {"messages": [{"role": "user", "content": "x" * CONTEXT}]}, 400, "messages", "context_length_exceeded"),
]


async def test_refusals_have_openais_shape(http: httpx.AsyncClient) -> None:
    for body, status, param, code in REFUSED:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        response = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code == status, (body, response.text)
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["param"], error["code"]) == (param, code), body
        assert error["type"] == "invalid_request_error"
    assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 5000])
async def test_what_is_not_json_is_malformed(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post("/v1/completions", content=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "malformed_request"


async def test_large_bodies_are_refused_unread(http: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b" " * 10_000

    for content in (b" " * (10 << 20), endless()):
        response = await http.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    assert (await http.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_the_client_raises_its_own_errors(mesh: Scripted, client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1") as bad:
        await client.completions.create(model="bytes", prompt="hi", max_tokens=0)
    assert (bad.value.param, bad.value.code) == ("max_tokens", "invalid_parameter")
    mesh.workers["unified"].script = failing("OVERLOADED")
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="bytes", prompt="hi", stream=True)
    mesh.workers["unified"].script = failing("ENGINE_FAILED", after="ab")
    chunks = aiter(await client.completions.create(model="bytes", prompt="hi", stream=True))
    assert (await anext(chunks)).choices[0].text == "ab"
    with pytest.raises(openai.APIError, match="as the test has it"):
        await anext(chunks)


# ---------------------------------------------------------------------------------------- the rest


async def test_request_ids(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1"})
    assert (response.headers["x-request-id"], response.json()["id"]) == ("mine-1", "mine-1")
    response = await http.post("/v1/completions", json=COMPLETION | {"stream": True})
    assert response.headers["x-request-id"].startswith("cmpl-")
    response = await http.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "a b"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "X-Request-Id")


async def test_operations(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/ready")).json() == {"ready": True, "reason": None}
    await http.post("/v1/completions", json=COMPLETION)
    page = (await http.get("/metrics")).text
    assert 'pdmesh_requests_total{api="completions",outcome="ok"}' in page
    assert "pdmesh_time_to_first_token_seconds_bucket" in page
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)):
        response = await http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert "/v1/chat/completions" in (await http.get("/openapi.json")).json()["paths"]


async def test_a_stream_left_early_is_aborted(mesh: Scripted, client: AsyncOpenAI) -> None:
    mesh.workers["unified"].script = stalling()
    stream = await client.completions.create(model="bytes", prompt="hi", stream=True)
    await anext(aiter(stream))
    await stream.close()
    worker = mesh.workers["unified"]
    await until(lambda: worker.aborts == [worker.starts[0].sequence_id])
