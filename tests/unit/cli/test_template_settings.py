"""Settings of a chat template on the command line."""

import json

import pytest

from tests.chats import write_jsonl
from tests.small_folder import write_folder
from trainer.cli import chat, compare, generate, label, score
from trainer.data.templates import TemplateError

TEMPLATE = (
    "{% set right = level == 2 and not think | default(true) and strftime_now('%Y-%m-%d') == day %}"
    "{{ messages | map(attribute='content') | join if right else raise_exception('it thinks') }}"
)
SCORED = (
    "{{ messages | map(attribute='content') | join }}"
    "{{ '' if strftime_now('%Y') == '2024' else raise_exception('another day') }}"
)
RIGHT = ("think=false", "level=2", "day=2024-07-26")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Models with templates of their own and without one, a reward model, and rows."""
    folder = tmp_path_factory.mktemp("desk")
    write_folder(folder / "own", template=TEMPLATE)
    write_folder(folder / "bare")
    write_folder(folder / "judge", scores=True, template=SCORED)
    write_folder(folder / "strict", scores=True, template=TEMPLATE)
    write_jsonl(folder / "rows.jsonl", [{"prompt": "Who?", "completion": "Ada."}])
    return folder


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--template-settings", value)]


VERBS = {
    "generate": lambda desk, out: (generate, [f"{desk}/own", f"{desk}/rows.jsonl", "--tokens", "1"]),
    "compare": lambda desk, out: (compare, [out, f"{desk}/rows.jsonl", f"a={desk}/own", "--tokens", "1"]),
    "label": lambda desk, out: (
        label, [f"{desk}/own", f"{desk}/rows.jsonl", out, "--reward", f"{desk}/judge", "--tokens", "2"]
    ),
    "score": lambda desk, out: (score, [f"{desk}/strict", f"{desk}/rows.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_settings_reach_the_template_of_any_verb_with_their_kinds(name, desk, tmp_path):
    def run(*values: str, date: str | None = None) -> int:
        verb, words = VERBS[name](desk, str(tmp_path / f"out-{date}"))
        return verb.main([*words, *settings(*values), *(["--template-date", date] if date else [])])

    for wrong in ("think=true", "level='2'", "day=2025-01-01"):
        with pytest.raises(TemplateError, match="it thinks"):
            run(*RIGHT, wrong)
    with pytest.raises(TemplateError, match="x is no setting of the chat template, which reads day, level, think"):
        run(*RIGHT, "x=1")
    assert run(*RIGHT) == run(*RIGHT, "day=2025-01-01", date="2025-01-01") == 0


def test_a_comparison_names_the_model_that_a_setting_does_not_fit_and_mixes_templates(desk, tmp_path):
    words = [str(tmp_path / "out"), f"{desk}/rows.jsonl", f"own={desk}/own", f"bare={desk}/bare", "--tokens", "1"]
    with pytest.raises(TemplateError, match="bare: the tokenizer has no chat template"):
        compare.main([*words, *settings(*RIGHT)])
    (tmp_path / "other.jinja").write_text(TEMPLATE)
    assert compare.main([*words, *settings(*RIGHT), "--template", str(tmp_path / "other.jinja")]) == 0
    [row] = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert row["answers"].keys() == {"own", "bare"}


def test_a_setting_that_the_template_does_not_read_is_refused(desk):
    with pytest.raises(TemplateError, match="thinks is no setting of the chat template, which reads day, level, think"):
        chat.main([f"{desk}/own", *settings("thinks=false")])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--template-settings", "think"], "think is no NAME=VALUE; write enable_thinking=false"),
        (["--template-date", "May"], "May is no date; write it as YYYY-MM-DD"),
    ],
)
def test_a_setting_that_is_none_is_refused(words, sentence, desk, capsys):
    with pytest.raises(SystemExit, match="2"):
        chat.main([f"{desk}/own", *words])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("name", "why"), [("none.jinja", "does not exist"), ("chatlm", "is not known")])
def test_a_template_that_is_not_there_is_refused(name, why, desk):
    with pytest.raises(TemplateError, match=f"the chat template {name} {why}; use chatml"):
        chat.main([f"{desk}/own", "--template", name])


@pytest.mark.parametrize(
    ("models", "sentence"),
    [(["a=x", "a=y"], "two models have one name (a, a)"), (["runs/sft"], "runs/sft is no NAME=FOLDER")],
)
def test_models_to_compare_have_names_of_their_own(models, sentence, desk, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "out"), f"{desk}/rows.jsonl", *models])
    assert sentence in capsys.readouterr().err
