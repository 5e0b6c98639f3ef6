"""Chat templates: Jinja from a checkpoint, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors.base import MeshError, Reason
from common.text.tokenizer import Tokenizer


class ChatTemplate:
    """A compiled template. Rendering happens in Jinja's sandbox: checkpoints are not trusted code."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises `MeshError` (UNSUPPORTED) for a template that does not parse."""
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateError as error:
            raise MeshError(Reason.UNSUPPORTED, f"the model's chat template cannot be read: {error}") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a checkpoint. Raises `MeshError` (UNSUPPORTED) when it has none."""
        if tokenizer.chat_template is None:
            message = "the model has no chat template: use plain completions, or give the checkpoint one"
            raise MeshError(Reason.UNSUPPORTED, message)
        return cls(tokenizer.chat_template, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; encode it without adding special tokens, the template writes its own.

        `variables` are further names the template may use. Raises `MeshError` (INVALID_PARAMETER) when the
        template refuses the messages.
        """
        names = {**self._special_tokens, **(variables or {})}
        names |= {"messages": messages, "tools": tools, "documents": None}
        names["add_generation_prompt"] = add_generation_prompt
        try:
            return self._template.render(names)
        except jinja2.TemplateError as error:
            problem = f"the model's chat template refuses these messages: {error}"
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            problem = f"the model's chat template fails on these messages: {type(error).__name__}: {error}"
        raise MeshError(Reason.INVALID_PARAMETER, problem, parameter="messages")


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model is trained on; in serving it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
