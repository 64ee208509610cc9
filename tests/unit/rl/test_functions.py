"""Rewards as functions: in a module or a file, in our way of calling or TRL's."""

import pytest

from trainer.config import InputError
from trainer.data.corpus import Prompt
from trainer.generation.completion import Response
from trainer.rl.functions import load_reward
from trainer.rl.rewards import FunctionReward

FILE = """
from dataclasses import dataclass

@dataclass
class Length:
    text: str

def brevity(prompts, completions, rows):
    return [-float(len(Length(text).text)) for text in completions]

def close_to(completions, target, weight=1.0, **kwargs):
    return [-weight * abs(len(text) - n) for text, n in zip(completions, target)]

def politeness(prompts, completions, **kwargs):
    return [float(c[0]["content"].startswith("Please") and p[-1]["role"] == "user") for p, c in zip(prompts, completions)]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(FILE)
    return path


def scores(function: str, rows, completions, **arguments):
    reward = FunctionReward(function=function, arguments=arguments)
    assert list(reward.problems()) == []
    responses = [
        Response(Prompt([], str(row["prompt"]), row=row), [1], text, n)
        for n, (row, text) in enumerate(zip(rows, completions, strict=True))
    ]
    return reward.open(None, None)(responses)


def test_a_reward_is_taken_out_of_a_file(file):
    assert scores(f"{file}:brevity", [{"prompt": "a"}, {"prompt": "b"}], ["four", "sixsix"]) == [-4, -6]


def test_a_reward_of_trl_gets_the_columns_of_the_rows(file):
    rows = [{"prompt": "a", "target": 3}, {"prompt": "b", "target": 10}]
    assert scores(f"{file}:close_to", rows, ["four", "sixsix"]) == [-1, -4]
    assert scores(f"{file}:close_to", rows, ["four", "sixsix"], weight=2.0) == [-2, -8]


def test_a_reward_of_trl_gets_messages_where_the_prompts_are_messages(file):
    rows = [{"prompt": [{"role": "user", "content": "Go."}]}] * 2
    assert scores(f"{file}:politeness", rows, ["Please go.", "Go!"]) == [1, 0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("{file}:brevty", "has none called brevty, it has brevity, close_to, politeness"),
        ("{folder}/gone.py:brevity", "gone.py does not exist"),
        ("{folder}/broken.py:f", "cannot be imported (SyntaxError"),
        ("nowhere.f", "A file works too: my_rewards.py:brevity"),
        ("math.pi", "function=math.pi is not a function"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(name, sentence, file, tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(InputError) as error:
        load_reward(name.format(file=file, folder=tmp_path))
    assert sentence in str(error.value)
