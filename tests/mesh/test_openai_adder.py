"""The official `openai` client against a whole mesh with real workers and the model in the box."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
import pytest

from tests.mesh.harness import Mesh, running

pytestmark = [pytest.mark.mesh, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "What is 123 + 456?"}]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with running() as mesh:
        yield mesh


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{mesh.http}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["adder"]


async def test_chat_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model="adder", messages=QUESTION, temperature=0, n=2, logprobs=True, top_logprobs=3
    )
    assert [choice.message.content for choice in whole.choices] == ["579", "579"]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]
    tokens = whole.choices[0].logprobs.content
    assert tokens[0].token == tokens[0].top_logprobs[0].token
    assert tokens[0].logprob == tokens[0].top_logprobs[0].logprob <= 0
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = await client.chat.completions.create(
        model="adder", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "579"
    assert chunks[-1].usage.completion_tokens * 2 == whole.usage.completion_tokens


async def test_completions_with_seed_and_stop(client: openai.AsyncOpenAI) -> None:
    common = {"model": "adder", "prompt": "123 + 456 =", "max_tokens": 12}
    first, second = [await client.completions.create(**common, temperature=1.5, seed=7) for _ in range(2)]
    assert first.choices[0].text == second.choices[0].text
    cut = await client.completions.create(**common, temperature=0, stop="79")
    assert cut.choices[0].text.strip() == "5"
    assert cut.choices[0].finish_reason == "stop"
    stream = await client.completions.create(**common, temperature=0, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]).strip() == "579"


async def test_errors_are_the_clients_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        await client.chat.completions.create(model="nobody", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="adder", messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
