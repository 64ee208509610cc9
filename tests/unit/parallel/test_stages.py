"""The order of a stage's work, and what travels between stages."""

import pytest
import torch
from torch import nn

from trainer.parallel.stages import MicroBatch, Result, StagedModel, one_forward_one_backward


def order(stage: int, stages: int, count: int) -> str:
    return " ".join("BF"[forward] + str(n) for forward, n in one_forward_one_backward(stage, stages, count))


def test_forwards_and_backwards_alternate_behind_as_many_as_there_are_stages_to_come():
    # Figure 4 of arXiv:2104.04473, for three stages and four micro-batches.
    assert order(0, 3, 4) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert order(1, 3, 4) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert order(2, 3, 4) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert order(0, 4, 2) == "F0 F1 B0 B1"  # fewer than stages: all ahead


def test_a_result_is_what_it_was_in_another_place():
    value = (torch.ones(2, requires_grad=True), [None, torch.zeros((), dtype=torch.float64)], 3, True, "x", 0.1)
    result = Result.of(value)
    assert result.form == [
        {"dtype": "float32", "shape": [2]}, [None, {"dtype": "float64", "shape": []}], 3, True, "x", 0.1,
    ]  # fmt: skip
    ones, (none, zero), *rest = result.value()
    assert (ones.tolist(), none, float(zero), rest) == ([1, 1], None, 0, [3, True, "x", 0.1])
    assert not ones.requires_grad
    with pytest.raises(TypeError, match="a reader gave a set, which does not travel between stages"):
        Result.of({1})


class Alone:
    """Links of a stage that is the first and the last one."""

    first = last = True


def test_a_loss_that_calls_the_model_twice_is_refused():
    class Doubling(nn.Module):
        def forward(self, tokens):
            return tokens * 2.0

    model = StagedModel(Doubling(), Alone())
    micro = MicroBatch(None)
    with model.passing(micro):
        assert model(torch.ones(1)).tolist() == [2]
        with pytest.raises(RuntimeError, match="called the trained model twice"):
            model(torch.ones(1))
    assert micro.result.value().tolist() == [2]
