"""Which file loads which model. A new family is a file beside this one and a line here."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from common.dist.parallel import Parallel
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig, bad_checkpoint
from common.ops.attention.base import Plan


class CausalLM(Protocol):
    """A loaded model: the tokens of one step in, logits out."""

    def __call__(
        self,
        given_T: torch.Tensor,
        positions_T: torch.Tensor,
        plan: Plan,
        wanted_S: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits `[S, V]` after the rows `wanted_S`; after all of them when it is None.

        `given_T` are token ids; but a later stage of a pipeline is given what the one before it returned, and all but
        the last return the stream `[T, E]`.
        """
        ...


class Loader(Protocol):
    """`load` of a family's file, for one rank.

    Raises `MeshError`: BAD_CHECKPOINT, or BAD_CONFIG for a model that so many ranks cannot share.
    """

    def __call__(
        self, config: ModelConfig, checkpoint: Checkpoint, context_length: int, parallel: Parallel
    ) -> CausalLM: ...


@dataclass(frozen=True)
class Family:
    """Names in config.json, and the module whose `load` serves them."""

    architecture: str
    model_type: str
    module: str


FAMILIES = (
    Family("LlamaForCausalLM", "llama", "common.models.llama"),
    Family("Qwen2ForCausalLM", "qwen2", "common.models.qwen2"),
    Family("Qwen3ForCausalLM", "qwen3", "common.models.qwen3"),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", "common.models.qwen3_moe"),
    Family("MixtralForCausalLM", "mixtral", "common.models.mixtral"),
    Family("DeepseekV2ForCausalLM", "deepseek_v2", "common.models.deepseek"),
    Family("DeepseekV3ForCausalLM", "deepseek_v3", "common.models.deepseek"),
)


def find_loader(config: ModelConfig) -> Loader:
    """The loader of a checkpoint's architecture, or of its model type where it names none.

    Raises:
        MeshError: BAD_CHECKPOINT when no family here serves it.
    """
    names = config.architectures or []
    for family in FAMILIES:
        if family.architecture in names or (not names and family.model_type == config.model_type):
            return cast(Loader, importlib.import_module(family.module).load)
    asked = ", ".join(names) or config.model_type or "an unnamed architecture"
    known = ", ".join(family.architecture for family in FAMILIES)
    raise bad_checkpoint(f"config.json asks for {asked}; known are {known}")
