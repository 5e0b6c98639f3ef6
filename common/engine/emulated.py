"""The emulated engine: everything of an engine but the computing.

Sequences are scheduled, pages are allocated and tokens come when a model's would, after the times of
`emulated_times.py`; nothing is computed, no weights are read and no pool is mapped. Output never ends by itself: a
request gets as many tokens as it asks for, or ends at a stop token that it named.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import msgspec

from common.config.flags import bad
from common.engine.base import Sampled
from common.engine.config import EngineConfig, choose_context
from common.engine.emulated_times import Times, load_times
from common.engine.engine import Engine
from common.engine.messages import TokenLogprobs
from common.engine.request import Sequence
from common.engine.scheduler import Span
from common.engine.uniform import uniform, uniforms
from common.kvcache.allocator import PageAllocator
from common.kvcache.layout import ELEMENT_BYTES, KvLayout
from common.models.config import ModelConfig, kv_layout, read_config, read_eos_token_ids
from common.models.find import TEXT_FILES, find_checkpoint

# A step that begins this soon after the last one's end counts from that end, or the process's own work between two
# steps, and its late waking, would add up.
SLIP_S = 0.002
FEW = 8  # sequences, for which NumPy's calls cost more than they save


class EmulatedRunner:
    """A `Runner` without a model: it waits, then hashes.

    A token depends on a seed, its position in the sequence and the vocabulary alone, so neither the batch nor the
    worker changes it, and a sequence that goes on elsewhere goes on with the same tokens. The seed is the
    request's; greedy requests share the engine's. It is never an end-of-sequence token. Log-probabilities are
    those of a uniform distribution, which is what it is drawn from.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        times: Times,
        *,
        model_path: str = "",
        eos_token_ids: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout_of(config, model_config)
        self.vocab_size = model_config.vocab_size
        self.context_length = choose_context(config, model_config.context_length)
        self.model_path = model_path
        self.eos_token_ids = eos_token_ids
        self.fingerprint = fingerprint(config, model_config)
        self._seed = config.random_seed
        self._times = times
        self._timeless = times == Times()
        self._clock = clock
        self._ends_at: float | None = None  # of the step under way
        self._ended_at = -math.inf

    def step(self, spans: Seq[Span]) -> Sampled | float:
        """See `Runner.step`."""
        sampling = [span.sequence for span in spans if span.sample]
        if self._timeless:
            return self._sample(sampling)
        now = self._clock()
        if self._ends_at is None:
            begins_at = self._ended_at if now - self._ended_at < SLIP_S else now
            self._ends_at = begins_at + self._times.step_s(spans)
        if self._ends_at > now:
            return self._ends_at - now
        self._ended_at, self._ends_at = self._ends_at, None
        return self._sample(sampling)

    def read_page(self, page: int) -> memoryview:
        """Nothing: its pages have no memory."""
        return memoryview(b"")

    def _sample(self, sequences: Seq[Sequence]) -> Sampled:
        sampled = Sampled([], [], [])
        for sequence, number in zip(sequences, self._draw(sequences), strict=True):
            token = self._allowed(int(number * self.vocab_size), sequence)
            sampled.token_ids.append(token)
            sampled.logprobs.append(self._logprobs(token, sequence))
        return sampled

    def _draw(self, sequences: Seq[Sequence]) -> list[float]:
        """A number from 0 to 1 for each."""
        seeds = [self._seed if sequence.is_greedy else sequence.sampling.seed for sequence in sequences]
        if len(sequences) <= FEW:
            return [uniform(seed, sequence.num_tokens) for seed, sequence in zip(seeds, sequences, strict=True)]
        drawn: list[float] = uniforms(seeds, [sequence.num_tokens for sequence in sequences]).tolist()
        return drawn

    def _allowed(self, token: int, sequence: Sequence) -> int:
        """`token`, or the next one that may be chosen here."""
        early = len(sequence.output_ids) < sequence.sampling.min_new_tokens
        masked = sequence.masked_ids if early else self.eos_token_ids
        if token in masked:
            for _ in masked:
                token = (token + 1) % self.vocab_size
                if token not in masked:
                    break
        return token

    def _logprobs(self, token: int, sequence: Sequence) -> TokenLogprobs | None:
        if (wanted := sequence.sampling.logprobs) is None:
            return None
        logprob = -math.log(self.vocab_size)
        top = ((token + i) % self.vocab_size for i in range(min(wanted, self.vocab_size)))
        return TokenLogprobs(token, logprob, tuple((token_id, logprob) for token_id in top))


def build_engine(
    config: EngineConfig,
    allocate: Callable[[int], memoryview] | None = None,
    register: Callable[[int, int, int | None], None] | None = None,
) -> Engine:
    """An emulated engine for the checkpoint's configuration; its weights need not be there.

    Its pool has a size, which the transfer backend is told through `register`, but no memory.

    Raises:
        MeshError: BAD_CHECKPOINT for a folder without a config.json that is served; BAD_CONFIG for times that
            cannot be had, or a pool without a page.
    """
    folder = find_checkpoint(config.model_path, TEXT_FILES)
    model_config = read_config(folder)
    eos_token_ids = read_eos_token_ids(folder, model_config)
    times = load_times(config)
    runner = EmulatedRunner(config, model_config, times, model_path=str(folder), eos_token_ids=eos_token_ids)
    pages = num_pages(config, runner)
    if register is not None:
        register(0, pages * runner.layout.page_bytes, None)
    return Engine(runner, PageAllocator(pages), config)


def num_pages(config: EngineConfig, runner: EmulatedRunner) -> int:
    """Pages of the pool: `--max-total-tokens`, or what `--max-running-requests` full contexts need."""
    if config.max_total_tokens is None:
        return config.max_running_requests * runner.layout.pages_for(runner.context_length)
    if config.max_total_tokens < config.page_size:
        raise bad(f"--max-total-tokens: {config.max_total_tokens} is not one page of {config.page_size}")
    return config.max_total_tokens // config.page_size


def layout_of(config: EngineConfig, model_config: ModelConfig) -> KvLayout:
    """The pages that a worker with this model would have."""
    stored = model_config.checkpoint_dtype
    dtype = config.dtype if config.dtype != "auto" else stored if stored in ELEMENT_BYTES else "float32"
    return kv_layout(model_config, str(dtype), config.page_size)


def fingerprint(config: EngineConfig, model_config: ModelConfig) -> str:
    """Digest of what decides the tokens; never that of a worker that computes."""
    decides = [model_config, config.dtype, config.random_seed]
    return "emulated-" + hashlib.sha256(msgspec.json.encode(decides, order="sorted")).hexdigest()[:23]
