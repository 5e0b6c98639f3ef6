"""How sequences end: end-of-sequence, stop tokens and strings, limits; and that text never breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.checkpoints import Answer, Oracle, make_checkpoint
from tests.mesh.harness import Client, Mesh, running

pytestmark = [pytest.mark.mesh, pytest.mark.slow]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Mesh, Answer]]:
    """A mesh on a checkpoint whose end-of-sequence token is the first one that the answer's prompt gets."""
    folder = make_checkpoint(tmp_path_factory.mktemp("model") / "llama", "llama", seed=9)
    answer = Oracle(folder).answers(2, 40, 48, seed=9)[1]
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [answer.token_ids[0]]}))
    with running("--model-path", str(folder), "--dtype", "float32", "--max-total-tokens", "8192") as mesh:
        yield mesh, answer


async def test_first_token_eos_gives_one_token(served: tuple[Mesh, Answer]) -> None:
    mesh, answer = served
    async with Client(mesh.grpc) as client:
        result = await client.generate(answer.prompt_ids, temperature=0.0)
    assert result.token_ids == answer.token_ids[:1]
    assert (result.finish, result.text) == ("stop", "")


async def test_one_new_token_is_exactly_one(served: tuple[Mesh, Answer]) -> None:
    mesh, answer = served
    async with Client(mesh.grpc) as client:
        result = await client.generate(answer.prompt_ids, temperature=0.0, max_new_tokens=1, ignore_eos=True)
    assert result.token_ids == answer.token_ids[:1]
    assert result.finish == "length"


async def test_ignore_eos_goes_on_to_the_limit(served: tuple[Mesh, Answer]) -> None:
    mesh, answer = served
    async with Client(mesh.grpc) as client:
        result = await client.generate(answer.prompt_ids, temperature=0.0, max_new_tokens=48, ignore_eos=True)
    assert result.token_ids == answer.token_ids
    assert result.finish == "length"


async def test_min_new_tokens_holds_eos_back(served: tuple[Mesh, Answer]) -> None:
    mesh, answer = served
    eos = answer.token_ids[0]
    async with Client(mesh.grpc) as client:
        result = await client.generate(answer.prompt_ids, temperature=0.0, min_new_tokens=6, max_new_tokens=48)
    assert len(result.token_ids) >= 6
    assert eos not in result.token_ids[:6]


async def test_a_stop_token_ends_and_is_told(served: tuple[Mesh, Answer]) -> None:
    mesh, answer = served
    stop = next(token for token in answer.token_ids[3:] if token != answer.token_ids[0])
    at = answer.token_ids.index(stop)
    async with Client(mesh.grpc) as client:
        result = await client.generate(
            answer.prompt_ids, temperature=0.0, max_new_tokens=48, ignore_eos=True, stop_token_ids=[stop]
        )
    assert result.token_ids == answer.token_ids[: at + 1]
    assert result.finish == "stop"


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_strings_across_tokens_are_cut_exactly(served: tuple[Mesh, Answer], stream: bool) -> None:
    mesh, answer = served
    common = {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True}
    async with Client(mesh.grpc) as client:
        whole = (await client.generate(answer.prompt_ids, **common)).text
        pieces = [response.text async for response in client.stream(answer.prompt_ids, **common)]
        middle = len(whole) // 2
        for length in (1, 2, 5, 9):
            stop = whole[middle : middle + length]
            result = await client.generate(answer.prompt_ids, stop=[stop, "never there"], stream=stream, **common)
            assert result.text == whole[: whole.index(stop)]
            assert result.finish == "stop"
    assert "".join(pieces) == whole


async def test_streamed_text_is_the_whole_text(served: tuple[Mesh, Answer]) -> None:
    mesh, _ = served
    async with Client(mesh.grpc) as client:
        for seed in range(8):
            sampling = {"temperature": 2.0, "seed": seed, "max_new_tokens": 64, "ignore_eos": True}
            streamed = await client.generate("日本 é", **sampling)
            whole = await client.generate("日本 é", stream=False, **sampling)
            assert streamed.text == whole.text
            assert streamed.token_ids == whole.token_ids
