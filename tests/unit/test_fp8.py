"""Checkpoints in FP8 with a scale for each block: run as their dequantized selves, refused when a scale is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from common.engine.config import EngineConfig
from common.engine.runner import Chunk, ModelRunner
from common.errors.base import MeshError, Reason
from common.kvcache.pool import KvPool
from common.models.fp8 import BLOCK, DTYPE, dequantize, quantize
from tests.unit.test_models import deepseek_v3, make_model, prompt_of, qwen3_moe

pytestmark = pytest.mark.unit

SMALL_BLOCK = (16, 24)
WEIGHTS = "model.safetensors"
Q_B, EXPERT = "model.layers.1.self_attn.q_b_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"


def is_projection(name: str) -> bool:
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))


def by_loops(weight_OI: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8, scales, and what they stand for, one block after the other."""
    outputs, inputs = weight_OI.shape
    rows, columns = range(0, outputs, block[0]), range(0, inputs, block[1])
    fp8, scale = torch.empty(outputs, inputs, dtype=DTYPE), torch.empty(len(rows), len(columns))
    meant = torch.empty(outputs, inputs)
    for p, row in enumerate(rows):
        for q, column in enumerate(columns):
            at = (slice(row, row + block[0]), slice(column, column + block[1]))
            scale[p, q] = weight_OI[at].abs().max() / 448
            fp8[at] = (weight_OI[at] / scale[p, q]).to(DTYPE)
            meant[at] = fp8[at].float() * scale[p, q]
    return fp8, scale, meant


def make_fp8(folder: Path, block: tuple[int, int], **changes: Any) -> Path:
    """A DeepSeek-V3 in FP8; beside it in `plain` what its weights mean."""
    make_model(deepseek_v3(**changes), folder / "plain", varied=False)
    (folder / "fp8").mkdir()
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "plain" / WEIGHTS).items():
        stored[name] = meant[name] = tensor
        if is_projection(name):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = by_loops(tensor, block)
    save_file(stored, folder / "fp8" / WEIGHTS)
    save_file(meant, folder / "plain" / WEIGHTS)
    config = json.loads((folder / "plain" / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    (folder / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder / "fp8"


def load(folder: Path, **settings: Any) -> ModelRunner:
    return ModelRunner.load(EngineConfig(model_path=str(folder), device="cpu", page_size=8, **settings))


def logits(runner: ModelRunner) -> torch.Tensor:
    runner.attach_pool(KvPool(runner.layout, 8))
    return runner.run([Chunk(0, prompt_of(50), list(range(8)), True)])


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 300), (40, 130)])
@pytest.mark.parametrize("block", [BLOCK, SMALL_BLOCK])
def test_blocks(shape: tuple[int, int], block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    fp8, scale, meant = by_loops(weight_OI, block)
    assert dequantize(fp8, scale, block).equal(meant)
    ours_fp8, ours_scale = quantize(weight_OI, block)
    assert ours_fp8.dtype == DTYPE
    torch.testing.assert_close(ours_scale, scale)
    torch.testing.assert_close(dequantize(ours_fp8, ours_scale, block), meant, rtol=0.07, atol=1e-30)
    assert quantize(torch.zeros(shape), block)[0].float().count_nonzero() == 0


@pytest.mark.parametrize(("block", "hidden"), [(SMALL_BLOCK, 64), (BLOCK, 192)])
def test_equals_the_dequantized_model(block: tuple[int, int], hidden: int, tmp_path: Path) -> None:
    folder = make_fp8(tmp_path, block, hidden_size=hidden, moe_intermediate_size=136)
    with capture_logs() as lines:
        quantized = load(folder)
    assert [line["event"] for line in lines] == ["FP8 weights are dequantized to float32: cpu has no FP8 arithmetic"]
    plain = load(tmp_path / "plain")
    torch.testing.assert_close(logits(quantized), logits(plain), atol=1e-6, rtol=0)
    assert quantized.fingerprint != plain.fingerprint
    in_half = logits(load(folder, dtype="bfloat16"))
    assert (in_half - logits(plain)).abs().max() < 0.1 * logits(plain).abs().max()


def test_quantized_as_it_is_loaded(tmp_path: Path) -> None:
    """Projections are, in blocks of 128; embedding, norms, head and router are not."""
    make_model(qwen3_moe(hidden_size=160), tmp_path / "given", varied=False)
    rounded = load_file(tmp_path / "given" / WEIGHTS)
    for name, tensor in rounded.items():
        if is_projection(name):
            rounded[name] = dequantize(*quantize(tensor, BLOCK), BLOCK)
    (tmp_path / "rounded").mkdir()
    save_file(rounded, tmp_path / "rounded" / WEIGHTS)
    (tmp_path / "rounded" / "config.json").write_bytes((tmp_path / "given" / "config.json").read_bytes())
    runner, plain = load(tmp_path / "given", quantization="fp8"), load(tmp_path / "given")
    torch.testing.assert_close(logits(runner), logits(load(tmp_path / "rounded")), atol=1e-6, rtol=0)
    assert not logits(runner).equal(logits(plain))
    assert runner.fingerprint != plain.fingerprint


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{Q_B}_scale_inv"), f"{Q_B}: is stored in FP8, but there is no"),
        (lambda tensors: tensors.pop(f"{EXPERT}_scale_inv"), f"{EXPERT}: is stored in FP8, but there is no"),
        (lambda tensors: tensors.update({f"{Q_B}_scale_inv": torch.ones(6, 2)}), "shape"),
        (lambda tensors: tensors[f"{Q_B}_scale_inv"].fill_(torch.nan), f"{Q_B}_scale_inv: a scale is not finite"),
        (lambda tensors: tensors[f"{EXPERT}_scale_inv"][0].zero_(), f"{EXPERT}_scale_inv: a scale is not finite"),
        (lambda tensors: tensors[f"{EXPERT}_scale_inv"].neg_(), "a scale is not finite and above 0"),
        (lambda tensors: tensors[f"{Q_B}_scale_inv"].fill_(3e38), "times its scales it is not finite"),
        (lambda tensors: tensors.update({f"{Q_B}_scale_inv": torch.ones(6, 1, dtype=torch.int32)}), "int32"),
        (lambda tensors: tensors.update({Q_B: tensors[Q_B].float()}), "has a scale, but is stored in torch.float32"),
        (lambda tensors: tensors[Q_B].view(torch.uint8).fill_(0x7F), "not finite"),
    ],
)
def test_wrong_scales_are_refused(edit: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path) -> None:
    folder = make_fp8(tmp_path, SMALL_BLOCK)
    change(folder, edit)
    with pytest.raises(MeshError, match=message) as caught:
        load(folder)
    assert caught.value.reason == Reason.BAD_CHECKPOINT


def test_projections_left_unquantized_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = make_fp8(tmp_path, SMALL_BLOCK)
    plain = load_file(tmp_path / "plain" / WEIGHTS)

    def restore(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{Q_B}_scale_inv"]
        tensors[Q_B] = plain[Q_B]

    change(folder, restore)
    torch.testing.assert_close(logits(load(folder)), logits(load(tmp_path / "plain")), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "float8_e4m3fn is not supported"),
        ({"quant_method": "gptq"}, "quantized by 'gptq'"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "quantization_config.weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [16, 24], "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "static"}, "static"),
    ],
)
def test_other_quantizations_are_refused(quantization: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    folder = make_fp8(tmp_path, SMALL_BLOCK)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(MeshError, match=message):
        load(folder)
