"""Settings of an engine; flags bear SGLang's names."""

from __future__ import annotations

from dataclasses import dataclass

from common.config.flags import bad, flag

ENGINES = ("torch", "emulated")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULT_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class EngineConfig:
    """One model on one rank."""

    engine: str = flag("torch", "What computes; emulated computes nothing and takes its time.", choices=ENGINES)
    emulated_preset: str = flag(
        "llama2-70b-h100-80gb-tp8", "Times of the emulated engine, by name; zero takes none.", metavar="NAME"
    )
    emulated_profile: str | None = flag(
        None, "TOML or JSON file with the emulated engine's times, instead of a preset.", metavar="FILE"
    )
    model_path: str = flag("", "Checkpoint folder, or a Hugging Face hub name.", aliases=("--model",))
    served_model_name: str | None = flag(None, "Name that clients ask for (default: the model path's last part).")
    load_format: str = flag("auto", "How weights are read.", choices=("auto", "safetensors"))
    trust_remote_code: bool = flag(False, "Accepted for compatibility; code from a checkpoint is never run.")
    dtype: str = flag("auto", "Type of weights and activations; auto takes the checkpoint's.", choices=DTYPES)
    quantization: str | None = flag(
        None, "Quantize the weights of a checkpoint that is not quantized, block-wise.", choices=("fp8",)
    )
    device: str = flag("auto", "Device to run on; auto takes CUDA where there is one.", choices=("auto", "cpu", "cuda"))
    base_gpu_id: int = flag(0, "First GPU of this worker.")
    context_length: int | None = flag(None, "Most tokens of prompt and output together (default: the model's).")
    page_size: int = flag(16, "Tokens of one page of KV cache.")
    mem_fraction_static: float = flag(0.8, "Share of the device's memory for weights and KV pool.")
    max_total_tokens: int | None = flag(None, "Tokens in the KV pool (default: what memory allows).")
    max_running_requests: int = flag(64, "Sequences that run at once.")
    chunked_prefill_size: int | None = flag(
        None, "Most prompt tokens computed in one step (default: 2048; 256 on CPU, where more are no faster)."
    )
    enable_mixed_chunk: bool = flag(
        False, "Compute prompts and decode in the same step, in a unified worker; without it they take turns."
    )
    disable_radix_cache: bool = flag(
        False, "Keep no prefixes for later prompts; for decode workers, --disaggregation-decode-enable-radix-cache."
    )
    num_reserved_decode_tokens: int = flag(
        512, "Growth counted for each sequence before more work is taken, if it may generate that much."
    )
    decode_prealloc_high_water: float = flag(0.8, "Share of the KV pool that may be promised; above it work waits.")
    random_seed: int = flag(0, "Seed of what the engine itself draws; requests bring their own.")
    cpu_threads: int | None = flag(None, "Threads of one rank's kernels on CPU (default: its share of the cores).")

    def __post_init__(self) -> None:
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise bad(f"--page-size: {self.page_size} is not a power of two")
        if not 0 < self.mem_fraction_static < 1:
            raise bad(f"--mem-fraction-static: {self.mem_fraction_static} is not between 0 and 1")
        if self.num_reserved_decode_tokens < 0:
            raise bad("--num-reserved-decode-tokens: must not be negative")
        if not 0 < self.decode_prealloc_high_water <= 1:
            value = self.decode_prealloc_high_water
            raise bad(f"--decode-prealloc-high-water: {value} is not above 0 and at most 1")
        if self.max_running_requests < 1:
            raise bad("--max-running-requests: must be at least 1")
        for name in ("chunked_prefill_size", "context_length", "max_total_tokens", "cpu_threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise bad(f"--{name.replace('_', '-')}: must be at least 1")


def choose_context(config: EngineConfig, longest: int) -> int:
    """The configured context, else the model's, which is `longest`. Raises `MeshError` (BAD_CONFIG) if it is more."""
    if config.context_length and config.context_length > longest:
        raise bad(f"--context-length: {config.context_length} is more than the model's {longest}")
    return config.context_length or longest
