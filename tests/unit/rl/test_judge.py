"""Questions to an endpoint: patience, refusals, keys, and verdicts that hold in both orders."""

import pytest

from tests.endpoint import serving
from trainer.rl.judge import Endpoint, JudgeError, compare, verdict


def ask(url: str, *questions: str, **settings) -> list[str | None]:
    endpoint = Endpoint(url, "judge", backoff=0.001, **settings)
    return endpoint.ask([[{"role": "user", "content": q}] for q in questions])


def test_answers_come_in_the_order_of_the_questions_with_what_was_asked_for():
    with serving(lambda question, before: (200, question.upper())) as (url, seen):
        assert ask(url, *"abcdefgh", max_concurrent=4) == list("ABCDEFGH")
    assert {body["model"] for _, body in seen} == {"judge"}
    assert {body["temperature"] for _, body in seen} == {0}


def test_a_busy_endpoint_is_asked_again_and_what_stays_unanswered_is_missing():
    def reply(question, before):
        return (200, "yes") if question == "soon" and before == 2 else (503, {})

    with serving(reply) as (url, seen):
        assert ask(url, "soon", "never", max_attempts=3) == ["yes", None]
    assert len(seen) == 6


def test_an_answer_without_text_is_missing():
    with serving(lambda question, before: (200, "x" if question == "a" else {"choices": []})) as (url, _):
        assert ask(url, "a", "b") == ["x", None]


def test_a_refusal_and_silence_are_errors():
    with serving(lambda question, before: (401, {"error": "no such key"})) as (url, seen):
        with pytest.raises(JudgeError, match=r"answers status 401.*no such key"):
            ask(url, "a")
        assert len(seen) == 1
    with pytest.raises(JudgeError, match=r"answered none of 1 questions \(ConnectError\); is it up"):
        ask(url, "a", max_attempts=2)


def test_the_key_comes_from_the_environment_and_is_not_part_of_an_error(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-7")
    forbidding = serving(lambda question, before: (403, {"error": "forbidden"}))
    with forbidding as (url, seen), pytest.raises(JudgeError) as refused:
        ask(url, "a", key_variable="JUDGE_KEY")
    assert seen[0][0]["Authorization"] == "Bearer secret-7"
    assert "secret-7" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A is short. [[A]]", 0), ("[[B]].", 1), ("**[[B]]**", 1), ("A", None), ("[[A]] or [[B]]", None), (None, None)],
)
def test_a_verdict_is_one_mark(text, expected):
    # What is unclear is missing, not guessed.
    assert verdict(text) == expected


def test_a_judge_that_favours_a_place_decides_nothing():
    def favours_first(question, before):
        return 200, "[[A]]"

    def favours_long(question, before):
        first, second = question.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
        return 200, "[[A]]" if len(first) > len(second) else "[[B]]"

    prompts, pairs = [[{"role": "user", "content": "?"}]] * 2, [("long one", "short"), ("a", "bcd")]
    with serving(favours_first) as (url, _):
        assert compare(Endpoint(url, "judge"), prompts, pairs) == [None, None]
    with serving(favours_long) as (url, _):
        assert compare(Endpoint(url, "judge"), prompts, pairs) == [0, 1]
