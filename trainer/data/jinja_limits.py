"""How much work a chat template may do: templates come from strangers, and Jinja's sandbox limits neither time nor memory.

A template's loops, calls, filters and products are counted, so a limit is the same on every machine and in every thread.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

WORK = 3_000_000
"""Turns of loops, and items that calls, filters and operators give, of one rendering; a text counts by twenty characters."""
CHARACTERS = 20_000_000
"""Longest text or list that anything in a template may be."""
INTEGER = 1_000_000
"""Largest argument of a filter, or of a method of texts and numbers: a width, a count."""
BITS = 4096
"""Longest integer."""
FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{6,}|\*)|\{[^{}]*(?:\d{6,}|\{)[^}]*\}")
"""Formats of more than 99,999 characters, or of a width that is computed."""
FORMATTING = ("format", "format_map")
"""Filters and methods of a text that is a format; of others it is what somebody wrote."""


class WorkLimitError(jinja2.TemplateError):
    """A template does more than any conversation needs."""


class _Budget(threading.local):
    left = WORK


_budget = _Budget()


def rendered(template: jinja2.Template, **variables: Any) -> str:
    """The text of a template of a `LimitedEnvironment`.

    Raises:
        WorkLimitError: if it does more than it may.
    """
    _budget.left = WORK
    return template.render(**variables)


def spend(work: int) -> None:
    """Count work.

    Raises:
        WorkLimitError: if there is none left.
    """
    _budget.left -= work
    if _budget.left < 0:
        raise WorkLimitError(f"it does more than {WORK:,} turns of loops")


def bounded(value: Any) -> Any:
    """A value that is not too large; what it holds is counted as work."""
    if isinstance(value, int):
        _limit(value.bit_length(), BITS)
    elif isinstance(value, str | list | tuple | dict):
        _limit(len(value), CHARACTERS)
        spend(1 + len(value) // (20 if isinstance(value, str) else 1))
    return value


def _limit(size: int, most: int) -> None:
    if size > most:
        raise WorkLimitError(f"it makes a value of {size:,}, more than {most:,}")


def _limit_arguments(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int):
            _limit(abs(value), INTEGER)


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers are not huge and whose results are bounded; what it is applied to may be any number."""
    value = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def limited(*arguments: Any, **named: Any) -> Any:
        _limit_arguments((*arguments[value + 1 :], *named.values()))
        if name in FORMATTING:
            _limit_format(str(arguments[value]))
        return bounded(function(*arguments, **named))

    return limited


def _limit_format(text: str) -> None:
    if FORMAT.search(text):
        raise WorkLimitError("it formats a text with a width of six digits, or one that it computes")


def _counted(items: Iterable[Any], work: int) -> Iterator[Any]:
    for item in items:
        spend(work)
        yield item


class _CountLoops(NodeTransformer):
    """Counts every loop's turns, with the text that a turn writes, and bounds what ``~`` joins."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (the class's name decides)
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = self._filter(cast("nodes.Expr", node.iter), "_counted", 1 + text // 20)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, "_bounded")

    def _filter(self, node: nodes.Expr, name: str, *arguments: Any) -> nodes.Filter:
        constants: list[nodes.Expr] = [nodes.Const(value, lineno=node.lineno) for value in arguments]
        call = nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)
        call.set_environment(self.environment)
        return call


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with limits of work, of values' sizes and of numbers."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=bounded, **options)
        self.globals.pop("lipsum")  # text of any length, which no conversation has
        self.filters = {name: _limited(name, function) for name, function in self.filters.items()}
        self.filters |= {"_counted": _counted, "_bounded": bounded}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _CountLoops(self).visit(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _limit_format(left)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(many, str | list | tuple):
                    _limit(len(many) * times, CHARACTERS)
                elif isinstance(times, int) and isinstance(many, int):
                    _limit(many.bit_length() + times.bit_length(), BITS)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() * abs(right), BITS)
        return bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:  # noqa: N805  (names may be anything)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _limit_arguments((*arguments, *named.values()))
        if isinstance(owner, str) and method.__name__ in FORMATTING:
            _limit_format(owner)
        return bounded(super().call(__context, __obj, *arguments, **named))
