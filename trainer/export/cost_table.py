"""What formats cost, side by side: the same table on the console and in report.html. The first row is the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

ORIGINAL = "original"
NONE = "–"


class CostColumn(NamedTuple):
    """A column: the key in a record's ``cost``, its heading, and how a value is written."""

    key: str
    heading: str
    written: Callable[[float], str]


def _small(value: float) -> str:
    """A divergence, of which the smallest are rounding in float32."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


COLUMNS = (
    CostColumn("size", "MB", lambda v: f"{v / 1e6:,.{1 if v >= 1e6 else 3}f}"),
    CostColumn("bits_per_weight", "bits a weight", lambda v: f"{v:.2f}"),
    CostColumn("kl", "KL, nats a token", _small),
    CostColumn("kl_error", "±", _small),
    CostColumn("perplexity", "perplexity", lambda v: f"{v:.3f}"),
    CostColumn("same_token", "same top token", lambda v: f"{v:.1%}"),
    CostColumn("exact_match", "exact match", lambda v: f"{v:.1%}"),
    CostColumn("score_change", "score changed by", lambda v: f"{v:.4f}"),
    CostColumn("same_order", "pairs ordered alike", lambda v: f"{v:.1%}"),
    CostColumn("accuracy", "accuracy", lambda v: f"{v:.1%}"),
)


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for the original and for each format; columns that no format has are left out."""
    columns = [c for c in COLUMNS if any(isinstance(cost.get(c.key), int | float) for cost in costs.values())]
    first = next(iter(costs.values()), {})
    original = {c.key: first.get(f"original_{c.key}") for c in columns}
    rows = [
        [name, *(c.written(value) if isinstance(value := cost.get(c.key), int | float) else NONE for c in columns)]
        for name, cost in {ORIGINAL: original, **costs}.items()
    ]
    return ["format", *(c.heading for c in columns)], rows if costs else []


def measured_on(costs: Mapping[str, Mapping[str, Any]]) -> str:
    """What the figures are of, a sentence; empty where nothing but sizes is known."""
    first = next((cost for cost in costs.values() if "tokens" in cost or "pairs" in cost), {})
    if "tokens" in first:
        error = "; ± is one standard error over sequences" if first.get("kl_error") is not None else ""
        answers = f", exact match of {first['answers']:,} answers" if first.get("answers") else ""
        where = f"{first['tokens']:,} held-out tokens of {first['sequences']:,} sequences{answers}"
        return f"KL(original || format) and perplexity on {where}, in float32 on the dequantised weights{error}"
    if "pairs" in first:
        return (
            f"scores of {first['pairs']:,} held-out pairs, in float32 on the dequantised weights; the original's scores "
            f"deviate by {first['score_spread']:.3g}"
        )
    return ""


def table_lines(costs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table as text, with what it was measured on."""
    headings, rows = cost_table(costs)
    return [*aligned([headings, *rows]), *filter(None, [measured_on(costs)])] if rows else []


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
