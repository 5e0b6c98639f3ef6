"""A checkpoint's weights: safetensors files, memory-mapped and read one tensor at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from common.models import fp8
from common.models.config import ModelConfig, bad_checkpoint, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLE_ELEMENTS = 64  # of every tensor, for the fingerprint


class Index(msgspec.Struct):
    """model.safetensors.index.json: which file holds each tensor."""

    weight_map: dict[str, str]


class Checkpoint:
    """Tensors of one folder, in one dtype, on one device.

    Files are mapped, so a tensor is in private memory only once it was asked for; the caller packs and drops it.
    Use it as a context manager: leaving it unmaps the files.

    Every method raises `MeshError` (BAD_CHECKPOINT), naming the file and tensor at fault.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, quantization: fp8.BlockFp8 | None = None
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self.quantization = quantization
        self.files: dict[str, Any] = {}
        self.file_of = self.find_tensors()

    def find_tensors(self) -> dict[str, str]:
        """Which file holds each tensor; opens all files, so that a missing or truncated one shows at once."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).exists() or not index.exists():
            return dict.fromkeys(self.open(SINGLE).keys(), SINGLE)
        file_of = read_json(index, Index).weight_map
        held = {name: set(self.open(name).keys()) for name in sorted(set(file_of.values()))}
        for tensor, name in file_of.items():
            if tensor not in held[name]:
                raise bad_checkpoint(f"{self.folder / name}: lacks {tensor}, which {INDEX} says is there")
        return file_of

    def open(self, name: str) -> Any:
        path = self.folder / name
        if Path(name).name != name:
            raise bad_checkpoint(f"{self.folder / INDEX}: {name!r} is not a file name")
        if not path.is_file():
            raise bad_checkpoint(f"{path}: no such file; weights must be safetensors")
        try:
            self.files[name] = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise bad_checkpoint(f"{path}: {error}") from None
        return self.files[name]

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, which must have `shape`, in this checkpoint's dtype, or `dtype`, and device.

        It may be a view of the file: copy it if it is kept.
        """
        stored = self.shaped(name, *shape)
        if not stored.is_floating_point() or stored.itemsize < 2:
            raise bad_checkpoint(f"{self.where(name)}: {stored.dtype} is not supported")
        return stored.to(self.device, dtype or self.dtype)

    def projection(self, name: str, *shape: int) -> torch.Tensor:
        """Like `tensor`, for the weight of a projection, which may be stored in FP8, or shall be quantized."""
        if self.quantization is None:
            return self.tensor(name, *shape)
        if not self.quantization.stored:
            weight_OI, scale_PQ = fp8.quantize(self.tensor(name, *shape), self.quantization.block)
        elif (weight_OI := self.shaped(name, *shape)).dtype == fp8.DTYPE:
            weight_OI, scale_PQ = weight_OI.to(self.device), self.scale(name, *shape)
        elif f"{name}_scale_inv" in self.file_of:
            raise bad_checkpoint(f"{self.where(name)}: has a scale, but is stored in {weight_OI.dtype}")
        else:
            return self.tensor(name, *shape)  # one of those that the checkpoint leaves as they are
        weight_OI = fp8.dequantize(weight_OI, scale_PQ, self.quantization.block).to(self.dtype)
        if not weight_OI.isfinite().all():
            raise bad_checkpoint(f"{self.where(name)}: times its scales it is not finite in {self.dtype}")
        return weight_OI

    def scale(self, name: str, outputs: int, inputs: int) -> torch.Tensor:
        """The scales of the FP8 weight `name`, one a block."""
        assert self.quantization is not None
        rows, columns = self.quantization.block
        scale_name = f"{name}_scale_inv"
        if scale_name not in self.file_of:
            raise bad_checkpoint(f"{self.where(name)}: is stored in FP8, but there is no {scale_name}")
        scale_PQ = self.tensor(scale_name, -(-outputs // rows), -(-inputs // columns), dtype=torch.float32)
        if not (scale_PQ.isfinite() & (scale_PQ > 0)).all():
            raise bad_checkpoint(f"{self.where(scale_name)}: a scale is not finite and above 0")
        return scale_PQ

    def shaped(self, name: str, *shape: int) -> torch.Tensor:
        stored = self.stored(name)
        if tuple(stored.shape) != shape:
            raise bad_checkpoint(f"{self.where(name)}: shape {list(stored.shape)}, config.json wants {list(shape)}")
        return stored

    def owned(self, name: str, *shape: int) -> torch.Tensor:
        """Like `tensor`, but in memory of its own."""
        tensor = self.tensor(name, *shape)
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    def stored(self, name: str) -> torch.Tensor:
        if name not in self.file_of:
            raise bad_checkpoint(f"{self.folder}: lacks the tensor {name}")
        tensor: torch.Tensor = self.files[self.file_of[name]].get_tensor(name)
        return tensor

    def where(self, name: str) -> str:
        return f"{self.folder / self.file_of[name]}: {name}"

    def fingerprint(self, config: ModelConfig) -> str:
        """Digest of what decides the model's output: the config, the dtype it runs in, the quantization, and all
        tensors' names, shapes, types and first and last elements. It does not depend on how the weights are sharded."""
        decides = [config, str(self.dtype), self.quantization]
        digest = hashlib.sha256(msgspec.json.encode(decides, order="sorted"))
        for name in sorted(self.file_of):
            flat = self.stored(name).flatten()
            digest.update(f"{name} {list(self.stored(name).shape)} {flat.dtype}".encode())
            for part in (flat[:SAMPLE_ELEMENTS], flat[-SAMPLE_ELEMENTS:]):
                digest.update(part.clone().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def close(self) -> None:
        """Unmap the files. Idempotent."""
        self.files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
