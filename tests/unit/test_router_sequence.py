"""Tokens in, deltas out: text, stop strings and ends of one sequence."""

from __future__ import annotations

from typing import Any

import pytest

from common.errors.base import MeshError, Reason
from pdmesh.v1 import types_pb2
from pdmesh.v1.decode_service_pb2 import SequenceTokens
from services.router.request import Delta, GenerationRequest, Sampling, ServedModel
from services.router.sequence import SequenceOutput
from tests.unit.test_detokenizer import BYTES, SPECIAL

pytestmark = pytest.mark.unit

MODEL = ServedModel("m", "", 1000, 300, 0.0)
NONE, STOP = types_pb2.FINISH_REASON_UNSPECIFIED, types_pb2.FINISH_REASON_STOP
LENGTH, ABORT = types_pb2.FINISH_REASON_LENGTH, types_pb2.FINISH_REASON_ABORT


def output(tokenizer: Any = BYTES, **sampling: Any) -> SequenceOutput:
    return SequenceOutput(GenerationRequest("id", "t", MODEL, [[65]], Sampling(**sampling), tokenizer, 0.0), 0)


def say(to: SequenceOutput, *pieces: str | bytes, finish: Any = NONE) -> list[Delta]:
    """Feed pieces, one event each; `finish` goes with the last."""
    deltas = []
    for number, piece in enumerate(pieces, 1):
        ids = piece.encode() if isinstance(piece, str) else piece
        end = finish if number == len(pieces) else NONE
        deltas.append(to.accept(SequenceTokens(token_offset=to.tokens, token_ids=ids, finish_reason=end)))
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_the_token_that_ends_a_sequence_has_no_text() -> None:
    deltas = say(output(), "ab", "c", finish=STOP)
    assert (text_of(deltas), deltas[-1].finish, deltas[-1].token_ids) == ("ab", STOP, [ord("c")])
    assert text_of(say(output(), "ab", "c", finish=LENGTH)) == "abc"
    event = SequenceTokens(token_ids=[SPECIAL], finish_reason=LENGTH)
    assert output().accept(event).text == ""


def test_offsets_follow_the_tokens() -> None:
    sequence = output()
    assert [delta.token_offset for delta in say(sequence, "ab", "", "c")] == [0, 2, 2]
    for offset in (2, 4):
        with pytest.raises(MeshError) as caught:
            sequence.accept(SequenceTokens(token_offset=offset, token_ids=[1]))
        assert caught.value.reason is Reason.INTERNAL


@pytest.mark.parametrize("pieces", [("hello world",), ("hel", "lo wo", "rld"), tuple("hello world")])
def test_a_stop_string_ends_with_its_own_last_token(pieces: tuple[str, ...]) -> None:
    sequence = output(stop=("o w", "xyz"))
    deltas = []
    for piece in pieces:
        deltas += say(sequence, piece)
        if sequence.finish:
            break
    assert text_of(deltas) == "hell"
    assert bytes(token for delta in deltas for token in delta.token_ids) == b"hello w"
    assert (sequence.finish, deltas[-1].stop_reason, sequence.tokens) == (STOP, "o w", 7)


def test_log_probabilities_are_cut_with_the_tokens() -> None:
    entries = [types_pb2.TokenLogprobs(chosen=types_pb2.TokenLogprob(token_id=token)) for token in b"abc"]
    delta = output(stop=("b",)).accept(SequenceTokens(token_ids=b"abc", logprobs=entries))
    assert [entry.chosen.token_id for entry in delta.logprobs] == delta.token_ids == [*b"ab"]


def test_stop_strings_wait_for_min_new_tokens() -> None:
    sequence = output(stop=("a",), min_new_tokens=3)
    assert text_of(say(sequence, "aaaa")) == "aaa"
    assert sequence.finish == STOP


def test_text_held_back_is_flushed_when_the_sequence_ends() -> None:
    held = output(stop=("abc",))
    assert [delta.text for delta in say(held, "x", "ab", "", finish=LENGTH)] == ["x", "", "ab"]
    held = output(stop=("abc",))
    say(held, "x", "ab")
    last = held.abort()
    assert (last.text, last.finish, last.token_offset) == ("ab", ABORT, 3)
    assert [delta.text for delta in say(output(), b"\xc3", b"\xa9", b"\xf0", finish=LENGTH)] == ["", "é", "\ufffd"]


def test_without_tokenizer_there_are_only_tokens() -> None:
    deltas = say(output(tokenizer=None), "ab", finish=LENGTH)
    assert (deltas[0].text, deltas[0].token_ids) == ("", [*b"ab"])
    assert output(tokenizer=None).abort().text == ""
