"""Frozen dataclasses whose fields are flags, environment variables and lines of a file.

A field made with `flag` becomes `--field-name`, `PDMESH_FIELD_NAME` and `field-name = …` in the TOML file that
`--config` names; the first of flag, environment, file and default that is set wins. A field whose type is
itself such a dataclass contributes its own fields. Anything that cannot be parsed raises `MeshError` with
BAD_CONFIG, naming the flag or variable.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import tomllib
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.errors.base import MeshError, Reason

T = TypeVar("T")
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def flag(
    default: Any,
    help: str,
    *,
    env: Sequence[str] = (),
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    metavar: str | None = None,
    secret: bool = False,
) -> Any:
    """A field with a default and one line of help. `env` names further variables, `aliases` further flags.

    What is `secret` reaches other processes by environment: every user of the machine can read command lines.
    """
    metadata = {
        "help": help,
        "env": tuple(env),
        "aliases": tuple(aliases),
        "choices": choices,
        "metavar": metavar,
        "secret": secret,
    }
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True)
class Option:
    """One leaf of a config class: where it stands and how it is read."""

    path: tuple[str, ...]
    kind: type  # str, int, float or bool
    many: bool  # a tuple of kind
    default: Any
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path[-1].replace("_", "-")

    @property
    def variables(self) -> tuple[str, ...]:
        return (f"PDMESH_{self.path[-1].upper()}", *self.metadata["env"])

    def parse(self, value: Any, source: str) -> Any:
        """`value` as this option's type; text comes from flags and environment, the rest from a file."""
        if self.many:
            parts = value.split(",") if isinstance(value, str) else value
            if not isinstance(parts, list):
                raise bad(f"{source}: expected a list, got {value!r}")
            return tuple(self.parse_one(part, source) for part in parts)
        return self.parse_one(value, source)

    def parse_one(self, value: Any, source: str) -> Any:
        wrong = bad(f"{source}: {value!r} is not {KINDS[self.kind]}")
        if self.kind is bool and str(value).lower() in TRUE | FALSE:
            return str(value).lower() in TRUE
        if self.kind is bool or isinstance(value, bool) or not isinstance(value, str | int | float):
            raise wrong
        if self.kind is int and isinstance(value, float):  # from a file; int() would cut it off
            raise wrong
        try:
            parsed = self.kind(value)
        except ValueError:
            raise wrong from None
        choices = self.metadata["choices"]
        if choices and parsed not in choices:
            raise bad(f"{source}: {parsed!r} is not one of {', '.join(choices)}")
        return parsed


def bad(message: str) -> MeshError:
    return MeshError(Reason.BAD_CONFIG, message)


def options(config: type, path: tuple[str, ...] = ()) -> Iterator[Option]:
    """All leaves of a config class, nested ones flattened."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from options(hint, (*path, field.name))
        elif field.metadata:
            kind, many = leaf(hint)
            yield Option((*path, field.name), kind, many, field.default, field.metadata)


def leaf(hint: Any) -> tuple[type, bool]:
    """The element type of a field, and whether it is a tuple of them. `X | None` is read as X."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def add_flags(parser: argparse.ArgumentParser, *configs: type, skip: Container[str] = ()) -> None:
    """Give `parser` a flag for every option of `configs` but those named in `skip`, and `--config`.

    Of two options with one name the first counts.
    """
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings")
    for option in distinct(configs):
        if option.name in skip:
            continue
        names = [f"--{option.name}", *option.metadata["aliases"]]
        text = option.metadata["help"].replace("%", "%%")
        if option.default not in (None, False, (), ""):
            text += f" (default: {option.default})"
        shared: dict[str, Any] = {"dest": option.path[-1], "default": None, "help": text}
        if option.kind is bool:
            parser.add_argument(*names, action=argparse.BooleanOptionalAction, **shared)
        else:
            metavar = option.metadata["metavar"] or (
                "|".join(option.metadata["choices"] or ()) or option.kind.__name__.upper()
            )
            parser.add_argument(*names, metavar=metavar, nargs="+" if option.many else None, **shared)


def distinct(configs: Iterable[type]) -> list[Option]:
    """The options of all `configs`; of those with one name, the first."""
    by_name: dict[str, Option] = {}
    for config in configs:
        for option in options(config):
            by_name.setdefault(option.name, option)
    return list(by_name.values())


def resolve(
    config: type[T],
    parsed: argparse.Namespace | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    file_of: Sequence[type] = (),
) -> T:
    """Build `config` from parsed flags, environment, file and defaults. Raises `MeshError` (BAD_CONFIG).

    The file may hold settings of `config` and of the classes `file_of`. An empty variable counts as unset.
    """
    given = vars(parsed) if parsed else {}
    in_file = read_file(given["config"], (config, *file_of)) if given.get("config") else {}
    values: dict[tuple[str, ...], Any] = {}
    variables: dict[str, str] = {}
    for option in options(config):
        if (value := given.get(option.path[-1])) is not None:
            values[option.path] = option.parse(value, f"--{option.name}")
        elif variable := next((name for name in option.variables if environ.get(name)), None):
            values[option.path] = option.parse(environ[variable], variable)
            variables[f"--{option.name}"] = variable
        elif option.name in in_file:
            values[option.path] = option.parse(in_file[option.name], f"{given['config']}: {option.name}")
    try:
        return build(config, values)
    except MeshError as error:
        raise bad(in_words_of(error.message, variables)) from None


def in_words_of(message: str, variables: Mapping[str, str]) -> str:
    """A config class names flags in what it refuses; whoever set a variable instead is told the variable's name."""
    return re.sub(r"--[a-z0-9-]+", lambda found: variables.get(found[0], found[0]), message)


def read_file(name: str, configs: Iterable[type]) -> dict[str, Any]:
    """The settings of a TOML file; a name that no option has is refused."""
    try:
        content = tomllib.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise bad(f"--config: {name}: {error}") from None
    settings = {key.replace("_", "-"): value for key, value in content.items()}
    if unknown := settings.keys() - {option.name for option in distinct(configs)}:
        raise bad(f"--config: {name}: unknown setting {', '.join(sorted(unknown))}")
    return settings


def build(config: type[T], values: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> T:
    hints = typing.get_type_hints(config)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        here = (*path, field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = build(hints[field.name], values, here)
        elif here in values:
            arguments[field.name] = values[here]
    return config(**arguments)


def to_flags(config: Any) -> list[str]:
    """The flags that make `config` again, whatever environment and defaults say; a field that is None has none.

    Secrets are left out: they are in `to_environment`.
    """
    flags: list[str] = []
    for option, value in leaves(config):
        if option.metadata["secret"]:
            continue
        if option.kind is bool:
            flags.append(f"--{option.name}" if value else f"--no-{option.name}")
        elif option.many:
            flags += [f"--{option.name}", *map(str, value)] if value else []
        elif value is not None:
            flags.append(f"--{option.name}={value}")
    return flags


def to_environment(config: Any) -> dict[str, str]:
    """The variables that `to_flags` leaves out: those of secrets that are set."""
    return {
        option.variables[0]: str(value)
        for option, value in leaves(config)
        if option.metadata["secret"] and value is not None
    }


def leaves(config: Any) -> Iterator[tuple[Option, Any]]:
    """Every option of `config` with its value there."""
    for option in options(type(config)):
        value = config
        for name in option.path:
            value = getattr(value, name)
        yield option, value
