"""A request as the router sees it, whichever API it came through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.text.tokenizer import Tokenizer
from pdmesh.v1 import types_pb2


@dataclass(frozen=True)
class Sampling:
    """`pdmesh.v1.SamplingParams` with defaults in place of unset fields. None: not told yet."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None

    def to_proto(self, seed: int) -> types_pb2.SamplingParams:
        """For one sequence on a worker: every default resolved. Stop strings and `n` stay with the router."""
        return types_pb2.SamplingParams(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            seed=seed,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True)
class Draft:
    """What a client asked for, not checked yet.

    `api` names the front it came through, in metrics and logs.
    `names` maps our parameters' names to those of the client's API, for error messages. An unset
    `max_new_tokens` becomes `default_max_new_tokens`, or less where the context ends; None: up to its end.
    """

    request_id: str
    api: str
    model: str
    prompts: Sequence[str | Sequence[int]]
    sampling: Sampling
    timeout_s: float | None = None
    default_max_new_tokens: int | None = 128
    add_special_tokens: bool = True
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked for: what all its workers can take.

    `pool_tokens` are those that the largest KV pool of a decode or unified worker holds; 0: unknown.
    """

    name: str
    model_path: str
    context_length: int
    vocab_size: int
    ready_at_s: float
    pool_tokens: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request: `prompts` of token ids, `sampling.n` sequences for each.

    `sampling.max_new_tokens` and `seed` are set. `tokenizer` is None when the model has none: then no text
    comes out. `deadline` is in the event loop's time.
    """

    request_id: str
    api: str
    model: ServedModel
    prompts: list[list[int]]
    sampling: Sampling
    tokenizer: Tokenizer | None
    deadline: float

    @property
    def sequences(self) -> int:
        return len(self.prompts) * self.sampling.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def prompt_of(self, index: int) -> list[int]:
        """The prompt of sequence `index`; sequences of one prompt are neighbours."""
        return self.prompts[index // self.sampling.n]

    def max_new_tokens_of(self, index: int) -> int:
        """Room for output: `max_new_tokens`, or what the context and the largest pool leave behind this prompt."""
        tokens, context = len(self.prompt_of(index)), self.model.context_length
        if self.sampling.max_new_tokens is not None:
            return min(context - tokens, self.sampling.max_new_tokens)
        pool = self.model.pool_tokens + 1  # the last token's KV is never computed
        most = min(context, pool) if self.model.pool_tokens else context
        return max(1, most - tokens)

    def sampling_of(self, index: int) -> types_pb2.SamplingParams:
        """How sequence `index` is sampled, as its workers are told."""
        assert self.sampling.seed is not None
        sampling = replace(self.sampling, max_new_tokens=self.max_new_tokens_of(index))
        return sampling.to_proto(derive_seed(self.sampling.seed, index % self.sampling.n))


@dataclass(frozen=True)
class Usage:
    """Token counts of a request, summed over its sequences; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass
class Delta:
    """A piece of one sequence of the answer; joined in order, `token_ids` and `text` are the answer.

    `usage` is set on the last delta of the request. `stop_reason` is the stop string that matched.
    """

    index: int
    token_ids: list[int]
    text: str
    token_offset: int
    logprobs: list[types_pb2.TokenLogprobs]
    finish: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_UNSPECIFIED
    stop_reason: str | None = None
    usage: Usage | None = None


def derive_seed(seed: int, index: int) -> int:
    """Seed of a prompt's sequence `index`: the request's own for the first, then a SplitMix64 step for each.

    SplitMix64: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014.
    """
    if index == 0:
        return seed
    mask = (1 << 64) - 1
    mixed = (seed + index * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)
