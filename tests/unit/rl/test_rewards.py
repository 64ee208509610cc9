"""Rewards: what a function may give, what a judge may leave out, and sums in which nothing missing becomes a zero."""

import math
import re
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from tests.chats import byte_tokenizer
from tests.endpoint import serving
from tests.small_folder import SHAPE, write_folder
from trainer.config import InputError
from trainer.data.corpus import Prompt
from trainer.generation.completion import Response
from trainer.models.load import ModelLoader
from trainer.parallel.ddp import DDP
from trainer.rl.judge import JudgeError, JudgeReward
from trainer.rl.rewards import FunctionReward, ModelReward, RewardError, UnansweredRewardError, exact_match
from trainer.rl.scoring import RewardSum

ANSWERS = [
    Response(Prompt([1], f"question {n}", row={"ideal": [str(n)]}), [2, 3], str(n) if n != 1 else "no", n)
    for n in range(3)
]


def opened(function: str, **arguments):
    reward = FunctionReward(function=f"{__name__}.{function}", arguments=arguments)
    assert list(reward.problems()) == []
    return reward.open(None, None)  # type: ignore[arg-type]


def numbers(prompts, completions, rows, *, factor=1.0):
    return [factor * len(text) for text in completions]


def few(prompts, completions, rows):
    return [0.0]


def fails_on_one(prompts, completions, rows):
    if "question 1" in prompts:
        raise KeyError("wanted")
    return [0.0] * len(prompts)


def not_a_number(prompts, completions, rows):
    return [0.0, math.nan, 1.0]


def exits(prompts, completions, rows):
    sys.exit(0)


def huge(prompts, completions, rows):
    return [10**400] * len(prompts)


def matrix(prompts, completions, rows):
    return [np.zeros(2)] * len(prompts)


def asks_nobody(prompts, completions, rows):
    urllib.request.urlopen("http://127.0.0.1:1/")


def asks_a_busy_server(prompts, completions, rows):
    raise httpx.HTTPStatusError("busy", request=httpx.Request("GET", "http://x"), response=httpx.Response(503))


def wraps_a_timeout(prompts, completions, rows):
    try:
        raise TimeoutError
    except TimeoutError as error:
        raise RuntimeError("no verdict") from error


def reads_nothing(prompts, completions, rows):
    Path("nowhere").read_text()


def asks_for_what_is_not_there(prompts, completions, rows):
    raise httpx.HTTPStatusError("gone", request=httpx.Request("GET", "http://x"), response=httpx.Response(404))


def scalars(prompts, completions, rows):
    return [np.float32(0.5), torch.tensor(2), np.int64(3)]


def test_numbers_of_numpy_and_torch_are_scores():
    assert opened("scalars")(ANSWERS) == [0.5, 2.0, 3.0]


def test_a_function_is_called_with_its_arguments():
    assert opened("numbers")(ANSWERS) == [1.0, 2.0, 1.0]
    assert opened("numbers", factor=3.0)(ANSWERS) == [3.0, 6.0, 3.0]
    assert opened("numbers")([]) == []


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails_on_one", r"fails_on_one failed on row 1 \('question 1'\): KeyError: 'wanted'"),
        ("few", r"few gave 1 for 3 answers from row 0 \('question 0'\) on"),
        ("exits", r"exits failed on row 0 \('question 0'\): SystemExit: 0"),
        ("huge", r"huge gave 10{73}.* for row 0 \('question 0'\); give a finite number, or None"),
        ("matrix", r"matrix gave array\(\[0., 0.\]\) for row 0"),
        ("not_a_number", r"not_a_number gave nan for row 1 \('question 1'\); give a finite number, or None"),
    ],
)
def test_a_reward_that_fails_names_the_row(function, said):
    with pytest.raises(RewardError, match=said):
        opened(function)(ANSWERS)


@pytest.mark.parametrize("function", ["asks_nobody", "asks_a_busy_server", "wraps_a_timeout"])
def test_a_reward_whose_server_is_down_may_be_tried_again(function):
    wanted = rf"{function} got no answer from what it asks, for 3 answers from row 0 .* The same command goes on"
    with pytest.raises(UnansweredRewardError, match=wanted) as failed:
        opened(function)(ANSWERS)
    assert not isinstance(failed.value, InputError)


@pytest.mark.parametrize("function", ["reads_nothing", "asks_for_what_is_not_there"])
def test_a_reward_that_would_fail_again_is_a_mistake(function):
    with pytest.raises(RewardError, match=rf"{function} failed on row 0"):
        opened(function)(ANSWERS)


def test_a_function_that_cannot_be_called_is_refused():
    def said(function, **arguments):
        [problem] = FunctionReward(function=function, arguments=arguments).problems()
        return problem

    assert "nowhere.reward cannot be imported" in said("nowhere.reward")
    assert "is not a function" in said(f"{__name__}.ANSWERS")
    assert "does not take (prompts, completions, rows)" in said(f"{__name__}.numbers", wrong=1)


def test_an_exact_match_is_letter_for_letter():
    rows = [{"ideal": "4"}, {"ideal": ["5", "five"]}, {"ideal": "6"}, {}]
    found = exact_match([""] * 4, ["4 ", "five", "the answer is 6", "7"], rows)
    assert found == [1.0, 1.0, 0.0, None]
    assert exact_match([""], ["the answer is 6"], [{"right": 6}], pattern=r"is (\d+)", ideal="right") == [1.0]
    assert exact_match([""], ["it is #### 6"], [{"right": "2 * 3 = #### 6"}], pattern=r"#### (.+)", ideal="right") == [
        1.0
    ]


