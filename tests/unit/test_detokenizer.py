"""Streamed text is the text: no piece is broken, none is lost, whatever the model produces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from common.text.detokenizer import WINDOW_TOKENS, Detokenizer
from common.text.stop import StopMatcher
from common.text.tokenizer import BYTE_OF, Tokenizer

pytestmark = pytest.mark.unit

STAND_IN = {value[0]: char for char, value in BYTE_OF.items()}
PIECES = [" the", "ing", " a", "你", "é", "😀", "\n", "abc"]


def byte_level() -> Tokenizer:
    """Ids 0 to 255 are the bytes, then come PIECES, then a special token."""
    vocabulary = {STAND_IN[byte]: byte for byte in range(256)}
    for piece in PIECES:
        vocabulary.setdefault("".join(STAND_IN[byte] for byte in piece.encode()), len(vocabulary))
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {}, None)


def byte_fallback() -> Tokenizer:
    """Ids 0 to 255 are `<0x00>` to `<0xFF>`, then words with a metaspace, then a special token."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ["▁the", "ing", "▁", "▁a", "你", "é"]:
        vocabulary[piece] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {}, None)


BYTES, FALLBACK = byte_level(), byte_fallback()
SIZE = BYTES.backend.get_vocab_size()
SPECIAL = BYTES.backend.token_to_id("</s>")


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [])
    return [*(detokenizer.feed([i]) for i in ids), detokenizer.flush()]


@given(st.lists(st.integers(0, SIZE - 1), max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    assert "".join(stream(BYTES, ids)) == BYTES.decode(ids)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_text_byte_by_byte_streams_whole_characters(text: str) -> None:
    ids = list(text.encode())
    for tokenizer in (BYTES, FALLBACK):
        pieces = stream(tokenizer, ids, prompt=[ord("a")])
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.sampled_from([*range(256, 262), SPECIAL]), max_size=80))
@settings(max_examples=200, deadline=None)
def test_leading_spaces_survive_metaspace_decoders(ids: list[int]) -> None:
    ids = [i if i != SPECIAL else FALLBACK.backend.token_to_id("</s>") for i in ids]
    assert "".join(stream(FALLBACK, ids)) == FALLBACK.decode(ids)


def test_the_first_token_knows_its_left_neighbour() -> None:
    the = FALLBACK.backend.token_to_id("▁the")
    assert "".join(stream(FALLBACK, [the])) == "the"
    assert "".join(stream(FALLBACK, [the], prompt=[the])) == " the"


def test_a_character_is_held_until_it_is_whole() -> None:
    assert stream(BYTES, list("é😀".encode())) == ["", "é", "", "", "", "😀", ""]
    assert stream(BYTES, list("😀".encode())[:3]) == ["", "", "", "\ufffd"]


def test_endless_broken_bytes_are_sent_and_cost_no_more() -> None:
    for tokenizer in (BYTES, FALLBACK):
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.feed([0xFF]) for _ in range(500)]
        assert len(detokenizer._window) <= 4 * WINDOW_TOKENS + 1
        assert len("".join([*pieces, detokenizer.flush()])) == 500


def test_special_tokens_have_no_text() -> None:
    assert stream(BYTES, [ord("a"), SPECIAL, ord("b"), SPECIAL]) == ["a", "", "b", "", ""]


def cut(text: str, stop: list[str]) -> tuple[str, str | None]:
    """What StopMatcher promises, said another way: character by character."""
    for end in range(1, len(text) + 1):
        if matches := [s for s in stop if text[:end].endswith(s)]:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


def match(pieces: list[str], stop: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stop)
    sent = "".join(matcher.feed(piece) for piece in pieces)
    return sent + ("" if matcher.matched else matcher.flush()), matcher.matched


short = st.text("ab\n", min_size=1, max_size=4)


@given(st.lists(st.text("ab\nc", max_size=5), max_size=12), st.lists(short, min_size=1, max_size=3))
@settings(max_examples=500, deadline=None)
def test_stop_strings_cut_the_same_however_the_text_is_split(pieces: list[str], stop: list[str]) -> None:
    assert match(pieces, stop) == cut("".join(pieces), stop)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(short, min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_nothing_is_sent_that_a_match_takes_back(pieces: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    sent = ""
    for piece in pieces:
        sent += matcher.feed(piece)
    assert cut("".join(pieces), stop)[0].startswith(sent)


def test_stop_examples() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.feed(p) for p in ["Hello\n", "\nUs", "ing ", "\n\nUser", ": x", "more"]] == [
        "Hello", "", "\n\nUsing ", "", "", "",
    ]  # fmt: skip
    assert matcher.matched == "\n\nUser:"
    assert json.dumps(match(["abcd"], ["abcd", "bc"])) == '["a", "bc"]'
    assert match(["as it is"], []) == ("as it is", None)
