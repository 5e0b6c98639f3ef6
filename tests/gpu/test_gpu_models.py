"""Models on a GPU: the code that the CPU runs, close to float32 on the CPU and equal however it is chunked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from common.engine.config import EngineConfig
from common.engine.runner import Chunk, ModelRunner
from common.kvcache.pool import KvPool
from tests.unit.test_models import deepseek_v2, deepseek_v3, expected, llama, make_model, mixtral, prompt_of, qwen3_moe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.flaky(reruns=0),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

PAGES, PAGE, CHUNK, TOKENS = 24, 8, 19, 16
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": llama,
    "qwen3-moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 2e-3), ("bfloat16", 0.1)])
def test_logits(name: str, dtype: str, apart: float, tmp_path: Path) -> None:
    """`apart` is a share of the largest logit, and of the middle one of the rows: rounding may send a token to another
    expert. The tokens are the oracle's, so that one odd choice is not the end."""
    model = make_model(MODELS[name](), tmp_path, varied=False)
    prompt = prompt_of(45)
    token_ids, logits_TV = expected(model, prompt, TOKENS + 1)
    runner = ModelRunner.load(EngineConfig(model_path=str(tmp_path), page_size=PAGE, device="cuda", dtype=dtype))
    runner.attach_pool(KvPool(runner.layout, PAGES, device=runner.device))
    pages, rows = list(range(PAGES))[::-1], []
    for start in range(0, len(prompt), CHUNK):
        chunk = prompt[start : start + CHUNK]
        rows.append(runner.run([Chunk(start, chunk, pages, start + len(chunk) == len(prompt))]))
    for index, token in enumerate(token_ids[:-1]):
        rows.append(runner.run([Chunk(len(prompt) + index, [token], pages, True)]))
    apart_T = (torch.cat(rows).cpu() - logits_TV).abs().amax(1)
    assert apart_T.median() < apart * logits_TV.abs().max()
