"""Chat templates: a conversation becomes ids once, and it is known which of them the assistant wrote."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from trainer.config import InputError
from trainer.data.answer_spans import NONCHARACTERS, Message, Passage, place, places
from trainer.data.built_in_templates import BUILT_IN, NEEDED
from trainer.data.control_tokens import ControlTokens
from trainer.data.jinja_environment import CLOSE, FAILURES, OPEN, clock, compiled, variables, with_defaults
from trainer.data.jinja_limits import rendered
from trainer.data.lost_texts import leaves, lost_texts
from trainer.data.marks import Span, inside, marked_spans, marks_in, reached_into
from trainer.data.message_forms import Forms
from trainer.data.tokenizer import Tokenizer
from trainer.data.tokenizer_files import ROLES
from trainer.data.turns import Turns
from trainer.disk import read_text

SUFFIX = ".jinja"
TOOL_USE = "tool_use"
"""The name of a tokenizer's template for conversations with tools."""
RESERVED = ("messages", "tools", "add_generation_prompt", "strftime_now", *ROLES)
"""Variables of a template that are not settings."""
RULES = 2
"""Version of the rules by which a rendering becomes ids and a mask: what was prepared by others is not used."""


class TemplateError(InputError):
    """A conversation that a template cannot render, or whose assistant's part cannot be told from the rest."""


@dataclass(frozen=True)
class EncodedChat:
    """A conversation's ids.

    ``trained``: whether each is learnt.
    ``lost``: what was given and is not written, a phrase each; of the assistant's turns only those that are to be learnt.
    """

    ids: list[int]
    trained: list[bool]
    lost: list[str] = field(default_factory=list)


