"""What a user's own module adds in one file: a preference loss, a pipeline, a metric. docs/extending.md shows the same."""

import importlib
import itertools
import math

import pytest

from tests.chats import write_jsonl
from tests.command import TINY, metrics
from trainer.compose import compose
from trainer.config import ConfigError
from trainer.run import run

LOSS = '''
"""A preference loss: the logistic loss of a margin that asks for ``tau`` more nats."""

from torch import Tensor
from torch.nn.functional import softplus

from trainer.pipelines.preference_losses import PairLogps, preference_loss


@preference_loss()
def patient(pairs: PairLogps, beta: float = 0.1, *, tau: float = 0.5) -> Tensor:
    """Softplus of ``tau`` less the difference of the log-ratios, ``(B,)``."""
    return softplus(tau - beta * pairs.difference)
'''

PIPELINE = '''
"""A pipeline: pretraining whose loss is scaled, with a metric of its own."""

from dataclasses import dataclass

from torch import Tensor

from trainer.batch import PackedRows
from trainer.config import schema, setting
from trainer.metrics import Metrics
from trainer.pipelines.base import Models
from trainer.pipelines.pretrain import Pretrain


@schema("pipeline/scaled")
@dataclass
class Scaled(Pretrain):
    """Next-token prediction, scaled."""

    scale: float = setting(2.0, "factor of the loss", above=0)

    def loss(self, models: Models, batch: PackedRows) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(models, batch)
        metrics.mean("learnt_share", batch.weight, float(batch.mask.numel()))
        return self.scale * loss, metrics
'''


@pytest.fixture
def module(clean_registries, tmp_path, monkeypatch):
    """Writes a user's module, which can then be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return f"imports=[{name}]"

    return write


def test_a_pipeline_and_a_metric_are_one_file(module, tmp_path):
    settings = [module("scaled_pipeline", PIPELINE), "pipeline=scaled", *TINY, "steps=1"]
    losses = [run(compose([*settings, f"pipeline.scale={scale}", f"run_dir=r{scale}"]))["loss"] for scale in (1, 3)]
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-6)
    assert 0 < metrics(tmp_path / "r1")[0]["learnt_share"] < 1
    with pytest.raises(ConfigError, match=r"pipeline\.scale=0\.0 must be above 0"):
        compose([*settings, "pipeline.scale=0"])


def test_a_preference_loss_is_one_file(module, tmp_path):
    colours = ["red", "blue", "green", "black"]
    pairs = [{"prompt": f"{a} {b}?", "chosen": a, "rejected": b} for a, b in itertools.permutations(colours, 2)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run(compose([*TINY, "steps=1", "run_dir=base"]))
    settings = [
        module("patient_loss", LOSS), "pipeline=dpo", "pipeline.loss_type=patient", "model.path=base/export",
        "data=preference", "data.train=[pairs.jsonl]", "data.template=chatml", "data.cache=cache", "batch.size=4",
        "batch.micro=4", "batch.length=48", "steps=1", "evaluation.samples=0", *TINY[-3:],
    ]  # fmt: skip
    found = run(compose([*settings, "run_dir=a"]))
    # At the first step the policy is its own reference: a difference of 0.
    assert found["loss"] == pytest.approx(math.log(1 + math.exp(0.5)), rel=1e-5)
    found = run(compose([*settings, "pipeline.loss_parameters.tau=0", "run_dir=b"]))
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-5)
    with pytest.raises(
        ConfigError, match=r"loss_parameters\.nu is not used by pipeline\.loss_type=patient, which has beta, tau"
    ):
        compose([*settings, "pipeline.loss_parameters.nu=1"])
    with pytest.raises(ConfigError, match=r"loss_type=patent is not one of sigmoid,.*, patient; did you mean patient"):
        compose([*settings[:2], "pipeline.loss_type=patent", *settings[3:]])
