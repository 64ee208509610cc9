"""Tables of a report: texts side by side, settings, where a model comes from. Everything from data is escaped here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from trainer.report.curves import number
from trainer.report.recording import Recording, flat

LONGEST = 1500
"""Characters of a text that are shown."""
PROMPTS = 12
"""Rows of a table of texts."""
MOMENTS = 3
"""Columns of samples of one run: the first evaluation, one in the middle, the last."""
ROW_FIELDS = ("step", "prompt", "completion")


def said(value: Any) -> str:
    """A value as escaped text."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return escape(f"{value:g}" if isinstance(value, float) else f"{value}")
    if isinstance(value, str):
        return escape(value)
    return escape(json.dumps(value, ensure_ascii=False, default=str))


def text(value: Any) -> str:
    """A text of any length and content as escaped text; what is not shown is counted."""
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    more = f" … ({len(whole) - LONGEST:,} more characters)" if len(whole) > LONGEST else ""
    return escape(whole[:LONGEST]) + more


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", numbers: Sequence[int] = ()
) -> str:
    """A table of cells that are escaped already; the first cell of a row is its header."""

    def cell(n: int, value: str, tag: str) -> str:
        scope = ' scope="row"' if tag == "th" else ""
        style = ' class="n"' if n in numbers else ' class="text"' if kind == "texts" else ""
        return f"<{tag}{scope}{style}>{value}</{tag}>"

    head = "".join(
        f'<th scope="col"{" class=n" if n in numbers else ""}>{escape(c)}</th>' for n, c in enumerate(columns)
    )
    body = "".join(
        "<tr>" + "".join(cell(n, value, "td" if n else "th") for n, value in enumerate(row)) + "</tr>" for row in rows
    )
    # A region that scrolls must be reachable by keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def samples(run: Recording) -> str:
    """The answers to each prompt at a few moments of the run, side by side; empty where there are none."""
    by_step: dict[Any, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for row in run.samples:
        held = by_step.setdefault(row.get("step"), {})
        prompt = str(row.get("prompt", ""))
        held[prompt, sum(1 for p, _ in held if p == prompt)] = row
    if not by_step:
        return ""
    steps = sorted(by_step, key=lambda s: s if isinstance(s, int | float) else -1)
    last = by_step[steps[-1]]
    shared = [s for s in steps[:-1] if any(key in by_step[s] for key in last)]
    early = [shared[0], shared[len(shared) // 2]][: MOMENTS - 1] if len(shared) > 1 else shared
    moments = [*dict.fromkeys([*early, steps[-1]])]
    rows = [
        [text(key[0]) or "<em>from nothing</em>", *(_completion(by_step[s].get(key)) for s in moments)]
        for key in sorted(last, key=lambda key: not any(key in by_step[s] for s in early))[:PROMPTS]
    ]
    return table("What the model writes", ["Prompt", *(f"Step {s}" for s in moments)], rows, kind="texts")


def _completion(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    notes = [
        f"{escape(str(key))} {number(value) if isinstance(value, float) else said(value)}"
        for key, value in row.items()
        if key not in ROW_FIELDS
    ]
    return text(row.get("completion", "")) + (f"<small>{' · '.join(notes)}</small>" if notes else "")


def errors(run: Recording) -> str:
    """The units of held-out data that the last evaluation got most wrong."""
    rows = [row for row in run.errors if row.get("step") == run.errors[-1].get("step")][:PROMPTS] if run.errors else []
    if not rows:
        return ""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c != "step"]
    texts = [c for c in ("prompt", "completion", "rejected") if c in columns]
    rest = [c for c in columns if c not in texts]
    names = {"completion": "Chosen", "rejected": "Rejected", "prompt": "Prompt"}
    cells = [
        [text(row.get(c, "")) for c in texts] + ["<br>".join(f"{escape(c)} {said(row.get(c))}" for c in rest)]
        for row in rows
    ]
    return table(
        f"Most wrong after step {rows[0].get('step')}", [*(names[c] for c in texts), "Where"], cells, kind="texts"
    )


def changed(run: Recording) -> str:
    """Settings that are not at their defaults."""
    defaults = run.facts.get("defaults") or {}
    now = dict(flat(run.config))
    rows = [[f"<code>{escape(k)}</code>", said(now[k]), said(d)] for k, d in defaults.items() if now.get(k, d) != d]
    return table("Settings that differ from their defaults", ["Setting", "Value", "Default"], rows) if rows else ""


def settings(run: Recording) -> str:
    """Every setting of the run."""
    rows = [[f"<code>{escape(k)}</code>", said(v)] for k, v in flat(run.config)]
    if not rows:
        return ""
    every = table("All settings", ["Setting", "Value"], rows)
    return f"<details><summary>All {len(rows)} settings</summary>{every}</details>"


def differing(runs: Sequence[Recording]) -> str:
    """Settings in which runs differ, one column a run."""
    held = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in held for key in one if key not in ("run_dir", "name"))
    rows = [
        [f"<code>{escape(key)}</code>", *(said(one[key]) if key in one else "–" for one in held)]
        for key in keys
        if len({json.dumps(one.get(key), default=str, sort_keys=True) for one in held}) > 1
    ]
    return table("Settings that differ", ["Setting", *(run.name for run in runs)], rows) if rows else ""


def ancestry(run: Recording) -> str:
    """The model's forebears, the nearest first, and how each was made."""
    rows = []
    for ancestor in run.ancestors:
        facts = ancestor.facts
        told = {"step": "step", "data": "data", "tokenizer": "tokenizer", "git": "commit", "command": "command"}
        how = [f"{words} <code>{said(facts[key])}</code>" for key, words in told.items() if facts.get(key) is not None]
        rows.append([f"<code>{escape(str(ancestor.folder))}</code>", "<br>".join(how) or "no record beside it"])
    found = table("Where the model comes from", ["Started from", "Made by"], rows) if rows else ""
    for key in ("ancestry", "parents"):
        if chain := run.export.get(key):
            found += f"<details><summary>Recorded {key}</summary>{_nested(chain)}</details>"
    return found


def _nested(value: Any) -> str:
    """Any JSON as nested lists."""
    if isinstance(value, Mapping):
        return (
            "<ul>" + "".join(f"<li>{escape(str(k))}: {_nested(v)}</li>" for k, v in list(value.items())[:200]) + "</ul>"
        )
    if isinstance(value, list):
        return "<ol>" + "".join(f"<li>{_nested(v)}</li>" for v in value[:200]) + "</ol>"
    return f"<code>{text(value) if isinstance(value, str) else said(value)}</code>"


def made(run: Recording) -> str:
    """What the run was made from and with."""
    facts, rows = run.facts, []
    for key, label in (
        ("data", "data's fingerprint"), ("tokenizer", "tokenizer's fingerprint"), ("model", "base model's fingerprint"),
        ("git", "commit"), ("command", "command"), ("ranks", "ranks"), ("device", "device"), ("identity", "identity"),
    ):  # fmt: skip
        if facts.get(key) is not None:
            rows.append([label, f"<code>{said(facts[key])}</code>"])
    for name, value in (facts.get("floors") or {}).items():
        rows.append([f"best possible {escape(str(name))}", said(value)])
    versions = facts.get("versions")
    if isinstance(versions, Mapping):
        rows.append(["versions", escape(", ".join(f"{k} {v}" for k, v in versions.items()))])
    return table("Made from and with", ["What", "Value"], rows) if rows else ""


def statistics(run: Recording) -> str:
    """What preparing the data found."""
    lines = run.facts.get("statistics")
    if not isinstance(lines, list) or not lines:
        return ""
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>"


def time_split(run: Recording) -> str:
    """Where the time went: a bar and its table."""
    seconds = {n: s for n, s in sorted(run.seconds.items(), key=lambda item: -item[1]) if s > 0}
    whole = sum(seconds.values())
    if not whole:
        return ""
    shares = [s / whole for s in seconds.values()]
    bar = "".join(f'<span class="f{n % 6}" style="flex-grow:{share:.4f}"></span>' for n, share in enumerate(shares))
    names = [
        f'<span class="swatch f{n % 6}" aria-hidden="true"></span>{escape(name.replace("_", " and "))}'
        for n, name in enumerate(seconds)
    ]
    rows = [[name, f"{s:,.1f}", f"{s / whole:.1%}"] for name, s in zip(names, seconds.values(), strict=True)]
    first, most = next(iter(seconds.items()))
    reading = f"{most / whole:.0%} of the time is {first.replace('_', ' and ')}."
    return f'<p class="reading">{escape(reading)}</p><div class="split" aria-hidden="true">{bar}</div>' + table(
        "Time of the first rank", ["Work", "Seconds", "Share"], rows, numbers=(1, 2)
    )


def side_by_side(rows: Iterable[tuple[str, Mapping[str, Any]]], stages: Sequence[str], caption: str) -> str:
    """The same prompt answered by several models; ``rows``: a prompt and the answers by stage."""
    cells = [
        [text(prompt) or "<em>from nothing</em>", *(_answer(answers.get(stage)) for stage in stages)]
        for prompt, answers in rows
    ]
    return table(caption, ["Prompt", *stages], cells, kind="texts") if cells else ""


def _answer(value: Any) -> str:
    if value is None:
        return "–"
    return _completion(value) if isinstance(value, Mapping) else text(value)


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
