"""The settings that SGLang's users know, under both their names, and refusals in the words of whoever set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cli.main import main
from common.config.flags import options, resolve
from common.errors.base import MeshError, Reason
from common.worker.config import HandoverConfig, WorkerConfig
from services.bootstrap.config import BootstrapConfig, BootstrapProcessConfig

pytestmark = pytest.mark.unit

# name, owner, default and a value that cannot work
SETTINGS: list[tuple[str, type, object, str]] = [
    ("BOOTSTRAP_TIMEOUT", BootstrapConfig, 300.0, "0"),
    ("WAITING_TIMEOUT", BootstrapConfig, 300.0, "-1"),
    ("HEARTBEAT_INTERVAL", BootstrapConfig, 5.0, "inf"),
    ("HEARTBEAT_MAX_FAILURE", BootstrapConfig, 2, "0"),
    ("THREAD_POOL_SIZE", HandoverConfig, None, "0"),
    ("QUEUE_SIZE", HandoverConfig, 4, "-4"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[0])
@pytest.mark.parametrize("family", ["PDMESH", "SGLANG"])
def test_both_names_and_the_default(setting: tuple[str, type, object, str], family: str) -> None:
    name, owner, default, _ = setting
    field, variable = f"disaggregation_{name.lower()}", f"{family}_DISAGGREGATION_{name}"
    assert getattr(resolve(owner, environ={}), field) == default
    assert getattr(resolve(owner, environ={variable: "7"}), field) == 7
    both = {f"PDMESH_DISAGGREGATION_{name}": "8", f"SGLANG_DISAGGREGATION_{name}": "7"}
    assert getattr(resolve(owner, environ=both), field) == 8


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting[0])
@pytest.mark.parametrize("family", ["PDMESH", "SGLANG"])
def test_a_bad_value_is_refused_with_the_variables_name(setting: tuple[str, type, object, str], family: str) -> None:
    name, owner, _, impossible = setting
    variable = f"{family}_DISAGGREGATION_{name}"
    for value in (impossible, "soon"):
        with pytest.raises(MeshError) as caught:
            resolve(owner, environ={variable: value})
        assert caught.value.reason is Reason.BAD_CONFIG
        assert caught.value.message.startswith(f"{variable}: ")
        assert "--" not in caught.value.message


def test_a_process_refuses_it_at_start_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "-1")
    assert main(["bootstrap", "--port", "0"]) == 2
    assert capsys.readouterr().err == "pdmesh: BAD_CONFIG: SGLANG_DISAGGREGATION_WAITING_TIMEOUT: must be above 0\n"


def test_a_flag_is_named_as_a_flag() -> None:
    with pytest.raises(MeshError, match="--disaggregation-queue-size: must be at least 1"):
        HandoverConfig(disaggregation_queue_size=0)


@pytest.mark.parametrize(
    ("cpus", "threads"), [(1, 1), (2, 1), (6, 3), (42, 4), (54, 5), (64, 6), (96, 9), (128, 12), (512, 12)]
)
def test_the_default_number_of_threads_leaves_half_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, cpus: int, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cpus))
    assert HandoverConfig().copy_threads == threads
    assert HandoverConfig(disaggregation_thread_pool_size=3).copy_threads == 3


def test_every_setting_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "settings.md").read_text()
    for option in (*options(BootstrapProcessConfig), *options(WorkerConfig)):
        assert f"| `--{option.name}`" in text, option.name
        assert all(f"`{variable}`" in text for variable in option.variables)
