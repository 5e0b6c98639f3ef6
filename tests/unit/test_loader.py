"""Reading checkpoints: whole ones in every form, and a clear refusal of broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.engine.config import EngineConfig
from common.engine.runner import Chunk, ModelRunner
from common.errors.base import MeshError, Reason
from common.kvcache.layout import KvLayout
from common.kvcache.pool import KvPool

pytestmark = pytest.mark.unit

HIDDEN, FEED_FORWARD, VOCAB, LAYERS, HEADS, KV_HEADS = 32, 48, 64, 2, 4, 2
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "eos_token_id": 5,
}
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def make_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {f"{attention}.q_proj": (HIDDEN, HIDDEN), f"{attention}.o_proj": (HIDDEN, HIDDEN)}
        shapes |= {f"{attention}.k_proj": (kv, HIDDEN), f"{attention}.v_proj": (kv, HIDDEN)}
        shapes |= {f"{mlp}.{name}_proj": (FEED_FORWARD, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{mlp}.down_proj": (HIDDEN, FEED_FORWARD)}
        shapes |= {f"model.layers.{layer}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    return {f"{name}.weight": torch.randn(shape) / 4 for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(make_tensors(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same in three files."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for shard in range(3):
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        part = {key: tensors[key].clone() for key in sorted(tensors)[shard::3]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load(folder: Path, **settings: Any) -> ModelRunner:
    return ModelRunner.load(EngineConfig(model_path=str(folder), device="cpu", **settings))


def logits(runner: ModelRunner) -> torch.Tensor:
    runner.attach_pool(KvPool(runner.layout, 4))
    return runner.run([Chunk(0, [1, 2, 3, 4], [2, 0], True)])


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_refused(folder: Path, *parts: str, reason: Reason = Reason.BAD_CHECKPOINT, **settings: Any) -> None:
    with pytest.raises(MeshError) as caught:
        load(folder, **settings)
    assert caught.value.reason == reason
    for part in parts:
        assert part in caught.value.message


def test_what_a_runner_knows(folder: Path) -> None:
    runner = load(folder, page_size=32)
    assert runner.layout == KvLayout("float32", LAYERS, KV_HEADS, HIDDEN // HEADS, 32)
    assert (runner.vocab_size, runner.context_length, runner.eos_token_ids) == (VOCAB, 128, (5,))
    assert load(folder, context_length=100).context_length == 100
    assert_refused(folder, "--context-length", "128", reason=Reason.BAD_CONFIG, context_length=129)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load(folder).eos_token_ids == (7, 8)
    with pytest.raises(ValueError, match="layout"):
        runner.attach_pool(KvPool(load(folder, page_size=16).layout, 4))
    with pytest.raises(RuntimeError, match="attach_pool"):
        runner.run([])


def test_sharded_is_the_same_model(folder: Path, request: pytest.FixtureRequest) -> None:
    whole = load(folder)
    parts = load(request.getfixturevalue("sharded"))
    assert whole.fingerprint == parts.fingerprint
    assert torch.equal(logits(whole), logits(parts))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_outlive_their_files(folder: Path, dtype: str, tied: bool) -> None:
    """Nothing that is kept is a view of a mapped file: overwriting a checkpoint must not change a running model."""
    change_config(folder, torch_dtype=dtype, tie_word_embeddings=tied)
    change_tensors(folder, lambda tensors: tensors.update({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}))
    runner = load(folder)
    before = logits(runner)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(logits(runner), before)


def test_fingerprint_tells_checkpoints_apart(folder: Path) -> None:
    known = {load(folder).fingerprint, load(folder).fingerprint}
    assert len(known) == 1
    known.add(load(folder, dtype="bfloat16").fingerprint)
    change_config(folder, rope_theta=20000.0)
    known.add(load(folder).fingerprint)
    change_config(folder)
    change_tensors(folder, lambda tensors: tensors[Q_PROJ].mul_(2))
    known.add(load(folder).fingerprint)
    assert len(known) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(folder: Path, dtype: str) -> None:
    reference = logits(load(folder))
    change_config(folder, torch_dtype=dtype)
    change_tensors(folder, lambda tensors: tensors.update({n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}))
    runner = load(folder)
    assert runner.layout.dtype == dtype
    torch.testing.assert_close(logits(runner), reference, atol=0.1, rtol=0.05)
    assert load(folder, dtype="float32").layout.dtype == "float32"


def test_no_such_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(tmp_path / "absent", "absent", "not a folder")
    assert_refused(tmp_path, "config.json", "No such file")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_refused(Path("nobody/nothing"), "nobody/nothing", "hub")


def test_hub_name_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that was downloaded before loads without a network."""
    commit = "0" * 40
    repository = folder / "hub" / "models--someone--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(snapshot / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    assert load(Path("someone/llama")).vocab_size == VOCAB


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": "wide"}, ["config.json", "hidden_size"]),
        ({"hidden_size": -1}, ["hidden_size is -1"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ({"architectures": ["BertModel"]}, ["BertModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None, "model_type": "bert"}, ["bert", "LlamaForCausalLM"]),
        ({"hidden_act": "gelu"}, ["gelu"]),
        ({"use_sliding_window": True}, ["sliding-window"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantized"]),
        ({"rope_scaling": {"type": "spiral"}}, ["config.json", "spiral", "llama3"]),
        ({"rope_scaling": {"type": "linear"}}, ["config.json", "linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, ["config.json", "factor"]),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["longrope", "4 short and long factors"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["part of a head"]),
        ({"vocab_size": VOCAB + 1}, ["model.safetensors", "embed_tokens", "[64, 32]", "[65, 32]"]),
        ({"num_hidden_layers": 3}, ["model.layers.2."]),
        ({"attention_bias": True}, ["q_proj.bias"]),
    ],
)
def test_bad_config(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    change_config(folder, **changes)
    assert_refused(folder, *parts)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"vocab_size": 64}', "\udcff"])
def test_invalid_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(folder, "config.json")


def test_model_type_alone(folder: Path) -> None:
    change_config(folder, architectures=None)
    assert load(folder).vocab_size == VOCAB


def test_broken_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert_refused(folder, "model.safetensors")
    path.write_bytes(content)
    change_tensors(folder, lambda tensors: tensors.pop(Q_PROJ))
    assert_refused(folder, Q_PROJ)
    path.write_bytes(content)
    change_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(3, 5)}))
    assert_refused(folder, "model.safetensors", Q_PROJ, "[3, 5]", "[32, 32]")
    path.write_bytes(content)
    change_tensors(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)}))
    assert_refused(folder, "model.safetensors", Q_PROJ, "int8")
    path.unlink()
    assert_refused(folder, "model.safetensors", "safetensors")


def test_broken_shards(sharded: Path) -> None:
    index, shard = sharded / "model.safetensors.index.json", sharded / "model-00002-of-00003.safetensors"
    known = json.loads(index.read_text())
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert_refused(sharded, shard.name)
    shard.unlink()
    assert_refused(sharded, shard.name)
    save_file({"other": torch.zeros(1)}, shard)
    assert_refused(sharded, shard.name, "lacks")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(known["weight_map"], "../model.safetensors")}))
    assert_refused(sharded, index.name, "not a file name")
    index.write_text("{}")
    assert_refused(sharded, index.name)
