"""The tokenizer and the chat template against transformers' own, on tokenizers trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors.base import MeshError, Reason
from common.text.template import ChatTemplate
from common.text.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is 123 + 456? 579!",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich — naïve café.",
    "日本語のテキストと中文文本、한국어 텍스트, emoji 😀🎉👩‍👩‍👧 and кириллица.",
] * 4
TEXTS = [
    "",
    "Hello world, what is 7 + 8?",
    "  leading and trailing  ",
    "日本語😀 mixed \n\n text\twith tabs",
    "👩‍👩‍👧 never seen before: ∮ ⌘ ༒",
    "<s>[INST] special tokens in text [/INST]</s>",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message.role == 'stop' %}{% break %}{% endif %}\n"
    "    {% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}\n"
    "<|{{ message.role }}|>{{ message.content | trim }}{% generation %}{{ eos_token }}{% endgeneration %}\n"
    "{% endfor %}{{ {'a': '<b>', 'ü': 1} | tojson }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet)
    )
    return backend


def byte_fallback() -> Backend:
    """Like Llama 2's: metaspace, bytes for what the vocabulary lacks, one leading space stripped in decoding."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=380, special_tokens=special))
    plain = json.loads(backend.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    plain["model"]["byte_fallback"] = True
    return Backend.from_str(json.dumps(plain))


def save(backend: Backend, folder: Path, **config: Any) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names, **config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["byte_level", "byte_fallback"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return byte_level() if request.param == "byte_level" else byte_fallback()


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_encodes_as_transformers_does(backend: Backend, tmp_path: Path, config: dict[str, Any]) -> None:
    save(backend, tmp_path, additional_special_tokens=["[INST]", "[/INST]"], **config)
    ours, theirs = Tokenizer.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.special_ids >= {theirs.bos_token_id, theirs.eos_token_id, theirs.convert_tokens_to_ids("[INST]")}
    bos = [theirs.bos_token_id] if config else []
    assert ours.encode("a")[:1] == (bos or ours.encode("a", False)[:1])


def test_tokens_of_the_config_alone_are_added(tmp_path: Path) -> None:
    save(byte_level(), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    end = {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    size = Backend.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    config["added_tokens_decoder"] = {str(size): end}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.load(str(tmp_path))
    assert ours.encode("a<|end|>b")[1] == size
    assert size in ours.special_ids
    assert ours.decode(ours.encode("a<|end|>b")) == "ab"


def test_bytes_of_tokens_join_to_the_text(backend: Backend, tmp_path: Path) -> None:
    ours = Tokenizer.load(str(save(backend, tmp_path)))
    for text in TEXTS[:-1]:
        joined = b"".join(ours.token_bytes(i) for i in ours.encode(text, False)).decode()
        assert joined in (text, " " + text)
    assert ours.token_bytes(1 << 20) == b""
    assert ours.token_bytes(min(ours.special_ids)).startswith(b"<")


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match="send token ids") as caught:
        Tokenizer.load(str(tmp_path))
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_says_so(tmp_path: Path, file: str) -> None:
    save(byte_level(), tmp_path)
    (tmp_path / file).write_text('{"version": ')
    with pytest.raises(MeshError, match=file) as caught:
        Tokenizer.load(str(tmp_path))
    assert caught.value.reason is Reason.BAD_CHECKPOINT


@pytest.mark.parametrize("form", ["file", "string", "list"])
def test_chat_template_renders_as_in_transformers(tmp_path: Path, form: str) -> None:
    save(byte_level(), tmp_path)
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = TEMPLATE if form == "string" else listed
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    messages = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "1 < 2 & ü?"}]
    template, theirs = ChatTemplate.of(Tokenizer.load(str(tmp_path))), AutoTokenizer.from_pretrained(tmp_path)
    for prompted in (True, False):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
        assert template.render(messages, add_generation_prompt=prompted) == expected
    assert template.render([{"role": "stop"}]).startswith('<s>{"a"')
    with pytest.raises(MeshError, match="unknown role judge") as caught:
        template.render([{"role": "judge", "content": ""}])
    assert (caught.value.reason, caught.value.parameter) == (Reason.INVALID_PARAMETER, "messages")


def test_template_helpers_and_failures(tmp_path: Path) -> None:
    assert len(ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])) == 4
    assert ChatTemplate("{{ mood }}{{ tools[0].name }}", {}).render(
        [], tools=[{"name": "f"}], variables={"mood": "x"}
    ) == ("xf")
    with pytest.raises(MeshError, match="fails on these messages"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render([{"content": "a"}])
    with pytest.raises(MeshError, match="cannot be read"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(MeshError, match="refuses these messages"):
        ChatTemplate("{{ messages.append(1) }}", {}).render([])
    with pytest.raises(MeshError, match="no chat template"):
        ChatTemplate.of(Tokenizer.load(str(save(byte_level(), tmp_path))))
