"""Chat templates: a conversation becomes ids once, and it is known which of them the assistant wrote.

Jinja in a sandbox, with the same settings and functions as `transformers` has, so that a template means the same in both.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trainer.config import InputError
from trainer.data.rows import Encoded
from trainer.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
OPEN, CLOSE, QUOTE, UNQUOTE = "\U000f0000", "\U000f0001", "\U000f0002", "\U000f0003"
"""Private characters that mark what the assistant wrote, and quoted names of special tokens, while a text is rendered."""

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ (message.content or '') + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{ (message.content or '') | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{- message.content | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{{- message.role | capitalize + ':' }}
{%- if message.role == 'assistant' %}{% generation %}{{ ' ' + (message.content or '') + eos_token }}{% endgeneration %}
{%- else %}{{- ' ' + message.content }}{%- endif %}
{{- '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{% endif %}"""
RAW = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{{ (message.content or '') + eos_token }}{% endgeneration %}
{%- else %}{{- message.content }}{%- endif %}
{%- endfor %}"""
BUILT_IN = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN, "raw": RAW}
"""Templates by name. ``plain`` writes roles as words and needs no special token; ``raw`` is the contents end to end."""
NEEDED = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Special tokens that a tokenizer must have for a template."""


class TemplateError(InputError):
    """A conversation that a template cannot render, or whose assistant's part cannot be told from the rest."""


class Generation(Extension):
    """``{% generation %}`` ... ``{% endgeneration %}``: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class Template:
    """A chat template together with the tokenizer whose special tokens it writes."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        names = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template is invalid Jinja ({error})") from None

    def render(self, messages: Sequence[Message], tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation as text; ``prompt``: with the beginning of the assistant's next turn.

        Raises:
            TemplateError: with the template's own words.
        """
        return _unmarked(self._render(messages, tools, prompt=prompt))

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Ids to generate the assistant's next turn from."""
        return self._ids(self._render([self._quoted(m) for m in messages], tools, prompt=True))[0]

    def encode(self, messages: Sequence[Message], tools: Any = None, *, turns: Sequence[int] | None = None) -> Encoded:
        """Ids of a whole conversation, and which of them the assistant wrote in ``turns`` (message numbers; None = all).

        The end-of-turn token belongs to the turn. EOS is added where the last turn ends the text without a special token.

        Raises:
            TemplateError: if the assistant's part cannot be told from the rest.
        """
        quoted = [self._quoted(m) for m in messages]
        written = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        wanted = written if turns is None else [n for n in written if n in turns]
        marked = self._render(quoted, tools)
        text = marked.replace(OPEN, "").replace(CLOSE, "")
        if marks := _marks(marked):
            if len(marks) != len(written):
                raise TemplateError(f"the template marks {len(marks)} of {len(written)} assistant turns")
            spans = [marks[written.index(n)] for n in wanted]
        else:
            spans = [self._by_prefix(text, quoted, n, tools) for n in wanted]
        spans = [self._with_end(text, *span) for span in spans]
        ids, offsets = self._ids(text)
        trained = [_inside(spans, first, last) for first, last in offsets]
        if wanted and wanted[-1] == written[-1] == len(messages) - 1 and not self._ends(text, spans[-1]):
            ids, trained = [*ids, self.tokenizer.eos], [*trained, True]
        return Encoded(ids, trained)

    @functools.cached_property
    def end(self) -> int:
        """The id that ends an assistant's turn: what generation stops at."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids, trained, _ = self.encode(probe)
        assert trained is not None
        return next(i for i, t in zip(reversed(ids), reversed(trained), strict=True) if t)

    def _render(self, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        names = {f"{role}_token": name or "" for role, name in self.tokenizer.role_names.items()}
        try:
            return self._compiled.render(messages=messages, tools=tools, add_generation_prompt=prompt, **names)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise TemplateError(f"the chat template refuses it ({error})") from None

    def _by_prefix(self, text: str, messages: Sequence[Message], turn: int, tools: Any) -> tuple[int, int]:
        """Where a turn stands in ``text``, from the renderings before and after it."""
        before = self._render(messages[:turn], tools, prompt=True)
        after = self._render(messages[: turn + 1], tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise TemplateError(
                f"rendering the messages before number {turn + 1} is no prefix of rendering it too, so what the assistant "
                "wrote cannot be told; use a template with {% generation %} marks, or train_on=last_assistant"
            )
        return len(before), len(after)

    def _with_end(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The span with its end-of-turn token, and without the template's white space behind that."""
        inside = text[start:end]
        bare = inside.rstrip()
        if bare != inside and any(bare.endswith(name) for name in self.tokenizer.specials):
            return start, start + len(bare)
        if not any(inside.endswith(name) for name in self.tokenizer.specials):
            following = self._special.match(text, end)
            if following:
                return start, following.end()
        return start, end

    def _ends(self, text: str, span: tuple[int, int]) -> bool:
        return any(text[: span[1]].endswith(name) for name in self.tokenizer.specials) or bool(text[span[1] :].strip())

    def _quoted(self, message: Message) -> Message:
        """Names of special tokens in a content are text that somebody wrote, not control tokens."""
        content = message.get("content")
        if not isinstance(content, str):
            return message
        if any(mark in content for mark in (OPEN, CLOSE, QUOTE, UNQUOTE)):
            raise TemplateError("the content holds a character of private plane 15 that is used to mark turns")
        return {**message, "content": self._special.sub(lambda m: f"{QUOTE}{m[0]}{UNQUOTE}", content)}

    def _ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and each one's first and last character in ``text`` (which may hold quotes)."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        text = text.replace(OPEN, "").replace(CLOSE, "")
        for number, part in enumerate(re.split(f"{QUOTE}(.*?){UNQUOTE}", text)):
            at += number % 2
            part_ids, places = self.tokenizer.encode_with_offsets(part, specials=number % 2 == 0)
            ids += part_ids
            offsets += [(at + first, at + last) for first, last in places]
            at += len(part) + number % 2
        return ids, offsets


def open_template(name: str | None, tokenizer: Tokenizer) -> Template:
    """The built-in template of that name, or the tokenizer's own.

    Raises:
        TemplateError: if there is none, or the tokenizer lacks the special tokens that it writes.
    """
    if name is None and tokenizer.chat_template is None:
        raise TemplateError(f"the tokenizer has no chat template; choose data.template={' or '.join(BUILT_IN)}")
    if name is None:
        return Template(str(tokenizer.chat_template), tokenizer)
    lacking = [token for token in NEEDED.get(name, ()) if token not in tokenizer.specials]
    if lacking:
        add = ",".join(f"'{token}'" for token in lacking)
        raise TemplateError(
            f'data.template={name} writes {", ".join(lacking)}, which the tokenizer lacks; use "tokenizer.add=[{add}]"'
        )
    return Template(BUILT_IN[name], tokenizer)


def _marks(text: str) -> list[tuple[int, int]]:
    """Spans between marks, counted without the marks."""
    spans, start = [], 0
    for removed, match in enumerate(re.finditer(f"{OPEN}|{CLOSE}", text)):
        place = match.start() - removed
        if match[0] == OPEN:
            start = place
        else:
            spans.append((start, place))
    return spans


def _inside(spans: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    return any(start <= first and last <= end and first < end for start, end in spans)


def _unmarked(text: str) -> str:
    return re.sub(f"[{OPEN}{CLOSE}{QUOTE}{UNQUOTE}]", "", text)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
