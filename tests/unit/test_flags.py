"""Settings from flags, environment, file and defaults."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.config.flags import add_flags, flag, resolve, to_flags
from common.errors.base import MeshError, Reason

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Inner:
    page_size: int = flag(16, "Tokens of a page.")
    ratio: float = flag(0.5, "A share; 100% is all.")


@dataclass(frozen=True)
class Outer:
    model_path: str = flag("", "Folder.", env=("MODEL",), aliases=("--model",))
    dtype: str = flag("auto", "Type.", choices=("auto", "float32"))
    verbose: bool = flag(False, "Say more.")
    cache: bool = flag(True, "Keep things.")
    sizes: tuple[int, ...] = flag((), "Some sizes.")
    limit: int | None = flag(None, "At most so many.")
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Other:
    page_size: int = flag(99, "Another page size.")
    colour: str = flag("red", "A colour.")


def parse(*arguments: str, configs: tuple[type, ...] = (Outer,)) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, *configs)
    return parser.parse_args(arguments)


def get(*arguments: str, environ: dict[str, str] | None = None) -> Outer:
    return resolve(Outer, parse(*arguments), environ or {})


def refusal(*arguments: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(MeshError) as caught:
        get(*arguments, environ=environ)
    assert caught.value.reason is Reason.BAD_CONFIG
    return caught.value.message


def write(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text)
    return str(path)


def test_defaults_need_nothing() -> None:
    assert get() == resolve(Outer, None, {}) == Outer()


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = write(tmp_path, "page-size = 8\nratio = 0.25")
    environ = {"PDMESH_PAGE_SIZE": "32"}
    assert get("--config", file).inner == Inner(8, 0.25)
    assert get("--config", file, environ=environ).inner == Inner(32, 0.25)
    assert get("--config", file, "--page-size", "64", environ=environ).inner == Inner(64, 0.25)


def test_aliases_and_further_variables() -> None:
    assert get("--model", "a").model_path == "a"
    assert get(environ={"MODEL": "b"}).model_path == "b"
    assert get(environ={"MODEL": "b", "PDMESH_MODEL_PATH": "c"}).model_path == "c"


def test_an_empty_variable_counts_as_unset() -> None:
    assert get(environ={"PDMESH_PAGE_SIZE": ""}).inner.page_size == 16


@pytest.mark.parametrize(("text", "value"), [("1", True), ("Yes", True), ("on", True), ("0", False), ("FALSE", False)])
def test_booleans_from_the_environment(text: str, value: bool) -> None:
    assert get(environ={"PDMESH_VERBOSE": text}).verbose is value


def test_booleans_from_flags() -> None:
    assert get("--verbose").verbose
    assert not get("--no-cache").cache
    assert not get("--no-verbose", environ={"PDMESH_VERBOSE": "1"}).verbose


def test_lists(tmp_path: Path) -> None:
    assert get("--sizes", "1", "2").sizes == (1, 2)
    assert get(environ={"PDMESH_SIZES": "3,4"}).sizes == (3, 4)
    assert get("--config", write(tmp_path, "sizes = [5, 6]")).sizes == (5, 6)


def test_file_takes_both_spellings(tmp_path: Path) -> None:
    assert get("--config", write(tmp_path, "page_size = 8")).inner.page_size == 8


@pytest.mark.parametrize(
    ("arguments", "environ", "name"),
    [
        (["--page-size", "many"], {}, "--page-size"),
        (["--dtype", "int3"], {}, "--dtype"),
        ([], {"PDMESH_LIMIT": "1.5"}, "PDMESH_LIMIT"),
        ([], {"PDMESH_VERBOSE": "perhaps"}, "PDMESH_VERBOSE"),
        ([], {"PDMESH_SIZES": "1,x"}, "PDMESH_SIZES"),
    ],
)
def test_errors_name_what_is_wrong(arguments: list[str], environ: dict[str, str], name: str) -> None:
    assert name in refusal(*arguments, environ=environ)


@pytest.mark.parametrize(
    "line", ["page-size = 1.5", "page-size = true", "verbose = 3", "sizes = 3", "model-path = ['a']", "dtype = 'x'"]
)
def test_errors_name_the_file_and_the_setting(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, line)
    message = refusal("--config", file)
    assert file in message
    assert line.split()[0] in message


def test_a_file_with_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    assert "pagesize" in refusal("--config", write(tmp_path, "pagesize = 8"))


def test_a_file_that_is_not_there_or_broken_is_refused(tmp_path: Path) -> None:
    assert "--config" in refusal("--config", str(tmp_path / "none.toml"))
    assert "--config" in refusal("--config", write(tmp_path, "page-size = "))


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--page", "8")
    assert "--page" in capsys.readouterr().err


def test_help_shows_defaults_and_keeps_per_cent_signs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Tokens of a page. (default: 16)" in text
    assert "A share; 100% is all. (default: 0.5)" in text


def test_several_classes_share_one_parser_and_one_file(tmp_path: Path) -> None:
    configs = (Outer, Other)
    file = write(tmp_path, "colour = 'blue'\nratio = 1")
    parsed = parse("--page-size", "8", "--config", file, configs=configs)
    outer = resolve(Outer, parsed, {}, file_of=configs)
    other = resolve(Other, parsed, {}, file_of=configs)
    assert outer.inner == Inner(8, 1.0)
    assert other == Other(8, "blue")


def test_to_flags_makes_the_same_config_again() -> None:
    config = Outer("-m", "float32", True, False, (1, 2), None, Inner(8, 0.1))
    hostile = {"PDMESH_PAGE_SIZE": "1", "PDMESH_CACHE": "1", "MODEL": "x"}
    assert get(*to_flags(config), environ=hostile) == config
    assert get(*to_flags(Outer()), environ=hostile) == Outer()