class Template:
    """A chat template together with the tokenizer whose control tokens it writes.

    ``source``: Jinja.
    ``with_tools``: another template for conversations with tools; None = the same.
    ``settings``: other defaults of the template's own variables, such as ``enable_thinking``.
    ``now``: what ``strftime_now`` says; None = the moment of rendering.
    ``train_empty_thinking``: learn the empty ``<think></think>`` that a template writes before an answer without reasoning.
    ``control_tokens_in_answers``: the names of control tokens in what the assistant wrote are control tokens.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        *,
        with_tools: str | None = None,
        settings: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        train_empty_thinking: bool = False,
        control_tokens_in_answers: bool = False,
    ) -> None:
        self.source = with_defaults(source, settings or {})
        self.with_tools = None if with_tools is None else with_defaults(with_tools, settings or {})
        self.tokenizer = tokenizer
        self.train_empty_thinking, self.control_tokens_in_answers = train_empty_thinking, control_tokens_in_answers
        self._controls = ControlTokens(tokenizer, self.source + (self.with_tools or ""))
        names = {f"{role}_token": name or "" for role, name in tokenizer.role_names.items()}
        self._same: dict[Any, bool] = {}
        self._now = now
        self._globals = {**names, "strftime_now": clock(now)}
        try:
            compiled(self.source)
            compiled(self.with_tools or "")
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template is invalid Jinja ({error})") from None
        read = sorted((variables(source) | variables(with_tools or "")).difference(RESERVED))
        if unread := [name for name in settings or {} if name not in read]:
            offer = f"which reads {', '.join(read)}; name one of these" if read else "which has none; leave it out"
            raise TemplateError(f"{unread[0]} is no setting of the chat template, {offer}")

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation as text; ``prompt``: with the beginning of the assistant's next turn.

        Raises:
            TemplateError: with the template's own words.
        """
        return NONCHARACTERS.sub("", self._render(*self._as_text(messages, tools), prompt=prompt))

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Ids to generate the assistant's next turn from."""
        return self.encode_prompt(messages, tools).ids

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> EncodedChat:
        """`prompt`, and what is lost in it."""
        given, given_tools = self._as_text(messages, tools)
        text = self._unmarked(given, given_tools, prompt=True)
        ids = self._controls.encode(text + self._turns.missing_prompt)[0]
        return EncodedChat(ids, [False] * len(ids), lost_texts(given, given_tools, text, {}))

    def encode(
        self, messages: Sequence[Message], tools: Any = None, *, turns: Sequence[int] | None = None, apart: bool = False
    ) -> EncodedChat:
        """Ids of a whole conversation, and which of them the assistant wrote in ``turns`` (message numbers; None = all).

        The end-of-turn token belongs to the turn. A token belongs to the turn if its first character does, or if it reaches
        into the turn's beginning; ``apart``: what is before such a turn is encoded alone, as the prompt of a generation is.
        EOS is added where the last turn ends the text without a token that ends turns.

        Raises:
            TemplateError: if the template does not write an answer, or its place cannot be told.
        """
        wanted = [n for n, m in enumerate(messages) if m["role"] == "assistant" and (turns is None or n in turns)]
        given, given_tools = self._as_text(messages, tools)
        return self._encoded(given, given_tools, wanted, *self._located(given, given_tools, wanted), apart=apart)

    def samples(
        self, messages: Sequence[Message], tools: Any = None, *, turns: Sequence[int] | None = None
    ) -> list[EncodedChat]:
        """What is learnt from a conversation: each of ``turns`` exactly as it would be generated.

        That is one sample, unless the template writes earlier turns otherwise than it did when they were the last (templates
        that drop old reasoning do): such a turn is a sample of its own, which ends with it.

        Raises:
            TemplateError: as `encode` does.
        """
        wanted = [n for n, m in enumerate(messages) if m["role"] == "assistant" and (turns is None or n in turns)]
        given, given_tools = self._as_text(messages, tools)
        samples, end = list[EncodedChat](), len(messages)
        while wanted:
            part = given[:end]
            text, spans = self._located(part, given_tools, wanted)
            same = [n for n in wanted if n == end - 1 or self._as_generated(part, given_tools, n, text, spans.get(n))]
            if same:
                samples.append(self._encoded(part, given_tools, same, text, spans, apart=True))
            wanted = [n for n in wanted if n not in same]
            end = wanted[-1] + 1 if wanted else 0
        return samples[::-1]

    @property
    def fingerprint(self) -> str:
        """Of everything that decides how conversations are rendered and what of them is learnt."""
        parts = [self.source, self.with_tools, self.train_empty_thinking, self.control_tokens_in_answers]
        return hashlib.sha256(repr([RULES, self._now, *parts]).encode()).hexdigest()

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end an assistant's turn: what generation stops at."""
        ids = [self._controls.encode(name)[0] for name in self._turns.stops]
        return tuple(dict.fromkeys([*(i[0] for i in ids if len(i) == 1), self.tokenizer.eos]))

    @functools.cached_property
    def _turns(self) -> Turns:
        return Turns(self._probe, self._controls, self.tokenizer.role_names["eos"] or "")

    @functools.cached_property
    def _forms(self) -> Forms:
        return Forms.taken_by(self._probe_as_given)

    def _probe(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str | None:
        return self._probe_as_given(self._forms.apply(messages), tools=tools, prompt=prompt)

    def _probe_as_given(self, messages: Sequence[Message], *, tools: Any = None, prompt: bool = False) -> str | None:
        """A short conversation's text; None if the template refuses it."""
        try:
            return self._unmarked(messages, tools, prompt=prompt)
        except TemplateError:
            return None

    def _render(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        source = self.with_tools if tools and self.with_tools else self.source
        try:
            text = rendered(
                compiled(source), messages=messages, tools=tools or None, add_generation_prompt=prompt, **self._globals
            )
        except FAILURES as error:
            raise TemplateError(f"the chat template refuses it ({error})") from None
        return self._controls.settled(text)

    def _unmarked(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        return self._render(messages, tools, prompt=prompt).replace(OPEN, "").replace(CLOSE, "")

    def _as_text(self, messages: Sequence[Message], tools: Any) -> tuple[list[Message], Any]:
        """Messages and tools in the forms that the template takes, in which names of control tokens are text."""
        if any(isinstance(leaf, str) and NONCHARACTERS.search(leaf) for leaf in leaves([messages, tools])):
            raise TemplateError("a text holds one of the noncharacters U+FDD0 to U+FDEF, which are for no text")
        quoted = [self._quoted(message) for message in self._forms.apply(messages)]
        return quoted, self._controls.as_text(tools)

    def _quoted(self, message: Message) -> Message:
        own = message["role"] == "assistant"
        return {
            key: value
            if key == "role" or (own and self.control_tokens_in_answers)
            else self._controls.as_text(value, tags=own and key != "tool_calls")
            for key, value in message.items()
        }

    def _encoded(
        self,
        messages: Sequence[Message],
        tools: Any,
        wanted: Sequence[int],
        text: str,
        located: Mapping[int, Sequence[Span]],
        *,
        apart: bool,
    ) -> EncodedChat:
        spans = {n: located.get(n, ()) for n in wanted}
        for n in wanted:
            if not spans[n] and str(messages[n].get("content") or "").strip():
                raise TemplateError(f"the template does not write message {n + 1}, which is the assistant's")
        ids, offsets = self._controls.encode(text)
        learnt = [span for n in wanted for span in spans[n]]
        if apart and (cuts := reached_into(learnt, offsets)):
            ids, offsets = self._encoded_apart(text, cuts, ids, offsets)
        trained = inside(learnt, offsets)
        end = spans[wanted[-1]][-1][1] if wanted and spans[wanted[-1]] else 0
        if wanted[-1:] == [len(messages) - 1] and not self._turns.ends_with_token(text, end) and not text[end:].strip():
            ids, trained = [*ids, self.tokenizer.eos], [*trained, True]
        return EncodedChat(ids, trained, lost_texts(messages, tools, text, spans, self._turns.unwritten))

    def _encoded_apart(
        self, text: str, cuts: Sequence[int], ids: list[int], offsets: list[Span]
    ) -> tuple[list[int], list[Span]]:
        """Ids of the parts of a text, unless they do not spell it (tokenizers that begin every text with a space)."""
        new_ids, new_offsets = list[int](), list[Span]()
        for first, last in itertools.pairwise([0, *cuts, len(text)]):
            part, places = self._controls.encode(text[first:last])
            new_ids += part
            new_offsets += [(first + a, first + b) for a, b in places]
        same = self.tokenizer.decode(new_ids, specials=True) == self.tokenizer.decode(ids, specials=True)
        return (new_ids, new_offsets) if same else (ids, offsets)

    def _located(
        self, messages: Sequence[Message], tools: Any, wanted: Sequence[int]
    ) -> tuple[str, dict[int, list[Span]]]:
        """The rendered text, and where the wanted turns stand in it."""
        marked = self._render(messages, tools)
        text = marked.replace(OPEN, "").replace(CLOSE, "")
        by_message = self._places(text, messages, tools, wanted)
        spans = {n: [self._span(at, messages[n]) for at in by_message[n]] for n in wanted if n in by_message}
        if marks := marks_in(marked):
            spans |= marked_spans(text, marks, by_message, wanted, self._turns)
        return text, spans

    def _as_generated(
        self, messages: Sequence[Message], tools: Any, turn: int, text: str, spans: Sequence[Span] | None
    ) -> bool:
        """Whether ``text`` is, up to a turn's end, what the template writes when that turn is the last.

        Asked once for each kind of turn among its kinds of neighbours, so the work is linear in the number of turns.
        """
        kinds = [_kind(message) for message in messages]
        key = (bool(tools), *kinds[turn - 1 : turn + 2], frozenset(kinds[:turn]), frozenset(kinds[turn + 1 :]))
        if spans is None:
            return False
        if key not in self._same:
            try:
                alone = self._unmarked(messages[: turn + 1], tools).rstrip()
            except TemplateError:
                alone = text
            size = min(spans[-1][1], len(alone))
            self._same[key] = text[:size] == alone[:size]
        return self._same[key]

    def _span(self, at: Passage, message: Message) -> Span:
        calls = bool(message.get("tool_calls"))
        return self._turns.span(at, calls=calls, empty_thinking=self.train_empty_thinking)

    def _places(
        self, text: str, messages: Sequence[Message], tools: Any, wanted: Sequence[int]
    ) -> dict[int, list[Passage]]:
        def render(others: Sequence[Message]) -> str:
            return self._unmarked(others, tools)

        by_message: dict[int, list[Passage]] | None = None
        with contextlib.suppress(TemplateError):
            by_message = places(text, messages, render)
        if by_message is None:
            by_message = {n: p for n in wanted if (p := place(text, messages, n, render))}
        return by_message


def open_template(name: str | None, tokenizer: Tokenizer, **options: Any) -> Template:
    """The template of a file ``NAME.jinja``, the built-in one of that name, or the tokenizer's own.

    ``options``: of the `Template`.

    Raises:
        TemplateError: if there is none, or none of that name, or the tokenizer lacks the special tokens that it writes.
    """
    if name is None:
        return _tokenizers_own(tokenizer, options)
    if problem := unknown_template(name):
        raise TemplateError(f"the chat template {problem}")
    if name.endswith(SUFFIX):
        return Template(read_text(Path(name)), tokenizer, **options)
    lacking = [token for token in NEEDED.get(name, ()) if token not in tokenizer.specials]
    if lacking:
        add = ",".join(f"'{token}'" for token in lacking)
        raise TemplateError(
            f'data.template={name} writes {", ".join(lacking)}, which the tokenizer lacks; use "tokenizer.add=[{add}]"'
        )
    source = BUILT_IN[name] if tokenizer.adds_bos else BUILT_IN[name].replace("{{- bos_token }}\n", "")
    return Template(source, tokenizer, **options)


def unknown_template(name: str) -> str | None:
    """Why there is no template of that name, with the names that there are; None if there is one."""
    file = name.endswith(SUFFIX)
    if Path(name).is_file() if file else name in BUILT_IN:
        return None
    remedy = f"use {', '.join(BUILT_IN)}, a file FILE{SUFFIX}, or leave it out for the tokenizer's own"
    return f"{name} {'does not exist' if file else 'is not known'}; {remedy}"


def _tokenizers_own(tokenizer: Tokenizer, options: Mapping[str, Any]) -> Template:
    named = tokenizer.named_templates
    default = tokenizer.chat_template or named.get(TOOL_USE)
    if default is None:
        several = f" named default (it has {', '.join(sorted(named))})" if named else ""
        raise TemplateError(
            f"the tokenizer has no chat template{several}; choose data.template={' or '.join(BUILT_IN)}, or FILE{SUFFIX}"
        )
    return Template(default, tokenizer, with_tools=named.get(TOOL_USE), **options)


def _kind(message: Message) -> tuple[Any, ...]:
    """What a template may look at in a message."""
    content = message.get("content") or ""
    reasoning = bool(message.get("reasoning_content")) or "</think>" in content
    return message["role"], bool(content), reasoning, bool(message.get("tool_calls"))
