"""How long the emulated engine takes: a few coefficients, from a preset or a file.

The presets beside this file (`emulated_presets.json`) were fitted by `emulated_fit.py`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

import msgspec

from common.config.flags import bad
from common.engine.config import EngineConfig
from common.engine.scheduler import Span

PRESETS = Path(__file__).with_name("emulated_presets.json")
ZERO = "zero"


class PrefillTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`base_s + per_token_s · tokens + per_token_squared_s · tokens²` of one prompt.

    A chunk from position p to q counts `q - p` tokens and `q² - p²` squares: the chunks of a prompt cost its whole
    but for the base, which each step pays once.
    """

    base_s: float = 0.0
    per_token_s: float = 0.0
    per_token_squared_s: float = 0.0


class DecodeTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`base_s + per_sequence_s · sequences + per_kv_token_s · kv_tokens`: one token for each running sequence.

    `kv_tokens` are the tokens that all of them hold.
    """

    base_s: float = 0.0
    per_sequence_s: float = 0.0
    per_kv_token_s: float = 0.0


class TransferTimes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`latency_s + bytes / bytes_per_s` of one submission; 0 bytes per second means that bytes take no time."""

    latency_s: float = 0.0
    bytes_per_s: float = 0.0


class Times(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The times of one kind of worker; what is not given is 0."""

    prefill: PrefillTimes = PrefillTimes()
    decode: DecodeTimes = DecodeTimes()
    transfer: TransferTimes = TransferTimes()

    def step_s(self, spans: Iterable[Span]) -> float:
        """Seconds of one step. Prompts' chunks and single tokens share one pass: the larger base counts alone."""
        prefill, decode = self.prefill, self.decode
        chunk_tokens = chunk_squares = sequences = kv_tokens = 0
        for span in spans:
            if span.stop - span.start == 1 and span.start:
                sequences += 1
                kv_tokens += span.stop
            else:
                chunk_tokens += span.stop - span.start
                chunk_squares += span.stop**2 - span.start**2
        base_s = max(prefill.base_s if chunk_tokens else 0.0, decode.base_s if sequences else 0.0)
        prefill_s = prefill.per_token_s * chunk_tokens + prefill.per_token_squared_s * chunk_squares
        return base_s + prefill_s + decode.per_sequence_s * sequences + decode.per_kv_token_s * kv_tokens


def load_times(config: EngineConfig) -> Times:
    """The times that the settings ask for. Raises `MeshError` (BAD_CONFIG) for an unknown name or a bad file."""
    if config.emulated_profile is not None:
        return read_profile(Path(config.emulated_profile))
    known = presets()
    if config.emulated_preset not in known:
        raise bad(f"--emulated-preset: {config.emulated_preset!r} is not one of {', '.join(sorted(known))}")
    return known[config.emulated_preset]


def presets() -> dict[str, Times]:
    """All presets by name, `zero` among them."""
    return {ZERO: Times(), **msgspec.json.decode(PRESETS.read_bytes(), type=dict[str, Times])}


def read_profile(path: Path) -> Times:
    """Times from a file: JSON if it is called so, else TOML. Raises `MeshError` (BAD_CONFIG)."""
    where = f"--emulated-profile: {path}"
    try:
        text = path.read_text()
        times = msgspec.convert(msgspec.json.decode(text) if path.suffix == ".json" else tomllib.loads(text), Times)
    except (OSError, ValueError) as error:  # of the file, of TOML, of JSON and of the types
        raise bad(f"{where}: {error}") from None
    for part in (times.prefill, times.decode, times.transfer):
        for name, value in msgspec.structs.asdict(part).items():
            if not 0 <= value < float("inf"):
                raise bad(f"{where}: {name} is {value}; it must be a finite number, 0 or more")
    return times
