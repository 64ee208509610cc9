"""Settings of a chat template on the command line."""

import pytest

from tests.small_folder import write_folder
from trainer.cli import chat, generate
from trainer.data.templates import TemplateError

TEMPLATE = "{{ messages[0].content if level == 2 and not think | default(true) else raise_exception('it thinks') }}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "own"
    write_folder(path, template=TEMPLATE)
    return str(path)


def settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--template-settings", value)]


def test_settings_reach_the_template_with_their_kinds(folder, capsys):
    asked = [folder, "--prompt", "Who?", "--tokens", "1"]
    assert generate.main([*asked, *settings("think=false", "level=2")]) == 0
    assert '"prompt": "Who?"' in capsys.readouterr().out
    with pytest.raises(TemplateError, match="it thinks"):
        generate.main([*asked, *settings("think=false", "level='2'")])


def test_a_setting_that_the_template_does_not_read_is_refused(folder):
    with pytest.raises(TemplateError, match="thinks is no setting of the chat template, which reads level, think"):
        chat.main([folder, *settings("thinks=false")])


def test_a_setting_without_a_value_is_refused(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        chat.main([folder, *settings("think")])
    assert "think is no NAME=VALUE; write enable_thinking=false" in capsys.readouterr().err
