"""Layouts of ranks: whatever is shared, gathered or dispatched, each rank's logits are those of one rank alone.

Ranks are threads here; over gloo, see test_tensor_parallel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from common.dist.dispatch.base import ExpertDispatch
from common.dist.dispatch.modes import LowLatencyDispatch, NormalDispatch
from common.dist.dispatch.torch import TorchBuffer
from common.dist.group import ALONE, Alone
from common.dist.layout import Layout, make_parallel
from common.dist.parallel import Parallel, Stage
from common.engine.config import EngineConfig
from common.engine.runner import Chunk, ModelRunner
from common.errors.base import MeshError, Reason
from common.kvcache.pool import KvPool
from common.models.config import read_config
from tests.thread_group import ThreadGroup, run_threads
from tests.unit.test_models import deepseek_v3, expected, llama, make_model, prompt_of

pytestmark = [pytest.mark.contract, pytest.mark.flaky(reruns=0)]

PAGES, PAGE, CHUNK, MOST = 12, 8, 19, 8
PROMPTS, LATER = (31, 7, 20, 1), (3, 9, 0, 6)  # of the data-parallel ranks
MODELS: dict[str, Callable[[], PreTrainedConfig]] = {"llama": llama, "deepseek-v3": deepseek_v3}


@dataclass(frozen=True)
class Given:
    """One data-parallel rank's prompt, the tokens that follow, and the logits after the prompt and each of them."""

    prompt: list[int]
    following: list[int]
    logits_TV: torch.Tensor

    def steps(self) -> list[tuple[int, bool]]:
        """How many tokens each step takes, and whether their logits are wanted."""
        length = len(self.prompt)
        takes = [min(CHUNK, length - start) for start in range(0, length, CHUNK)]
        first = len(takes) - 1
        takes += [1] * len(self.following)
        return [(take, number >= first) for number, take in enumerate(takes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@cache
def known(folder: Path, name: str) -> tuple[Path, list[Given]]:
    """A checkpoint and what transformers says of the prompts."""
    model, given = make_model(MODELS[name](), folder / name), []
    for length, later in zip(PROMPTS, LATER, strict=True):
        ids, logits_TV = expected(model, prompt_of(length), later + 1)
        given.append(Given(prompt_of(length), ids[:-1], logits_TV))
    return folder / name, given


def run_rank(runner: ModelRunner, parallel: Parallel, given: list[Given], mine: Given) -> torch.Tensor:
    """The logits of `mine`, while the ranks keep step."""
    everybodys = [some.steps() for some in given]
    known_ids, pages, computed, rows = mine.prompt + mine.following, list(range(PAGES))[::-1], 0, []
    for number in range(max(map(len, everybodys))):
        now = [steps[number] if number < len(steps) else (0, False) for steps in everybodys]
        tokens, wanted = [take for take, _ in now], [int(want) for _, want in now]
        parallel.begin_step(tokens, wanted, mixed=max(tokens) > 1)
        take, want = now[given.index(mine)]
        chunk = known_ids[computed : computed + take]
        rows.append(runner.run([Chunk(computed, chunk, pages, want)] if chunk else []))
        computed += take
    return torch.cat(rows)


LAYOUTS: dict[str, tuple[Layout, str]] = {
    "TP 4": (Layout(4), ""),
    "TP 4, EP 4": (Layout(4, ep_size=4), ""),
    "DP 2": (Layout(2, 2), ""),
    "DP 2, dense and head of their own": (Layout(2, 2, moe_dense_tp_size=1, dp_lm_head=True), ""),
    "TP 4, DP 2": (Layout(4, 2), ""),
    "TP 4, DP 2, EP 4, head of its own": (Layout(4, 2, ep_size=4, dp_lm_head=True), ""),
    "DP 4, EP 4, normal": (Layout(4, 4, ep_size=4), "normal"),
    "DP 4, EP 4, low latency": (Layout(4, 4, ep_size=4, moe_dense_tp_size=1), "low-latency"),
    "TP 2, EP 2, normal": (Layout(2, ep_size=2), "normal"),
    "TP 4, DP 2, EP 4, normal": (Layout(4, 2, ep_size=4), "normal"),
    "TP 4, DP 2, EP 4, low latency": (Layout(4, 2, ep_size=4, moe_dense_tp_size=1, dp_lm_head=True), "low-latency"),
    "DP 2, EP 2, low latency, all else of their own": (
        Layout(2, 2, ep_size=2, moe_dense_tp_size=1, dp_lm_head=True),
        "low-latency",
    ),
}


@pytest.mark.parametrize(
    ("layout_name", "name"),
    [(layout, name) for layout, (_, mode) in LAYOUTS.items() for name in MODELS if not mode or name != "llama"],
)
def test_equals_one_rank(layout_name: str, name: str, folder: Path) -> None:
    layout, mode = LAYOUTS[layout_name]
    path, given = known(folder, name)
    given = given[: layout.dp_size]
    experts = read_config(path).routed_experts

    def rank_main(group: ThreadGroup) -> torch.Tensor:
        dispatch: ExpertDispatch | None = None
        if mode:
            buffer = TorchBuffer(group, experts, MOST)
            dispatch = NormalDispatch(buffer) if mode == "normal" else LowLatencyDispatch(buffer)
        parallel = make_parallel(layout, group, dispatch)
        runner = ModelRunner.load(EngineConfig(model_path=str(path), page_size=PAGE, device="cpu"), parallel)
        runner.attach_pool(KvPool(runner.layout, PAGES))
        return run_rank(runner, parallel, given, given[group.rank // layout.attention_size])

    for rank, logits_TV in enumerate(run_threads(layout.tp_size, rank_main)):
        wanted_TV = given[rank // layout.attention_size].logits_TV
        torch.testing.assert_close(logits_TV, wanted_TV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("stages", "ranks"), [(2, 1), (3, 1), (2, 2)])
def test_stages_of_a_pipeline(stages: int, ranks: int, name: str, folder: Path) -> None:
    """One after the other, each with pages for its own layers."""
    path, given = known(folder, name)
    config, mine = EngineConfig(model_path=str(path), page_size=PAGE, device="cpu"), given[0]

    def rank_main(group: ThreadGroup) -> torch.Tensor:
        runners = []
        for number in range(stages):
            parallel = make_parallel(Layout(ranks), group, stage=Stage(number, stages))
            runners.append(ModelRunner.load(config, parallel))
            runners[-1].attach_pool(KvPool(runners[-1].layout, PAGES))
        assert sum(runner.layout.num_layers for runner in runners) == 3
        ids, pages, computed, rows = mine.prompt + mine.following, list(range(PAGES)), 0, []
        for take, want in mine.steps():
            chunks, stream_TE = [Chunk(computed, ids[computed : computed + take], pages, want)], None
            for runner in runners:
                stream_TE = runner.run_stage(chunks, stream_TE)
            assert stream_TE is not None
            rows.append(stream_TE)
            computed += take
        return torch.cat(rows)

    for logits_TV in run_threads(ranks, rank_main):
        torch.testing.assert_close(logits_TV, mine.logits_TV, atol=1e-4, rtol=0)


def test_dispatch_wants_owners() -> None:
    with pytest.raises(MeshError, match="--ep-size 1 to be --tp-size 2"):
        make_parallel(Layout(2), Alone(0, 2), NormalDispatch(TorchBuffer(ALONE, 2)))


def test_more_stages_than_layers_are_refused(folder: Path) -> None:
    path, _ = known(folder, "llama")
    with pytest.raises(MeshError, match="--pp-size: 3 layers cannot be cut among 4 stages"):
        ModelRunner.load(EngineConfig(model_path=str(path), device="cpu"), Parallel(stage=Stage(1, 4)))


def test_groups() -> None:
    layout = Layout(tp_size=8, dp_size=4)
    assert layout.attention_ranks() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.peer_ranks() == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(4, 3), r"4 ranks .* not 3 equal parts"),
        (lambda: Layout(4, ep_size=2), "--ep-size: 2"),
        (lambda: Layout(4, moe_dense_tp_size=2), "--moe-dense-tp-size: 2"),
        (lambda: Layout(4, dp_lm_head=True), "--enable-dp-lm-head"),
    ],
)
def test_impossible_layouts_are_refused(make: Callable[[], Layout], message: str) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        make()
    assert caught.value.reason == Reason.BAD_CONFIG
