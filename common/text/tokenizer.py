"""A checkpoint's tokenizer, on the `tokenizers` library alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from common.errors.base import MeshError, Reason

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to token ids and back, as `transformers.AutoTokenizer` does it for the same folder.

    Decoding skips special tokens and does not clean up spaces around punctuation: streamed text could not be
    cleaned up after it was sent. Safe to use from several threads.
    """

    def __init__(self, backend: Backend, special_tokens: Mapping[str, str], chat_template: str | None) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._byte_level = "ByteLevel(" in repr(backend.decoder)

    @classmethod
    def load(cls, model_path: str) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, or of a hub name through the local cache and the hub.

        Raises `MeshError`: UNSUPPORTED when there is no `tokenizer.json`, BAD_CHECKPOINT when a file is broken.
        """
        folder = find_folder(model_path)
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise MeshError(Reason.UNSUPPORTED, f"{model_path} has no {TOKENIZER_FILE}: send token ids instead of text")
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise MeshError(Reason.BAD_CHECKPOINT, f"{file} cannot be read: {error}") from None
        config = {**read_json(folder / SPECIAL_TOKENS_FILE), **read_json(folder / CONFIG_FILE)}
        named = {name: content_of(config[name]) for name in NAMED_TOKENS if config.get(name)}
        prepare(backend, config, named)
        return cls(backend, named, find_template(folder, config))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds what the model expects around a prompt (often a BOS).

        Special tokens that stand in the text as such become their ids. Long texts do not hold the GIL.
        """
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens; ids outside the vocabulary are skipped too."""
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, special tokens included; no more than part of a character, maybe."""
        if (content := self._added.get(token_id)) is not None:
            return content.encode()
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(BYTE_OF[char] if char in BYTE_OF else char.encode() for char in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece.replace("▁", " ")).encode()


def find_folder(model_path: str) -> Path:
    """The folder of a checkpoint; a hub name is taken from the cache, else its tokenizer files are fetched."""
    if (folder := Path(model_path).expanduser()).is_dir():
        return folder
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    files = [TOKENIZER_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE]
    try:
        try:
            return Path(snapshot_download(model_path, allow_patterns=files, local_files_only=True))
        except (OSError, ValueError):  # not cached yet, or not a hub name at all
            return Path(snapshot_download(model_path, allow_patterns=files))
    except Exception as error:  # a dozen kinds: network, not found, not allowed, malformed name
        message = f"{model_path} is neither a folder nor a reachable hub name: {type(error).__name__}: {error}"
        raise MeshError(Reason.UNSUPPORTED, message) from None


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MeshError(Reason.BAD_CHECKPOINT, f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise MeshError(Reason.BAD_CHECKPOINT, f"{file} does not hold an object")
    return content


def content_of(token: Any) -> str:
    """A token's text; config files write it plain or as an object with its properties."""
    return str(token["content"] if isinstance(token, dict) else token)


def prepare(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Bring `backend` to what transformers makes of the same files.

    Tokens that only the config knows are added; `add_bos_token` and `add_eos_token`, where the config has
    them, overrule the post-processor in `tokenizer.json`; saved truncation and padding are dropped.
    """
    backend.no_truncation()
    backend.no_padding()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    described = config.get("added_tokens_decoder") or {}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    tokens = [
        *(described[key] for key in sorted(described, key=int)),
        *named.values(),
        *(extra.values() if isinstance(extra, dict) else extra),
    ]
    for token in tokens:
        if (content := content_of(token)) not in known:
            backend.add_tokens([as_added_token(token)])
            known.add(content)
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = named.get("bos_token") if config.get("add_bos_token") else None
        eos = named.get("eos_token") if config.get("add_eos_token") else None
        template = [token for token in (bos, "$A", eos) if token]
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)


def as_added_token(token: Any) -> AddedToken:
    if not isinstance(token, dict):
        return AddedToken(str(token), special=True, normalized=False)
    flags = {key: bool(token.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(str(token["content"]), **flags)


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, or the config's string, or the `default` one of the config's list."""
    if (file := folder / TEMPLATE_FILE).is_file():
        return file.read_text("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}


BYTE_OF = byte_level_alphabet()
