"""The same bytes again: what PyTorch is told for the length of a session."""

import os

import pytest
import torch

from tests.command import TINY
from trainer.compose import compose
from trainer.parallel.distributed import session
from trainer.run import run


def test_a_session_that_wants_the_same_bytes_takes_kernels_of_a_fixed_order(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for wanted in (False, True, False):
        with session(same_bytes=wanted):
            assert torch.are_deterministic_algorithms_enabled() is wanted
            assert torch.utils.deterministic.fill_uninitialized_memory is not wanted
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.filterwarnings("error:.*deterministic")
def test_a_run_asks_for_it_and_no_operation_of_a_step_is_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = []
    plain = torch.optim.AdamW.step

    def observed(*args, **kwargs):
        steps.append(torch.are_deterministic_algorithms_enabled())
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", observed)
    for wanted in ("false", "true"):
        run(
            compose(
                [
                    *TINY,
                    "optimizer=adamw",
                    "steps=1",
                    f"run_dir={wanted}",
                    f"deterministic={wanted}",
                    "evaluation.rows=1",
                ]
            )
        )
    assert steps == [False, True]
