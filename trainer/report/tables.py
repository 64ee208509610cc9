"""Tables of a report: texts side by side, settings, where a model comes from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trainer.export.cost_table import cost_table, measured_on
from trainer.report.html import Html, capital, details, joined, markup, number, tag
from trainer.report.recording import Recording, flat

LONGEST = 1500
"""Characters of a text that are shown."""
PROMPTS = 12
"""Rows of a table of texts."""
MOMENTS = 3
"""Columns of samples of one run: the first evaluation, one in the middle, the last."""
ROW_FIELDS = ("step", "prompt", "completion")
EMPTY_PROMPT = tag("em", "from nothing")
BREAK = Html("<br>")


def plain(value: Any) -> str:
    """A value as text."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shortened(value: Any) -> str:
    """A text of any length; what is not shown is counted."""
    full = plain(value)
    more = f" … ({len(full) - LONGEST:,} more characters)" if len(full) > LONGEST else ""
    return full[:LONGEST] + more


def code(value: Any) -> Html:
    """A value in the letters of code."""
    return tag("code", plain(value))


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", numbers: Sequence[int] = ()
) -> Html:
    """A table whose rows begin with a header; empty where there are none.

    Args:
        caption: says what it shows.
        columns: headings.
        rows: cells, text or markup.
        kind: ``texts`` for cells of long text.
        numbers: columns that are aligned to the right.
    """
    rows = list(rows)
    if not rows:
        return Html()

    def style(n: int) -> str | None:
        return "n" if n in numbers else "text" if kind == "texts" else None

    head = [tag("th", c, scope="col", class_="n" if n in numbers else None) for n, c in enumerate(columns)]
    body = []
    for first, *rest in rows:
        cells = [tag("td", value, class_=style(n)) for n, value in enumerate(rest, start=1)]
        body.append(tag("tr", tag("th", first, scope="row", class_=style(0)), *cells))
    content = (tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    # A region that scrolls must be reachable by keyboard.
    inner = tag("table", *content, class_=kind or None)
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def samples(run: Recording) -> Html:
    """The answers to each prompt at a few moments of the run, side by side."""
    by_step: dict[Any, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for row in run.samples:
        of_step, prompt = by_step.setdefault(row.get("step"), {}), str(row.get("prompt", ""))
        of_step[prompt, sum(1 for p, _ in of_step if p == prompt)] = row
    if not by_step:
        return Html()
    steps = sorted(by_step, key=lambda s: s if isinstance(s, int | float) else -1)
    last = by_step[steps[-1]]
    shared = [s for s in steps[:-1] if any(key in by_step[s] for key in last)]
    early = [shared[0], shared[len(shared) // 2]][: MOMENTS - 1] if len(shared) > 1 else shared
    moments = [*dict.fromkeys([*early, steps[-1]])]
    keys = sorted(last, key=lambda key: not any(key in by_step[s] for s in early))[:PROMPTS]
    rows = [[shortened(key[0]) or EMPTY_PROMPT, *(_answer(by_step[s].get(key)) for s in moments)] for key in keys]
    return table("What the model writes", ["Prompt", *(f"Step {s}" for s in moments)], rows, kind="texts")


def _answer(row: Any) -> str:
    """A completion with what is known about it, or a text alone."""
    if not isinstance(row, Mapping):
        return "–" if row is None else shortened(row)
    notes = [
        f"{key} {number(value) if isinstance(value, float) else plain(value)}"
        for key, value in row.items()
        if key not in ROW_FIELDS
    ]
    completion = shortened(row.get("completion", ""))
    return markup(completion, tag("small", " · ".join(notes))) if notes else completion


def errors(run: Recording) -> Html:
    """The held-out examples that the last evaluation got most wrong."""
    rows = [row for row in run.errors if row.get("step") == run.errors[-1].get("step")][:PROMPTS]
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c != "step"]
    headings = {"prompt": "Prompt", "completion": "Chosen", "rejected": "Rejected"}
    texts = [c for c in headings if c in columns]
    cells = []
    for row in rows:
        where = joined((f"{c} {plain(row.get(c))}" for c in columns if c not in texts), BREAK)
        cells.append([*(shortened(row.get(c, "")) for c in texts), where])
    caption = f"Most wrong after step {rows[0].get('step')}" if rows else ""
    return table(caption, [*(headings[c] for c in texts), "Where"], cells, kind="texts")


def changed(run: Recording) -> Html:
    """Settings that are not at their defaults."""
    defaults = run.facts.get("defaults") or {}
    now = dict(flat(run.config))
    rows = [[code(k), plain(now[k]), plain(d)] for k, d in defaults.items() if now.get(k, d) != d]
    return table("Settings that differ from their defaults", ["Setting", "Value", "Default"], rows)


def settings(run: Recording) -> Html:
    """Every setting of the run."""
    rows = [[code(k), plain(v)] for k, v in flat(run.config)]
    return details(f"All {len(rows)} settings", table("All settings", ["Setting", "Value"], rows)) if rows else Html()


def ancestry(run: Recording) -> Html:
    """The model's ancestors, the nearest first, and how each was made."""
    shown = {"step": "step", "data": "data", "tokenizer": "tokenizer", "git": "commit", "command": "command"}
    rows = []
    for ancestor in run.ancestors:
        facts = ancestor.facts
        how = [markup(f"{words} ", code(facts[key])) for key, words in shown.items() if facts.get(key) is not None]
        rows.append([code(str(ancestor.folder)), joined(how, BREAK) or "no record in its folder"])
    recorded = [
        details(f"Recorded {key}", _nested(run.export[key])) for key in ("ancestry", "parents") if run.export.get(key)
    ]
    return markup(table("Where the model comes from", ["Started from", "Made by"], rows), *recorded)


def _nested(value: Any) -> Html:
    """Any JSON as nested lists."""
    if isinstance(value, Mapping):
        return tag("ul", *(tag("li", f"{key}: ", _nested(v)) for key, v in list(value.items())[:200]))
    if isinstance(value, list):
        return tag("ol", *(tag("li", _nested(v)) for v in value[:200]))
    return tag("code", shortened(value))


def made(run: Recording) -> Html:
    """What the run was made from and with."""
    fingerprints = {"data": "data's", "tokenizer": "tokenizer's", "model": "base model's"}
    labels = {key: f"{owner} fingerprint" for key, owner in fingerprints.items()}
    labels |= {"git": "commit", **{key: key for key in ("command", "ranks", "device", "identity")}}
    rows = [[label, code(run.facts[key])] for key, label in labels.items() if run.facts.get(key) is not None]
    rows += [[f"best possible {name}", plain(value)] for name, value in run.floors.items()]
    versions = run.facts.get("versions")
    if isinstance(versions, Mapping):
        rows.append(["versions", ", ".join(f"{k} {v}" for k, v in versions.items())])
    return table("Made from and with", ["What", "Value"], rows)


def formats(run: Recording) -> Html:
    """What each further format of the export cost, the original first."""
    columns, rows = cost_table(run.formats)
    if not rows:
        return Html()
    caption = measured_on(run.formats) or "sizes alone: there were no held-out rows to measure on"
    numbers = tuple(range(1, len(columns)))
    return table(capital(caption), [capital(c) for c in columns], rows, numbers=numbers)


def statistics(run: Recording) -> Html:
    """What preparing the data counted."""
    lines = run.facts.get("statistics")
    if not isinstance(lines, list) or not lines:
        return Html()
    return tag("ul", *(tag("li", shortened(line)) for line in lines))


def time_split(run: Recording) -> Html:
    """Where the time went: a bar and its table."""
    laps = sorted(((n.replace("_", " and "), s) for n, s in run.seconds.items() if s > 0), key=lambda lap: -lap[1])
    total = sum(s for _, s in laps)
    if not total:
        return Html()
    bar, rows = [], []
    for n, (name, s) in enumerate(laps):
        bar.append(tag("span", class_=f"f{n % 6}", style=f"flex-grow:{s / total:.4f}"))
        swatch = tag("span", class_=f"swatch f{n % 6}", aria_hidden="true")
        rows.append([markup(swatch, name), f"{s:,.1f}", f"{s / total:.1%}"])
    return markup(
        tag("p", f"{laps[0][1] / total:.0%} of the time is {laps[0][0]}.", class_="reading"),
        tag("div", *bar, class_="split", aria_hidden="true"),
        table("Time of the first rank", ["Work", "Seconds", "Share"], rows, numbers=(1, 2)),
    )


def side_by_side(rows: Iterable[tuple[str, Mapping[str, Any]]], models: Sequence[str], caption: str) -> Html:
    """The same prompts answered by several models; ``rows``: a prompt and its answers by model."""
    cells = [
        [shortened(prompt) or EMPTY_PROMPT, *(_answer(answers.get(model)) for model in models)]
        for prompt, answers in rows
    ]
    return table(caption, ["Prompt", *models], cells, kind="texts")


def last_answers(runs: Sequence[Recording]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each prompt of several runs' last samples with the answers by run, where at least two have it."""
    by_prompt: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        count: dict[str, int] = {}
        for row in [r for r in run.samples if r.get("step") == run.samples[-1].get("step")]:
            prompt = str(row.get("prompt", ""))
            count[prompt] = count.get(prompt, 0) + 1
            by_prompt.setdefault((prompt, count[prompt]), {})[run.name] = row
    for (prompt, _), answers in list(by_prompt.items())[: 2 * PROMPTS]:
        if len(answers) > 1:
            yield prompt, answers