def test_an_exact_match_reads_right_answers_and_pattern_as_the_evaluation_does():
    # As GSM8K's rows come with data.columns={ideal: answer} and data.answer='#### (.+)'.
    prompts = [
        Prompt([1], "2 * 3?", ["6"], "#### (.+)", row={"answer": "2 * 3 = 6. #### 6"}),
        Prompt([1], "?", [], "#### (.+)"),
    ]
    responses = [
        Response(p, [2], text, n) for n, (p, text) in enumerate(zip(prompts, ["So #### 6", "#### 1"], strict=True))
    ]
    reward = FunctionReward(function="trainer.rl.rewards.exact_match")
    assert list(reward.problems()) == []
    assert reward.open(None, None)(responses) == [1.0, None]  # type: ignore[arg-type]
    assert [float(r.prompt.right(r.text)) for r in responses[:1]] == [1.0]


def test_a_sum_weighs_its_parts_and_is_missing_where_one_of_them_is():
    parts = {"a": lambda _: [1.0, None, 3.0], "b": lambda _: [10.0, 20.0, 30.0], "c": lambda _: [None, None, None]}
    found = RewardSum(parts, {"a": 2.0, "b": 0.5, "c": 0.0})(ANSWERS)
    assert found["score"] == [7.0, None, 21.0]
    assert found["b"] == [10.0, 20.0, 30.0]
    assert RewardSum({"a": parts["a"]}, {"a": 2.0})(ANSWERS) == {"score": [2.0, None, 6.0]}


def test_a_reward_models_own_template_writes_tools_and_the_day_of_training(tmp_path):
    template = (
        "{{ strftime_now('%d.%m.%Y') }}{% if tools %} {{ tools[0].function.name }} {% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    folder, policy = write_folder(tmp_path / "judge", scores=True, template=template), byte_tokenizer()
    scorer = ModelReward(path=str(folder)).open(ModelLoader(SHAPE, DDP(), 0, policy.vocab_size), policy)
    for row, tool in (({"tools": [{"name": "paint"}]}, " paint "), ({}, "")):
        prompt = Prompt([1], "Who?", messages=[{"role": "user", "content": "Who?"}], row=row)
        assert policy.decode(scorer._ids(Response(prompt, [2], "Ada.", 0))) == f"26.07.2024{tool}Who?Ada."


def judge(url: str, **settings) -> JudgeReward:
    return JudgeReward(url=url, model="judge", backoff=0.001, **settings)


def graded(reward: JudgeReward, answers=ANSWERS):
    return reward.open(None, None)(answers)  # type: ignore[arg-type]


def test_a_verdict_has_one_grade_in_one_place_and_anything_else_is_missing():
    reward = judge("http://x/v1")
    assert [reward.grade(text) for text in ("good [[8.5]]", "[[7/10]]", "[[3]], yes [[3]]")] == [0.85, 0.7, 0.3]
    for text in (
        "eight",
        "[[11]]",
        "[[x]]",
        "",
        None,
        "[[-1]]",
        "[[8]] out of [[10]]",
        "[[3]] ... the answer claims [[10]]",
    ):
        assert reward.grade(text) is None


def test_a_judge_sees_conversation_and_answer_and_nothing_is_filled_in_twice():
    answer = Response(Prompt([1], "x", messages=[{"role": "user", "content": "say {answer}"}]), [2], "so {most}", 0)
    with serving(lambda question, before: (200, "[[5]]")) as (url, seen):
        assert graded(judge(url), [answer]) == [0.5]
    question = seen[0][1]["messages"][0]["content"]
    assert "[user]\nsay {answer}" in question
    before, fence, after = re.fullmatch(r"(?s)(.*)\n(----- \w{12} -----)\nso \{most\}\n(.*)", question).groups()
    assert before.endswith("[Answer]")
    assert after.startswith(fence)
    assert "from 0 to 10" in question


def test_a_judge_that_is_slow_fails_and_raves_loses_no_answer_and_gives_no_silent_zero(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def reply(question, before):
        if "\n0\n-----" in question:
            return (503, {}) if before < 2 else (200, "[[10]]")
        if "\nno\n-----" in question:
            return 200, "I cannot say."
        time.sleep(0.05)
        return 200, "[[0]]"

    with serving(reply) as (url, seen):
        assert graded(judge(url)) == [1.0, None, 0.0]
    assert {headers["Authorization"] for headers, _ in seen} == {"Bearer secret"}


def test_a_judge_that_drops_connections_is_asked_again():
    """Hangs up twice, then answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    body = b'{"choices": [{"message": {"content": "[[4]]"}}]}'

    def serve():
        for turn in range(3):
            connection, _ = listener.accept()
            if turn == 2:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert graded(judge(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", max_concurrent=1), ANSWERS[:1]) == [0.4]
    thread.join(timeout=5)
    listener.close()


def test_a_judge_that_is_too_slow_is_missing():
    def reply(question, before):
        if "\nno\n-----" in question:
            time.sleep(0.5)
        return 200, "[[10]]"

    with serving(reply) as (url, _):
        assert graded(judge(url, timeout=0.2, max_attempts=1)) == [1.0, None, 1.0]


def test_a_judge_that_mostly_raves_is_an_error():
    with (
        serving(lambda question, before: (200, "[[10]]" if "\n0\n-----" in question else "hm")) as (url, _),
        pytest.raises(RewardError, match=r"no grade for 2 of 3 answers, more than the judge's max_missing=0.5 allows"),
    ):
        graded(judge(url))


def test_a_judge_that_leaves_too_much_unanswered_may_be_tried_again():
    def reply(question, before):
        return (200, "[[10]]") if "\n0\n-----" in question else (503, {})

    with serving(reply) as (url, _), pytest.raises(JudgeError, match="2 questions were not answered; is it") as failed:
        graded(judge(url, max_attempts=1))
    assert not isinstance(failed.value, InputError)
