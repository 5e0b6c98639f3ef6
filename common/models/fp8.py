"""Weights in FP8 (E4M3) with one scale for each block, as DeepSeek-V3 stores them: `weight = fp8 * scale_inv`.

Shape suffixes: O outputs, I inputs, P and Q blocks of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.models.config import ModelConfig

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
BLOCK = (128, 128)  # of weights that are quantized here


@dataclass(frozen=True)
class BlockFp8:
    """How a model's projections are quantized.

    Attributes:
        block: Outputs and inputs that share a scale.
        stored: The checkpoint has them so; else they are quantized as they are loaded.
    """

    block: tuple[int, int]
    stored: bool


def choose_fp8(quantization: str | None, config: ModelConfig) -> BlockFp8 | None:
    """What the checkpoint has, else what `--quantization` wants."""
    given = config.quantization_config
    if given is not None and given.weight_block_size is not None:
        return BlockFp8(given.weight_block_size, stored=True)
    return BlockFp8(BLOCK, stored=False) if quantization == "fp8" else None


def why_dequantized(device: torch.device) -> str:
    """Why a device multiplies by dequantized weights."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return "there is no kernel here that multiplies by FP8 in blocks"
    return f"{device.type} has no FP8 arithmetic"


def dequantize(weight_OI: torch.Tensor, scale_PQ: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The weight in float32."""
    scale_OI = scale_PQ.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight_OI.float() * scale_OI[: weight_OI.shape[0], : weight_OI.shape[1]]


def quantize(weight_OI: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 `[O, I]` and scales `[P, Q]`: the largest of a block becomes the largest that FP8 has."""
    (outputs, inputs), (rows, columns) = weight_OI.shape, block
    padded_OI = F.pad(weight_OI.float(), (0, -inputs % columns, 0, -outputs % rows))
    blocks = padded_OI.view(padded_OI.shape[0] // rows, rows, padded_OI.shape[1] // columns, columns)
    scale_PQ = blocks.abs().amax((1, 3)).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    scaled_OI = (blocks / scale_PQ[:, None, :, None]).view(padded_OI.shape)
    return scaled_OI[:outputs, :inputs].to(DTYPE), scale_PQ
