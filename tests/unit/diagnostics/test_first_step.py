"""What the first step of a fresh run must show, and what becomes of a run that shows something else."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from tests.command import TINY, Command
from trainer.batch import Documents, PackedRows
from trainer.diagnostics.first_step import (
    Expectation,
    check,
    ends_learnt,
    finite,
    near,
    plausible,
    same_policy,
    something_learnt,
)
from trainer.diagnostics.guard import FirstStep, TrainingError
from trainer.parallel.precision import Compute
from trainer.pipelines.dpo import DPO
from trainer.pipelines.reference import ReferenceSource

END = 7


def rows(targets: list[int], mask: list[int]) -> PackedRows:
    """A row whose targets and mask are given."""
    ids = torch.tensor([targets])
    documents = Documents.from_lengths([len(targets)], 1)
    return PackedRows(
        torch.zeros(1, dtype=torch.int64), ids, documents, torch.tensor(1.0), ids, torch.tensor([mask]).float()
    )


def expected_of(
    dpo: DPO, *, compute: Compute = Compute.fp32, path: str | None = None, dropout: float = 0.0
) -> list[Expectation]:
    """What DPO expects of its first step, the two that every pipeline has aside."""
    load = SimpleNamespace(adapter=SimpleNamespace(path=path, dropout=dropout))
    engine = SimpleNamespace(precision=SimpleNamespace(compute=compute))
    return list(dpo.expected(load, None, engine, [rows([1], [1])]))[2:]


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
    found = {one.metric: one for one in expected_of(DPO(**settings))}
    assert (found["loss"].low + found["loss"].high) / 2 == pytest.approx(loss, abs=1e-7)
    fine, off = {"loss": loss, "rewards/margin": 0.0}, {"loss": loss + 0.01, "rewards/margin": 0.01}
    check(found.values(), fine, FirstStep.error)
    with pytest.raises(TrainingError, match=r"loss is .* the policy is its own reference.*guard.first_step=warn"):
        check(found.values(), off, FirstStep.error)


def test_the_tolerance_knows_the_precision():
    off = {"loss": math.log(2) + 1e-3, "rewards/margin": 0.0}
    check(expected_of(DPO(), compute=Compute.bf16), off, FirstStep.error)
    with pytest.raises(TrainingError):
        check(expected_of(DPO(), compute=Compute.fp32), off, FirstStep.error)


@pytest.mark.parametrize(
    "case",
    [
        {"dpo": DPO(loss_type="simpo")},
        {"dpo": DPO(reference=ReferenceSource.none)},
        {"dpo": DPO(rpo_alpha=1.0)},
        {"dpo": DPO(), "path": "adapter"},
        {"dpo": DPO(), "dropout": 0.1},
    ],
)
def test_dpo_expects_nothing_where_the_policy_need_not_be_its_reference(case):
    assert expected_of(**case) == []


def test_a_precomputed_reference_includes_the_adapter_that_training_starts_from():
    assert len(expected_of(DPO(reference=ReferenceSource.precomputed), path="adapter")) == 2


def test_a_policy_that_has_not_changed_has_ratio_1():
    fine = {"policy/ratio_mean": 1.00002, "policy/clip_fraction": 0.0, "policy/approx_kl": 1e-9}
    check(same_policy(Compute.fp32), fine, FirstStep.error)
    for name, value in (("policy/ratio_mean", 1.01), ("policy/clip_fraction", 0.02), ("policy/approx_kl", 0.001)):
        with pytest.raises(TrainingError, match=f"the first step's {name} is"):
            check(same_policy(Compute.fp32), {**fine, name: value}, FirstStep.error)
    check(same_policy(Compute.bf16), {**fine, "policy/ratio_mean": 1.01}, FirstStep.error)


def test_a_new_model_s_loss_is_near_chance_and_anything_else_is_a_warning(caplog):
    chance = math.log(512)
    with caplog.at_level(logging.WARNING):
        check([plausible(512)], {"loss": chance + 0.5}, FirstStep.error)
        assert caplog.text == ""
        check([plausible(512)], {"loss": 0.5 * chance}, FirstStep.error)
    assert "ln 512 = 6.24" in caplog.text


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(loss):
    with pytest.raises(TrainingError, match="a loss is a number"):
        check([finite()], {"loss": loss}, FirstStep.error)


def test_a_mask_that_is_empty_ends_the_run():
    check([something_learnt([rows([1, 2], [0, 0]), rows([1, 2], [0, 1])])], {}, FirstStep.error)
    with pytest.raises(TrainingError, match=r"number of learnt units is 0.*scripts/preview\.py"):
        check([something_learnt([rows([1, 2], [0, 0])])], {}, FirstStep.error)


def test_an_end_of_turn_token_that_is_there_but_not_learnt_is_missed(caplog):
    with caplog.at_level(logging.WARNING):
        check([ends_learnt([rows([1, END], [1, 1])], [END])], {}, FirstStep.error)
        assert caplog.text == ""
        check([ends_learnt([rows([1, END], [1, 0])], [END])], {}, FirstStep.error)
    assert "does not learn to stop" in caplog.text


def test_the_policy_decides_between_an_error_a_warning_and_nothing(caplog):
    wrong = [near("loss", 0.0, 0.1, "so it is", "do something")]
    with caplog.at_level(logging.WARNING):
        check(wrong, {"loss": 1.0}, FirstStep.off)
        assert caplog.text == ""
        check(wrong, {"loss": 1.0}, FirstStep.warn)
    assert "the first step's loss is 1, and so it is: do something" in caplog.text


MINE = '''
from dataclasses import dataclass

from trainer.diagnostics.first_step import near
from trainer.config import schema
from trainer.pipelines.pretrain import Pretrain


@schema("pipeline/mine")
@dataclass
class Mine(Pretrain):
    """Expects the impossible."""

    def expected(self, load, models, engine, micro_batches):
        yield near("loss", 0.0, 0.1, "it knows everything", "let it learn")
'''


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_starts_wrong_ends_after_its_first_step_and_only_a_fresh_one_is_looked_at(tmp_path, ranks):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "conf" / "pipeline").mkdir(parents=True)
    (tmp_path / "conf" / "pipeline" / "mine.yaml").write_text("defaults: [/schema/pipeline/mine@_here_, _self_]\n")
    settings = ["--config-dir", "conf", *TINY, "imports=[mine]", "pipeline=mine", "checkpoint.every=1", "run_dir=r"]
    _, output = Command(tmp_path, *settings, "steps=3", ranks=ranks).fail()
    assert "and it knows everything: let it learn" in output
    assert "Stopped after step 1 of 3: TrainingError" in (tmp_path / "r" / "report.html").read_text()
    output = Command(tmp_path, *settings, "steps=1", "guard.first_step=warn", "resume=new", ranks=ranks).finish()
    assert "and it knows everything: let it learn" in output
    assert "knows everything" not in Command(tmp_path, *settings, "steps=3", "run_dir=r-2", ranks=ranks).finish()
