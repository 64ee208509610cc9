"""Markup whose text is always escaped, and numbers as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape


class Html(str):
    """Markup. Every other string is text, and is escaped where it enters markup."""

    __slots__ = ()


def markup(*children: str) -> Html:
    """Children one after the other: text escaped, markup as it is."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def tag(name: str, /, *children: str, **attributes: object) -> Html:
    """An element. Attributes are written as Python allows: ``class_``, ``aria_label``; True stands alone, None is left out.

    Floats are coordinates, rounded to a tenth of a pixel.
    """
    written = ""
    for key, value in attributes.items():
        if value is None:
            continue
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        written += f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(shown)}"')
    return Html(f"<{name}{written}>{markup(*children)}</{name}>")


def details(summary: str, *children: str) -> Html:
    """Content that is folded away."""
    return tag("details", tag("summary", summary), *children)


def joined(children: Iterable[str], separator: Html) -> Html:
    """Children with markup between them."""
    return Html(separator.join(markup(child) for child in children))


def anchor(name: str) -> str:
    """A name as an id."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())


def number(value: float | None) -> str:
    """Four significant digits, with commas between thousands."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if size >= 0.1 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is short."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def capital(text: str) -> str:
    """With a capital first letter; the rest as it is, as names such as KL need."""
    return text[:1].upper() + text[1:]


def plural(count: float, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number(count)} {noun}{'s' * (count != 1)}"
