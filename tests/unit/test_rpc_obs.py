"""Logs and metrics as every process has them."""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Iterator

import pytest
import structlog

from common.config.listen import LogConfig
from common.errors.base import MeshError, Reason
from common.obs import log as logs
from common.obs import metrics

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_ids_and_libraries_take_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(LogConfig(log_format="json"), "decode", rank=3)
    log = logs.get_logger("x.y")
    with logs.log_context(request_id="q", room_id="r"):
        log.info("hello", size=1)
    log.debug("not shown")
    logging.getLogger("library").warning("from %s", "a library")
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = map(json.loads, captured.err.splitlines())
    expected = {"event": "hello", "size": 1, "request_id": "q", "room_id": "r", "module": "x.y", "level": "info"}
    assert first.items() >= (expected | {"service": "decode", "rank": 3}).items()
    assert second.items() >= {"event": "from a library", "level": "warning", "service": "decode"}.items()
    assert "request_id" not in second


def test_an_exception_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(LogConfig(log_format="json"), "router")
    try:
        raise ZeroDivisionError("zero")
    except ZeroDivisionError:
        logs.get_logger("x").exception("broke")
    [line] = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: zero" in json.loads(line)["exception"]


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(LogConfig(), "router")
    logs.get_logger("x").warning("careful", port=1)
    line = capsys.readouterr().err
    assert "careful" in line
    assert "port=1" in line


def test_the_metrics_page() -> None:
    count = metrics.counter("test_things_total", "Things.", ("kind",))
    count.labels("a").inc(2)
    port, stop = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            text = page.read().decode()
        assert 'pdmesh_test_things_total{kind="a"} 2.0' in text
        assert "process_resident_memory_bytes" in text
        with pytest.raises(MeshError) as caught:
            metrics.serve("127.0.0.1", port)
        assert caught.value.reason is Reason.BAD_CONFIG
        assert str(port) in caught.value.message
    finally:
        stop()
        metrics.REGISTRY.unregister(count)
