"""The model runner: weights on one device, a KV pool attached, one forward pass per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from common.config.flags import bad
from common.dist.parallel import NOT_PARALLEL, Parallel
from common.engine.base import Sampled
from common.engine.batch import Chunk as Chunk
from common.engine.batch import make_batch
from common.engine.config import EngineConfig, choose_context
from common.engine.sampler import sample
from common.engine.scheduler import Span
from common.kvcache.layout import KvLayout
from common.kvcache.pool import TORCH_DTYPE, KvPool
from common.models.checkpoint import Checkpoint
from common.models.config import ModelConfig, kv_layout, read_config, read_eos_token_ids
from common.models.find import find_checkpoint
from common.models.fp8 import choose_fp8, why_dequantized
from common.models.registry import CausalLM, find_loader
from common.obs.log import get_logger
from common.ops.attention.base import AttentionBackend, make_attention

log = get_logger(__name__)


class ModelRunner:
    """Weights and, once attached, a KV pool.

    Attributes:
        layout: Shape of the pages that `attach_pool` expects.
        vocab_size: Number of logits.
        context_length: Most tokens of prompt and output together.
        model_path: The folder that was loaded.
        fingerprint: Equal on two workers that run the same checkpoint in the same dtype.
        eos_token_ids: Tokens that end a sequence.
        device: Where weights and pool are.
    """

    def __init__(
        self,
        model: CausalLM,
        model_config: ModelConfig,
        layout: KvLayout,
        context_length: int,
        model_path: str,
        fingerprint: str,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        num_heads: int,
    ) -> None:
        self.model = model
        self.layout = layout
        self.vocab_size = model_config.vocab_size
        self.context_length = context_length
        self.model_path = model_path
        self.fingerprint = fingerprint
        self.eos_token_ids = eos_token_ids
        self.device = device
        self.num_heads = num_heads
        self.scale = model_config.attention_scale
        self.attention: AttentionBackend | None = None
        self.pool: KvPool | None = None

    @classmethod
    def load(cls, config: EngineConfig, parallel: Parallel = NOT_PARALLEL) -> ModelRunner:
        """Load a rank's part of a checkpoint's weights. Sets torch's number of threads when `config` names one.

        Raises:
            MeshError: BAD_CHECKPOINT for a folder that is broken or not supported; BAD_CONFIG for a context that
                is longer than the model's, a device that is not there, or a model that so many ranks cannot share.
        """
        if config.cpu_threads:
            torch.set_num_threads(config.cpu_threads)
        device = choose_device(config)
        folder = find_checkpoint(config.model_path)
        model_config = read_config(folder)
        load_model = find_loader(model_config)
        dtype = choose_dtype(config, model_config)
        context_length = choose_context(config, model_config.context_length)
        quantization = choose_fp8(config.quantization, model_config)
        if quantization:
            log.info(f"FP8 weights are dequantized to {dtype}: {why_dequantized(device)}", stored=quantization.stored)
        with torch.inference_mode(), Checkpoint(folder, TORCH_DTYPE[dtype], device, quantization) as checkpoint:
            model = load_model(model_config, checkpoint, context_length, parallel)
            fingerprint = checkpoint.fingerprint(model_config)
        ranks, layers = parallel.attention.group.size, parallel.stage.layers(model_config.num_hidden_layers)
        return cls(
            model,
            model_config,
            kv_layout(model_config, dtype, config.page_size, ranks, len(layers)),
            context_length,
            str(folder),
            fingerprint,
            read_eos_token_ids(folder, model_config),
            device,
            model_config.num_attention_heads // ranks,
        )

    def attach_pool(self, pool: KvPool) -> None:
        """Use `pool` for all keys and values. Raises `ValueError` when its layout is another."""
        if pool.layout != self.layout:
            raise ValueError(f"the pool's layout is {pool.layout}, the model's {self.layout}")
        self.attention = make_attention("torch", pool, self.num_heads, self.scale)
        self.pool = pool

    def read_page(self, page: int) -> memoryview:
        """See `Runner.read_page`."""
        if self.pool is None:
            raise RuntimeError("read before attach_pool")
        return self.pool.read_page(page)

    def step(self, spans: Sequence[Span]) -> Sampled:
        """Compute and sample; see `Runner.step`."""
        sampled = run_and_sample(self.run, spans)
        if self.device.type == "cuda":  # the pages may leave at once, by engines that know nothing of streams
            torch.cuda.current_stream(self.device).synchronize()
        return sampled

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Compute a step: prompts' chunks and single tokens in any mixture and order.

        Returns float32 logits `[S, vocab_size]`, one row per chunk with `sample`, in the order of `chunks`.
        """
        return self.run_stage(chunks).float()

    @torch.inference_mode()
    def run_stage(self, chunks: Sequence[Chunk], stream_TE: torch.Tensor | None = None) -> torch.Tensor:
        """Like `run`, for one stage of a pipeline: later ones are given the stream that the one before returned."""
        if self.attention is None:
            raise RuntimeError("run before attach_pool")
        batch = make_batch(chunks, self.device)
        plan = self.attention.plan(batch.spans)
        return self.model(
            batch.token_ids_T if stream_TE is None else stream_TE, batch.positions_T, plan, batch.wanted_S
        )


def run_and_sample(run: Callable[[Sequence[Chunk]], torch.Tensor], spans: Sequence[Span]) -> Sampled:
    """Compute spans with `run`, which gives logits as `ModelRunner.run` does, and sample those that want it."""
    logits_SV = run(
        [
            Chunk(span.start, span.sequence.tokens(span.start, span.stop), span.sequence.pages, span.sample)
            for span in spans
        ]
    )
    sampling = [span.sequence for span in spans if span.sample]
    return sample(logits_SV, sampling) if sampling else Sampled([], [], [])


def choose_device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise bad("--device: there is no CUDA device")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", config.base_gpu_id)


def choose_dtype(config: EngineConfig, model_config: ModelConfig) -> str:
    """The configured dtype; `auto` is the checkpoint's, float32 where it names none that is served."""
    if config.dtype != "auto":
        return config.dtype
    stored = model_config.checkpoint_dtype
    return stored if stored in TORCH_DTYPE else "float32"
