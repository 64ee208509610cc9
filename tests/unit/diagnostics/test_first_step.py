"""What the first step of a fresh run must show, and what becomes of a run that shows something else."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from tests.command import TINY, Command
from trainer.batch import Documents, PackedRows
from trainer.diagnostics.first_step import FirstStep, validate_first_step
from trainer.diagnostics.guard import FirstStepError, FirstStepPolicy
from trainer.parallel.precision import Compute
from trainer.pipelines.base import Pipeline
from trainer.pipelines.dpo import DPO
from trainer.pipelines.kto import KTO
from trainer.pipelines.ppo import PPO
from trainer.pipelines.pretrain import Pretrain
from trainer.pipelines.reference import ReferenceSource
from trainer.pipelines.sft import SFT

END = 7


def rows(targets: list[int], mask: list[int]) -> PackedRows:
    """A row whose targets and mask are given."""
    ids = torch.tensor([targets])
    documents = Documents.from_lengths([len(targets)], 1)
    return PackedRows(
        rows=torch.zeros(1, dtype=torch.int64), tokens=ids, targets=ids, mask=torch.tensor([mask]).float(),
        documents=documents, real=torch.tensor(1.0),
    )  # fmt: skip


def problems(
    pipeline: Pipeline, values: dict, *batches, compute=Compute.fp32, path=None, dropout=0.0, new=False
) -> list[str]:
    """What a pipeline finds in a first step with these metrics, of a model that starts from a folder unless it is new."""
    load = SimpleNamespace(
        adapter=SimpleNamespace(path=path, dropout=dropout), files=None if new else "files",
        architecture=SimpleNamespace(vocab_size=512),
    )  # fmt: skip
    healthy = {"loss": 1.0, "grad_norm": 1.0, "skipped_in_a_row": 0.0}
    tokenizer = SimpleNamespace(stops=[END])
    return pipeline.first_step_problems(FirstStep(healthy | values, batches, load, tokenizer, compute))


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.2}, math.log(2)),
        ({"loss_type": "robust", "label_smoothing": 0.2}, math.log(2)),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "ipo", "beta": 0.5}, 1.0),
    ],
)
def test_dpo_starts_at_the_loss_of_no_preference(settings, loss):
    assert problems(DPO(**settings), {"loss": loss, "rewards/margin": 0.0}) == []
    both = problems(DPO(**settings), {"loss": loss + 0.01, "rewards/margin": 0.01})
    assert [text.split(" is ")[0] for text in both] == ["the first step's rewards/margin", "the first step's loss"]
    assert "the policy is its own reference" in both[0]


def test_the_tolerance_knows_the_precision():
    off = {"loss": math.log(2) + 1e-3, "rewards/margin": 0.0}
    assert problems(DPO(), off, compute=Compute.bf16) == []
    assert len(problems(DPO(), off, compute=Compute.fp32)) == 1


@pytest.mark.parametrize(
    "case",
    [
        {"pipeline": DPO(loss_type="simpo")},
        {"pipeline": DPO(reference=ReferenceSource.none)},
        {"pipeline": DPO(), "dropout": 0.1},
        {"pipeline": KTO(), "dropout": 0.1},
    ],
)
def test_nothing_is_expected_where_the_policy_need_not_be_its_reference(case):
    assert problems(values={"loss": 5.0, "rewards/margin": 5.0}, **case) == []


@pytest.mark.parametrize("reference", [ReferenceSource.model, ReferenceSource.precomputed])
@pytest.mark.parametrize("path", [None, "adapter"])
def test_every_reference_includes_the_adapter_that_training_starts_from(reference, path):
    wrong = {"loss": 5.0, "rewards/margin": 5.0}
    assert len(problems(DPO(reference=reference), wrong, path=path)) == 2
    assert len(problems(DPO(reference=reference, rpo_alpha=1.0), wrong, path=path)) == 1
    assert len(problems(KTO(reference=reference), wrong, path=path)) == 1


def test_a_policy_that_has_not_changed_has_ratio_1():
    fine = {
        "policy/ratio_mean": 1.00002, "policy/clip_fraction": 0.0, "policy/approx_kl": 1e-9, "objective/kl": 1e-5,
        "completion/length_mean": 10.0,
    }  # fmt: skip
    assert problems(PPO(), fine) == []
    for name, value in (("policy/ratio_mean", 1.01), ("policy/clip_fraction", 0.02), ("policy/approx_kl", 0.001)):
        [text] = problems(PPO(), {**fine, name: value})
        assert text.startswith(
            f"the first step's {name} is {value:.6g}, and the policy has not changed since it sampled"
        )
    assert problems(PPO(), {**fine, "policy/ratio_mean": 1.01}, compute=Compute.bf16) == []
    # 0.05 nats a completion of 10 tokens are 0.005 a token.
    [text] = problems(PPO(), {**fine, "objective/kl": 0.05})
    assert text.startswith("the first step's objective/kl is 0.05, and before the first update the policy is its own")
    assert problems(PPO(kl_coef=0.0), {**fine, "objective/kl": 0.05}) == []


def test_a_gradient_of_exactly_0_is_an_error():
    [text] = problems(Pretrain(), {"loss": 1.0, "grad_norm": 0.0})
    assert text.startswith("the first step's grad_norm is exactly 0, so nothing is learnt")


def test_scores_that_are_missing_throughout_are_an_error_that_says_so():
    skipped = {"loss": 0.0, "grad_norm": 0.0, "skipped_in_a_row": 1.0}
    [text] = problems(PPO(), {**skipped, "objective/missing": 1.0})
    assert "no completion of the first iteration has a score" in text
    assert problems(PPO(), {**skipped, "objective/missing": 0.5}) == []


def test_scores_that_are_all_cut_are_an_error_and_equal_ones_a_warning(caplog):
    flat = {
        "policy/ratio_mean": 1.0, "policy/clip_fraction": 0.0, "policy/approx_kl": 0.0, "objective/kl": 0.0,
        "completion/length_mean": 1.0, "grad_norm": 0.0, "objective/score_std": 0.0,
    }  # fmt: skip
    [text] = problems(PPO(score_clip=5.0), {**flat, "objective/clipped": 1.0})
    assert "lie beyond pipeline.score_clip=5" in text
    assert problems(PPO(), flat) == []
    assert "all advantages are 0, since the scores within every group are equal" in caplog.text


def test_a_new_model_s_loss_is_near_chance_and_anything_else_is_a_warning(caplog):
    chance = math.log(512)
    assert problems(Pretrain(), {"loss": chance + 0.5}, new=True) == []
    assert problems(Pretrain(), {"loss": 0.5 * chance}) == []
    assert caplog.messages == []
    assert problems(Pretrain(), {"loss": 0.5 * chance}, new=True) == []
    assert "ln(vocabulary) = 6.24" in caplog.text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_problem(loss):
    [text] = problems(Pretrain(), {"loss": loss, "skipped_in_a_row": 1.0})
    assert "a loss is a number" in text


def test_a_step_without_a_loss_weight_is_a_problem_but_in_ppo_a_warning(caplog):
    skipped = {"loss": 0.0, "grad_norm": 0.0, "skipped_in_a_row": 1.0}
    [text] = problems(Pretrain(), skipped)
    assert "learns from nothing" in text
    assert problems(PPO(), skipped) == []
    assert "teaches nothing" in caplog.text


def test_an_end_of_turn_token_that_is_there_but_not_learnt_is_missed(caplog):
    assert problems(SFT(), {}, rows([1, END], [1, 0]), rows([1, END], [1, 1])) == []
    assert caplog.messages == []
    assert problems(SFT(), {}, rows([1, END], [1, 0])) == []
    assert "does not learn to stop" in caplog.text


def test_the_policy_decides_between_an_error_and_a_warning(caplog):
    validate_first_step([], FirstStepPolicy.error)
    with pytest.raises(FirstStepError, match=r"one thing; another \(guard.first_step=warn"):
        validate_first_step(["one thing", "another"], FirstStepPolicy.error)
    with caplog.at_level(logging.WARNING):
        validate_first_step(["one thing"], FirstStepPolicy.warn)
    assert caplog.messages == ["one thing"]


MINE = '''
from dataclasses import dataclass

from trainer.config import schema
from trainer.pipelines.pretrain import Pretrain


@schema("pipeline/mine")
@dataclass
class Mine(Pretrain):
    """Expects the impossible."""

    def first_step_problems(self, first):
        return first.near("loss", 0.0, "it knows everything", "let it learn")
'''


@pytest.mark.slow
def test_a_run_that_starts_wrong_ends_after_its_first_step_and_only_a_fresh_one_is_looked_at(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "mine.yaml").write_text("defaults: [/schema/pipeline/mine@_here_, _self_]\n")
    settings = ["--config-dir", "conf", *TINY, "imports=[mine]", "pipeline=mine", "checkpoint.every=1", "run_dir=r"]
    _, output = Command(tmp_path, *settings, "steps=3", ranks=2).fail()
    assert "and it knows everything: let it learn" in output
    assert "Stopped after step 1 of 3: FirstStepError" in (tmp_path / "r" / "report.html").read_text()
    output = Command(tmp_path, *settings, "steps=1", "guard.first_step=warn", "resume=new", ranks=2).finish()
    assert "and it knows everything: let it learn" in output
    assert "knows everything" not in Command(tmp_path, *settings, "steps=3", "run_dir=r-2", ranks=2).finish()
