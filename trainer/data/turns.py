"""How a chat template begins and ends the assistant's turns, learnt from short conversations that it renders."""

from __future__ import annotations

import re
from collections.abc import Callable

from trainer.data.answer_spans import STANDIN, Passage, stand_in
from trainer.data.control_tokens import ControlTokens, pattern
from trainer.data.shared_beginnings import common_length

Probe = Callable[..., str | None]
ASK, ANSWER, AGAIN, CALL, RESULT, THOUGHT = map(stand_in, range(6))
USER, ASSISTANT = {"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}
CALLING = {"id": "abcdefgh1", "type": "function", "function": {"name": "get", "arguments": {"key": CALL}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALLING]}
TOOL = {"role": "tool", "name": "get", "tool_call_id": "abcdefgh1", "content": RESULT}
TOOLS = [{"type": "function", "function": {"name": "get", "description": "Get it.", "parameters": {
    "type": "object", "properties": {"key": {"type": "string", "description": "Which."}}, "required": ["key"]}}}]  # fmt: skip
EMPTY_THINKING = re.compile(r"\s*(?:<(\w+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*")


class Turns:
    """Where a turn begins and ends around the texts of its message.

    ``probe``: renders messages (``prompt``, ``tools``); None where the template refuses them.
    ``stops``: the tokens that end a turn which nothing follows; where there is none, those that end earlier turns.
    ``missing_prompt``: the header that the template writes before an answer, but not where one is to be generated.
    ``unwritten``: the kinds of pieces that the template never writes, of ``reasoning`` and ``thinking``.
    """

    def __init__(self, probe: Probe, controls: ControlTokens, eos: str) -> None:
        self._controls, self._eos = controls, eos
        self.missing_prompt = ""
        self._openings = self._found_openings(probe)
        self._ends, self.stops = self._found_ends(probe)
        self._end = pattern(self._ends or self._found_closing(probe))
        thinking = {**ASSISTANT, "reasoning_content": THOUGHT, "thinking": THOUGHT}
        thinking_inside = {**ASSISTANT, "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}
        kinds = {"reasoning": thinking, "thinking": thinking_inside}
        self.unwritten = frozenset(kind for kind, m in kinds.items() if THOUGHT not in (probe([USER, m]) or ""))

    def span(self, at: Passage, *, calls: bool, empty_thinking: bool) -> tuple[int, int]:
        """What of a rendering the model writes in a turn, its end token included.

        ``calls``: whether the message has tool calls. ``empty_thinking``: with the empty thinking that a template writes.
        """
        begin = self.begin(at.before)
        if not empty_thinking and at.pieces[0].kind not in ("reasoning", "thinking"):
            begin = max([begin, *(m.end() for m in EMPTY_THINKING.finditer(at.before))])
        return at.start - len(at.before) + begin, at.end + self._length_of_end(at.after, calls)

    def begin(self, before: str) -> int:
        """Where in the template's text before an answer the header ends that it is generated from."""
        places = [(before.rfind(written), len(written)) for opening in self._openings for written in opening]
        at, length = max(places, default=(-1, 0))
        return len(before) if at < 0 else at + length

    def begin_of_marked(self, text: str) -> int:
        """Where in a text that the template marks the header ends that the turn is generated from."""
        return max((len(w) for opening in self._openings for w in opening if text.startswith(w)), default=0)

    def end_behind(self, text: str, at: int) -> int:
        """The end of the token that ends turns, if it is the next thing in ``text`` behind ``at``; else ``at``."""
        match = self._end.search(text, at)
        return match.end() if match and not text[at : match.start()].strip() else at

    def ends_with_token(self, text: str, end: int) -> bool:
        """Whether what ends at ``end`` ends with a control token."""
        return any(text.endswith(name, 0, end) for name in self._controls.names)

    def _length_of_end(self, after: str, calls: bool) -> int:
        if match := self._end.search(after):
            return match.end()
        if not calls:
            return 0
        following = self._controls.turns.search(after)
        return len(after[: following.start() if following else None].rstrip())

    def _found_openings(self, probe: Probe) -> list[tuple[str, ...]]:
        """What is written before an answer that is to be generated, and the shorter headers that others have."""
        plain, prompt = probe([USER]) or "", probe([USER], prompt=True) or ""
        headers = [h for m in ([USER, ASSISTANT], [USER, ASSISTANT, {**USER, "content": AGAIN}, ASSISTANT])
                   for h in _before(probe(m), ANSWER)]  # fmt: skip
        opening = prompt[common_length(plain, prompt) :].lstrip()
        size = min((next((n for n in range(len(opening), 0, -1) if opening[:n] in h), 0) for h in headers), default=0)
        header = opening[:size]
        bare = next((header[: m.start()] for m in pattern(self._controls.pairs).finditer(header)), header)
        self._openers = frozenset(self._controls.turns.findall(bare)[:1])
        openings: list[tuple[str, ...]] = [(bare, header, opening)] if re.search(r"\w", bare) else []
        if not openings and headers:
            tail = prompt.rpartition(ASK)[2]
            if headers[0].startswith(tail):
                self.missing_prompt = headers[0][len(tail) :] if headers[0][len(tail) :].strip() else ""
                openings = [(h,) for h in (self.missing_prompt or tail,) if h.strip()]
                self._openers = frozenset(self._controls.turns.findall(plain.partition(ASK)[0]))
        result = (probe([USER, CALLED, TOOL], prompt=True, tools=TOOLS) or "").rpartition(RESULT)[2]
        return [*openings, *([(result,)] if result.strip() else [])]

    def _found_ends(self, probe: Probe) -> tuple[set[str], list[str]]:
        last, earlier = (self._run(after) for after in self._afters(probe))
        common = [a for a, b in zip(last, earlier, strict=False) if a == b] if last[:1] == earlier[:1] else []
        if common or not (last and earlier):
            run = common or last or earlier
            ends = [self._eos if self._eos in run else run[-1 if common else 0]] if run else []
            stops = list(ends)
        else:
            ends, stops = [last[0], earlier[0]], [last[0]]
        known = pattern(set(ends))
        called = _after(probe([USER, CALLED], tools=TOOLS), CALL)
        followed = _after(probe([USER, CALLED, TOOL, ASSISTANT], tools=TOOLS), CALL)
        tokens = self._controls.turns.findall(called)[-1:]
        tail = called if tokens else followed[common_length(called, followed) :]
        tokens = tokens or self._controls.turns.findall(tail)[:1]
        if tokens and not known.search(tail):
            ends, stops = ends + tokens, stops + tokens
        return set(ends), stops

    def _found_closing(self, probe: Probe) -> set[str]:
        """What a template without a token that ends turns writes behind each answer."""
        last, earlier = self._afters(probe)
        closing = last[: common_length(last, earlier)]
        return {closing.strip() or closing} - {""}

    def _afters(self, probe: Probe) -> tuple[str, str]:
        again = {**USER, "content": AGAIN}
        return _after(probe([USER, ASSISTANT]), ANSWER), _after(probe([USER, ASSISTANT, again, ASSISTANT]), ANSWER)

    def _run(self, after: str) -> list[str]:
        """The tokens that follow an answer directly, up to the next header of the assistant's."""
        tokens, at = list[str](), 0
        for match in self._controls.turns.finditer(after):
            if after[at : match.start()].strip() or match[0] in self._openers:
                break
            tokens.append(match[0])
            at = match.end()
        return tokens


def _before(text: str | None, standing: str) -> list[str]:
    """The template's own text before each occurrence of what stands for a text."""
    parts = STANDIN.split(text or "")
    return [parts[n - 1] for n in range(1, len(parts), 2) if parts[n] == standing]


def _after(text: str | None, standing: str) -> str:
    parts = STANDIN.split(text or "")
    return next((parts[n + 1] for n in range(1, len(parts), 2) if parts[n] == standing), "")
