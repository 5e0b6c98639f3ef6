"""A checkpoint's config.json and generation_config.json, as transformers 4 and 5 write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.errors.base import MeshError, Reason
from common.layers.rope import RopeConfig

T = TypeVar("T")


class ModelConfig(msgspec.Struct, kw_only=True):
    """The fields of config.json that dense decoders use, checked for their types; others are ignored.

    Transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 `rope_parameters` and
    `dtype`; `rope` and `checkpoint_dtype` read either.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    architectures: list[str] | None = None
    model_type: str = ""
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    original_max_position_embeddings: int | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def kv_heads(self) -> int:
        """Key/value heads; as many as query heads where the checkpoint does not say."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def checkpoint_dtype(self) -> str | None:
        """Type of the weights on disk as config.json tells it."""
        return self.dtype or self.torch_dtype

    @property
    def rope(self) -> RopeConfig:
        """Rotary parameters. Raises `msgspec.ValidationError` for wrong types."""
        given: dict[str, Any] = {"rope_theta": self.rope_theta or 10000.0}
        given |= self.rope_scaling or {}
        given |= self.rope_parameters or {}
        given.setdefault("rope_type", given.get("type", "default"))
        if self.original_max_position_embeddings:
            given["original_max_position_embeddings"] = self.original_max_position_embeddings
        return msgspec.convert(given, RopeConfig)

    @property
    def context_length(self) -> int:
        """Tokens that the model can serve: `max_position_embeddings`, stretched by scaling kinds that stretch it."""
        rope = self.rope
        if rope.rope_type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * (rope.factor or 1))
        if rope.rope_type == "yarn" and rope.original_max_position_embeddings and rope.factor:
            return max(self.max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
        return self.max_position_embeddings


class GenerationConfig(msgspec.Struct):
    """The field of generation_config.json that ends a sequence."""

    eos_token_id: int | list[int] | None = None


def read_config(folder: Path) -> ModelConfig:
    """Read config.json. Raises `MeshError` (BAD_CHECKPOINT) when it is missing, invalid or asks for what is not
    served here."""
    path = folder / "config.json"
    config = read_json(path, ModelConfig)
    try:
        kind = config.rope.rope_type
    except msgspec.ValidationError as error:
        raise bad_checkpoint(f"{path}: rotary parameters: {error}") from None
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name in sizes:
        if getattr(config, name) < 1:
            raise bad_checkpoint(f"{path}: {name} is {getattr(config, name)}")
    if config.num_attention_heads % config.kv_heads:
        heads = f"{config.num_attention_heads} query heads among {config.kv_heads} key/value heads"
        raise bad_checkpoint(f"{path}: cannot share {heads}")
    unsupported = {
        "quantized weights": config.quantization_config is not None,
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
        "sliding-window attention": config.use_sliding_window or "sliding_attention" in (config.layer_types or ()),
        f"rope_type {kind!r} on part of a head": config.rope.partial_rotary_factor != 1.0,
    }
    for what, present in unsupported.items():
        if present:
            raise bad_checkpoint(f"{path}: {what}: not supported")
    return config


def read_eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Tokens that end a sequence: generation_config.json's, else config.json's."""
    path = folder / "generation_config.json"
    ids = read_json(path, GenerationConfig).eos_token_id if path.exists() else None
    if ids is None:
        ids = config.eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def read_json(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise bad_checkpoint(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise bad_checkpoint(f"{path}: {error}") from None


def bad_checkpoint(message: str) -> MeshError:
    return MeshError(Reason.BAD_CHECKPOINT, message)
