"""``onecurve compare``: what a function of one's own gives for the answers, and how it fails."""

import argparse

import pytest

from tests.chats import message
from trainer.cli.compare import scorer
from trainer.data.messages import Chat
from trainer.rl.rewards import RewardError, UnansweredRewardError

FUNCTION = """
def lengths(prompts, completions, rows): return [len(c) if row["counts"] else None for c, row in zip(completions, rows)]
def divides(prompts, completions, rows): return [1 / len(c) for c in completions]
def asks(prompts, completions, rows): raise ConnectionRefusedError("nobody is there")
def endless(prompts, completions, rows): return [float("inf") for _ in rows]
"""
CHATS, ROWS = [Chat([message("user", q)], 1) for q in ("Who?", "Why?")], [{"counts": True}, {"counts": False}]


@pytest.fixture
def scored(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTION)
    return lambda name, *texts: scorer(argparse.Namespace(function=f"{tmp_path}/own.py:{name}"))(ROWS, CHATS, texts)


def test_a_function_scores_answers_and_its_failures_are_sentences(scored):
    assert scored("lengths", "Ada.", "So.") == [4.0, None]
    with pytest.raises(RewardError, match=r"own.py:divides failed on row 1 \('Why\?'\): ZeroDivisionError"):
        scored("divides", "Ada.", "")
    with pytest.raises(RewardError, match=r"gave inf for row 0"):
        scored("endless", "Ada.", "So.")
    with pytest.raises(UnansweredRewardError, match="nobody is there; is it up"):
        scored("asks", "Ada.", "So.")
