"""What a template marks as the assistant's by ``{% generation %}``, and which tokens a span of text holds."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from trainer.data.answer_spans import Passage
from trainer.data.jinja_environment import CLOSE, OPEN
from trainer.data.turns import Turns

Span = tuple[int, int]


def marks_in(text: str) -> list[Span]:
    """Spans between marks, counted without the marks."""
    spans, start = list[Span](), 0
    for removed, match in enumerate(re.finditer(f"{OPEN}|{CLOSE}", text)):
        at = match.start() - removed
        if match[0] == OPEN:
            start = at
        else:
            spans.append((start, at))
    return spans


def marked_spans(
    text: str, marks: Sequence[Span], by_message: Mapping[int, Sequence[Passage]], wanted: Sequence[int], turns: Turns
) -> dict[int, list[Span]]:
    """What is marked of each wanted turn, without the header that it is generated from and with the token that ends it."""
    spans: dict[int, list[Span]] = {}
    order = sorted((at.start, at.end, n) for n, several in by_message.items() for at in several)
    for first, last in marks:
        # A mark without any text of a message belongs to the turn before it: its end.
        owners = [n for start, end, n in order if start < last and first < end]
        earlier = [n for _, end, n in order if end <= first]
        owner = (owners[:1] or earlier[-1:] or [-1])[0]
        if owner in wanted:
            begin = first + turns.begin_of_marked(text[first:last])
            spans.setdefault(owner, []).append((begin, last))
    for turn in spans.values():
        first, last = turn[-1]
        bare = first + len(text[first:last].rstrip())
        turn[-1] = first, bare if turns.ends_with_token(text, bare) else turns.end_behind(text, last)
    return spans


def inside(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Whether each token is in one of the spans (in order): it begins there, or reaches into its beginning."""
    trained, at = list[bool](), 0
    for first, last in offsets:
        while at < len(spans) and spans[at][1] <= first:
            at += 1
        trained.append(at < len(spans) and (spans[at][0] <= first or spans[at][0] < last) and first < spans[at][1])
    return trained


def reached_into(spans: Sequence[Span], offsets: Sequence[Span]) -> list[int]:
    """Beginnings of spans (in order) that a token reaches over."""
    starts = [start for start, _ in spans]
    over = {
        starts[n] for first, last in offsets if (n := bisect_right(starts, first)) < len(starts) and starts[n] < last
    }
    return sorted(over)
