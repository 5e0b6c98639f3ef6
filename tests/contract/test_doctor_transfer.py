"""`pdmesh doctor --transfer`: real engines between real processes, and what it makes of the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from common.cli import doctor_transfer
from common.cli.doctor_transfer import Found, ProbeConfig, ProbeFailed, advise, measure_all, two_processes
from common.transfer import registry
from common.worker.config import HandoverConfig

pytestmark = pytest.mark.contract

LOCAL, NIXL, MOONCAKE = (
    Found(pages_gib_s=rate, memcpy_pages_gib_s=8, memcpy_piece_gib_s=8) for rate in (6.0, 3.0, 0.5)
)
BROKEN = Found("it does not load")


def probes() -> list[str]:
    """The command lines of probe processes that run."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        if "common.cli.transfer_probe" in line:
            lines.append(line)
    return lines


def test_it_measures_every_backend_that_loads() -> None:
    command = [sys.executable, "-m", "common.cli.main", "doctor", "--transfer", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    reasons = registry.available()
    for name, found in told["backends"].items():
        assert bool(found["problem"]) == bool(reasons[name]), found
        if not found["problem"]:
            assert all(found[key] > 0 for key in ("piece_gib_s", "pages_gib_s", "memcpy_pages_gib_s", "notice_us"))
    for advice in told["use"].values():
        assert not advice["use"] or not told["backends"][advice["use"]]["problem"]
    assert not probes()


def test_a_setting_that_one_backend_refuses_is_that_ones_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_transfer, "measure", lambda worker: LOCAL)
    config = ProbeConfig(handover=HandoverConfig(disaggregation_ib_device="no_such_device"))
    found = measure_all(config)
    assert found["local"] == LOCAL
    assert "no RDMA device no_such_device" in found["nixl"].problem


def test_a_process_that_dies_is_told_and_nothing_is_left() -> None:
    with two_processes() as (writer, target):
        target.process.kill()
        with pytest.raises(ProbeFailed, match="was ended by signal 9"):
            target.ask("open", "{}", False)
        with pytest.raises(ProbeFailed, match=r"exit code 1: .*Error"):
            writer.ask("no such command")
    assert not probes()


def test_the_fastest_on_scattered_pages_is_advised() -> None:
    advice = advise({"local": LOCAL, "nixl": NIXL, "mooncake": MOONCAKE}, rdma=False, gpus=False)
    assert (advice["within_machine"].use, advice["between_machines"].use) == ("local", "nixl")
    assert advice["within_machine"].why == "scattered pages at 6.00 GiB/s, 2.0 times nixl"
    assert "over TCP, for want of an RDMA device" in advice["between_machines"].why


def test_pools_on_gpus_are_none_of_locals() -> None:
    advice = advise({"local": LOCAL, "nixl": BROKEN, "mooncake": MOONCAKE}, rdma=True, gpus=True)
    assert (advice["within_machine"].use, advice["between_machines"].use) == ("mooncake", "mooncake")
    assert "local moves no GPU's" in advice["within_machine"].why
    assert "by RDMA" in advice["between_machines"].why


def test_it_fails_when_no_backend_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for found, code in (({"local": BROKEN, "nixl": BROKEN}, 1), ({"local": LOCAL, "nixl": BROKEN}, 0)):
        monkeypatch.setattr(doctor_transfer, "measure_all", lambda config, found=found: found)
        assert doctor_transfer.run(Namespace(json=False)) == code
    said = " ".join(capsys.readouterr().out.split())
    assert "nixl does not work: it does not load" in said
    assert "no backend that works here does that" in said
