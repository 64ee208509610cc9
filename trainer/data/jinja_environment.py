"""Jinja in a sandbox, with the same settings and functions as `transformers` has: a template means the same in both."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from trainer.data.jinja_limits import LimitedEnvironment

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters (Unicode 23.7: in no text) around what ``{% generation %}`` marks, while a text is rendered."""
TRAINING_DAY = "2024-07-26"
"""What ``strftime_now`` says in training unless it is set: data is prepared alike, and models answer alike, on any day."""

FAILURES = (
    jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, ArithmeticError, RecursionError, MemoryError
)  # fmt: skip
"""What rendering ends with where a template and a conversation do not fit each other."""


class Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


@functools.cache
def compiled(source: str) -> jinja2.Template:
    """A template, ready to render.

    Raises:
        jinja2.TemplateError: if it is no valid Jinja.
    """
    return _environment().from_string(source)


@functools.cache
def variables(source: str) -> frozenset[str]:
    """What a template reads that it does not set itself: what it is rendered with, and its own settings.

    Raises:
        jinja2.TemplateError: if it is no valid Jinja.
    """
    environment = _environment()
    return frozenset(meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys())


@functools.cache
def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def midnight(day: str) -> datetime:
    """The beginning of a day, which is written as YYYY-MM-DD.

    Raises:
        ValueError: if it is no such day.
    """
    return datetime.combine(date.fromisoformat(day), time())


def clock(now: datetime | None) -> Callable[[str], str]:
    """``strftime_now`` of a template: always ``now``, or the moment of the call."""
    return lambda form: (now or datetime.now()).strftime(form)


def with_defaults(source: str, settings: Mapping[str, Any]) -> str:
    """A template whose variables have other defaults: the same in every program that renders it, which may still set them."""
    lines = [
        f"{{% if {k} is not defined %}}{{% set {k} = {_literal(v)} %}}{{% endif %}}\n" for k, v in settings.items()
    ]
    defaults = "".join(lines)
    return source if source.startswith(defaults) else defaults + source


def _literal(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)  # a date of YAML


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
