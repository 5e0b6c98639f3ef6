"""The emulated engine's times: what a step costs, where the coefficients come from, and how they were fitted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from common.engine import emulated_fit
from common.engine.config import EngineConfig
from common.engine.emulated_times import DecodeTimes, PrefillTimes, Times, TransferTimes, load_times, presets
from common.engine.messages import Sampling
from common.engine.request import Sequence
from common.engine.scheduler import Span
from common.errors.base import MeshError, Reason

pytestmark = pytest.mark.unit

TIMES = Times(PrefillTimes(1.0, 0.01, 0.0001), DecodeTimes(2.0, 0.1, 0.001), TransferTimes(0.5, 1e9))
CONFIG = EngineConfig(engine="emulated")


def span(start: int, stop: int) -> Span:
    return Span(Sequence(1, [0] * stop, Sampling()), start, stop, True)


def test_a_prompt_costs_the_same_in_chunks_but_for_the_base() -> None:
    whole = TIMES.step_s([span(0, 100)])
    assert whole == pytest.approx(1.0 + 1.0 + 1.0)
    chunks = [TIMES.step_s([span(start, start + 25)]) for start in range(0, 100, 25)]
    assert sum(chunks) == pytest.approx(whole + 3 * 1.0)
    assert chunks == sorted(chunks)


def test_a_step_of_single_tokens() -> None:
    assert TIMES.step_s([span(99, 100), span(199, 200)]) == pytest.approx(2.0 + 0.2 + 0.3)
    assert TIMES.step_s([span(0, 1)]) == pytest.approx(1.0 + 0.01 + 0.0001), "a prompt of one token is a prompt"
    assert TIMES.step_s([]) == 0


def test_prompts_and_single_tokens_share_a_pass() -> None:
    both = TIMES.step_s([span(0, 100), span(99, 100)])
    assert both == pytest.approx(2.0 + 2.0 + 0.2)


def test_every_preset_is_plausible() -> None:
    known = presets()
    assert known["zero"] == Times()
    assert CONFIG.emulated_preset in known
    assert len(known) > 10
    for name, times in known.items():
        if name != "zero":
            assert 0.01 < times.step_s([span(0, 1024)]) < 1, name
            assert 0.01 < times.step_s([span(1023, 1024)]) < 0.1, name
            assert times.transfer.bytes_per_s > 1e9, name
    assert known["llama2-70b-h100-80gb-tp8"].step_s([span(0, 1024)]) < known["llama2-70b-a100-80gb-tp2"].step_s(
        [span(0, 1024)]
    )


def test_a_profile_is_toml_or_json(tmp_path: Path) -> None:
    toml, as_json = tmp_path / "times.toml", tmp_path / "times.json"
    toml.write_text("[prefill]\nbase_s = 0.5\n[transfer]\nlatency_s = 0.001\n")
    expected = Times(PrefillTimes(base_s=0.5), transfer=TransferTimes(latency_s=0.001))
    assert load_times(replace(CONFIG, emulated_profile=str(toml))) == expected
    as_json.write_bytes(msgspec.json.encode(TIMES))
    assert load_times(replace(CONFIG, emulated_profile=str(as_json))) == TIMES


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[prefill]\nbase = 1.0", "unknown field `base`"),
        ("[prefill]\nbase_s = -1.0", "base_s is -1.0"),
        ("[decode]\nbase_s = inf", "base_s is inf"),
        ("[decode]\nbase_s = 'long'", "Expected `float`"),
        ("prefill", "Expected '='"),
        (None, "No such file"),
    ],
)
def test_a_bad_profile_says_what_is_wrong(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "times.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(MeshError, match=problem) as caught:
        load_times(replace(CONFIG, emulated_profile=str(path)))
    assert caught.value.reason is Reason.BAD_CONFIG
    assert "--emulated-profile" in caught.value.message


def test_the_fit_finds_what_a_table_was_made_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel"]
    for prompt, batch, output in [(128, 1, 64), (512, 1, 64), (512, 8, 64), (512, 1, 512), (4096, 1, 64), (512, 64, 9)]:
        prompt_ms = 20 + 0.05 * prompt + 1e-5 * prompt**2
        token_ms = 30 + 0.2 * batch + 2e-4 * batch * (prompt + output / 2)
        lines += [f"m,h100,{prompt},{batch},{output},{prompt_ms},{token_ms},4"] * 2
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    emulated_fit.main(str(table))
    fitted = msgspec.convert(json.loads(capsys.readouterr().out)["m-h100-tp4"], Times)
    assert fitted.prefill == PrefillTimes(0.02, 5e-5, 1e-8)
    assert fitted.decode == DecodeTimes(0.03, 2e-4, 2e-7)


def test_the_fit_gives_no_negative_time() -> None:
    rows = [
        {"prompt_size": str(size), "batch_size": "1", "prompt_time": str(time)}
        for size, time in ((100, 10.0), (200, 20.0), (400, 39.0))  # bends down: its square would be below 0
    ]
    coefficients, error = emulated_fit.fit_prefill(rows)
    assert (coefficients >= 0).all()
    assert error < 0.05
