"""A checkpoint's config.json and generation_config.json, as transformers 4 and 5 write them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from common.errors.base import MeshError, Reason
from common.kvcache.layout import KvLayout
from common.layers.rope import RopeConfig, yarn_mscale

T = TypeVar("T")


class QuantizationConfig(msgspec.Struct, kw_only=True):
    """`quantization_config` of a checkpoint in FP8 whose weights have a scale for each block."""

    quant_method: str = ""
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    weight_block_size: tuple[int, int] | None = None


class ModelConfig(msgspec.Struct, kw_only=True):
    """The fields of config.json that decoders use, checked for their types; others are ignored.

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
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    quantization_config: QuantizationConfig | None = None

    # Multi-head latent attention; `kv_lora_rank` says that a model has it.
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int | None = None
    rope_interleave: bool = True

    # Mixture of experts. Their number has another name in every family; see `routed_experts`.
    n_routed_experts: int | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    n_shared_experts: int | None = None
    scoring_func: str | None = None
    topk_method: str | None = None
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None

    @property
    def kv_heads(self) -> int:
        """Key/value heads; as many as query heads where the checkpoint does not say."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated."""
        return self.head_size if self.kv_lora_rank is None else self.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """What the product of a query and a key is multiplied by."""
        if self.kv_lora_rank is None:
            return 1 / math.sqrt(self.head_size)
        scale, rope = 1 / math.sqrt(self.qk_nope_head_dim + self.qk_rope_head_dim), self.rope
        if rope.rope_type == "yarn" and rope.mscale_all_dim:  # DeepSeek's addition to YaRN
            trained = rope.original_max_position_embeddings or self.max_position_embeddings
            scale *= yarn_mscale(rope.factor or self.max_position_embeddings / trained, rope.mscale_all_dim) ** 2
        return scale

    @property
    def routed_experts(self) -> int:
        """Experts that a token is routed among; 0 in a dense model."""
        return self.n_routed_experts or self.num_experts or self.num_local_experts or 0

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


def kv_layout(
    config: ModelConfig, dtype: str, page_size: int, ranks: int = 1, num_layers: int | None = None
) -> KvLayout:
    """The pages of one of `ranks` that share the heads of `num_layers` layers, or all; a latent is on each of them."""
    latent = config.kv_lora_rank
    return KvLayout(
        dtype=dtype,
        num_layers=config.num_hidden_layers if num_layers is None else num_layers,
        num_kv_heads=max(1, config.kv_heads // ranks) if latent is None else 1,
        head_dim=config.head_size if latent is None else latent + config.qk_rope_head_dim,
        page_size=page_size,
        kind="mha" if latent is None else "mla",
    )


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
        **unsupported_quantization(config.quantization_config),
        f"the activation {config.hidden_act!r}": config.hidden_act != "silu",
        "sliding-window attention": config.use_sliding_window or "sliding_attention" in (config.layer_types or ()),
        f"rope_type {kind!r} on part of a head": config.rope.partial_rotary_factor != 1.0,
    }
    for what, present in unsupported.items():
        if present:
            raise bad_checkpoint(f"{path}: {what}: not supported")
    return config


def unsupported_quantization(given: QuantizationConfig | None) -> dict[str, bool]:
    """What of a checkpoint's quantization is not served here."""
    if given is None:
        return {}
    if given.quant_method != "fp8":
        return {f"weights quantized by {given.quant_method!r}": True}
    block = given.weight_block_size
    return {
        f"weights quantized to FP8 in the format {given.fmt!r}": given.fmt != "e4m3",
        f"weights quantized to FP8 with activation_scheme {given.activation_scheme!r}": (
            given.activation_scheme != "dynamic"
        ),
        f"weights quantized to FP8 with weight_block_size {block}": block is None or min(block) < 1,
    }


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
