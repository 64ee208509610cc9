"""Chat templates from strangers: a limit of work and memory, which no conversation comes near."""

import time

import pytest
from jinja2 import UndefinedError

from trainer.data.jinja_limits import WORK, LimitedEnvironment, WorkLimitError, rendered


def render(source: str, **variables) -> str:
    return rendered(LimitedEnvironment().from_string(source), **variables)


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "{% for a in range(9999) %}{{ 'x' * 1000000 }}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xx') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ '{x:1000000000d}'.format_map({'x': 1}) }}",
    "{{ ['%1000000000d'] | map('format', 1) | join }}",
    "{% set f = '{:1000000000d}'.format %}{{ f(1) }}",
    "{{ (1).to_bytes(10000000000, 'big') }}",
    "{{ 'x'.ljust(10000000000) }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x\\nx' | indent(10000000000) }}",
    "{{ [1] | batch(10000000000, 0) | list }}",
    "{{ lipsum(n=99999999) }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_that_would_take_all_time_or_memory_is_stopped(source):
    started = time.perf_counter()
    # Jinja itself refuses what is not there, and Python a macro without an end.
    with pytest.raises((WorkLimitError, UndefinedError, RecursionError)):
        render(source)
    assert time.perf_counter() - started < 5


LOOPS = """\
{% for m in messages %}{% if loop.first %}<{% endif %}{{ m.role ~ ': ' + m.content | trim }}{{ loop.index }}/{{ loop.length }}
{%- if not loop.last %},{{ loop.nextitem.role }}{% endif %}{% endfor %}{{ '%03d' % 7 }}{{ 'ab' * 2 }}"""


def test_a_conversation_is_rendered_as_without_limits():
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    assert render(LOOPS, messages=messages) == "<user: a1/2,assistantassistant: b2/2007abab"


TEXT = "100% of 1234567 {'city': {'id': 7000000}} %*d"
NUMBERS = """\
{% macro shown(n) %}{{ n | tojson }}{% endmacro %}{% set ns = namespace(n=n) %}{{ shown(n) }} {{ ns.n | string }}
{{- ' ' ~ {}.get('n', n) }} {{ text | trim }} {{ text.split('!')[0].strip() }}{{ text | replace('x', 'y') | default(7) }}"""


def test_numbers_and_texts_of_a_conversation_are_no_widths_and_formats():
    assert render(NUMBERS, n=1790000000, text=TEXT) == f"1790000000 1790000000 1790000000 {TEXT} {TEXT}{TEXT}"


def test_a_long_conversation_stays_far_from_the_limit():
    from trainer.data import jinja_limits

    messages = [{"role": "user", "content": "word " * 400}] * 1000  # two million characters
    render(LOOPS, messages=messages)
    assert jinja_limits._budget.left > 0.6 * WORK
