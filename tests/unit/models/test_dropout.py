"""What is dropped belongs to a pair or an answer: a step follows the same gradient however it is cut into micro-batches."""

from functools import partial

import pytest
import torch

from trainer.batch import Documents
from trainer.data.labelled import LabelledBatch
from trainer.data.pairs import AnswerBatch, Pair, collate, collate_shared_prefix
from trainer.data.rows import Encoded
from trainer.loop import loss_of
from trainer.models import dropout as draws
from trainer.models.dropout import divide, draw_for, dropout, narrow_to
from trainer.models.load import Model, ModelLoader
from trainer.models.lora import LoRA
from trainer.models.recompute import Recompute
from trainer.optim import AdamW
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.pipelines.base import Models
from trainer.pipelines.dpo import DPO
from trainer.pipelines.kto import KTO
from trainer.pipelines.reference import ReferenceSource
from trainer.pipelines.reward import RewardModelling

SHAPE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
PIPELINES = {
    "dpo": DPO(reference=ReferenceSource.adapters_off),
    "orpo": DPO(loss_type="orpo", reference=ReferenceSource.none),
    "kto": KTO(reference=ReferenceSource.adapters_off),
    "reward": RewardModelling(),
}


def answer(prompt: int, size: int, number: int) -> Encoded:
    """Ids of a prompt and an answer of ``size`` ids that differs from all others."""
    ids = [*range(prompt), *((7 * number + 3 * at) % 50 for at in range(size))]
    return Encoded(ids, [False] * prompt + [True] * size)


PAIRS = [Pair(answer(n + 2, 2 + n, n), answer(n + 2, 5 - n, n + 9), (n + 2) * (n % 2)) for n in range(4)]


def labelled(pairs, numbers) -> LabelledBatch:
    def side(answers):
        fields = collate_shared_prefix([(0, [one]) for one in answers], numbers)
        return AnswerBatch(**fields, reference=torch.zeros(len(answers)))

    labels = torch.tensor([1.0 if n % 2 else -1.0 for n in numbers])
    matched = side([pair.chosen for pair in pairs])
    return LabelledBatch(**vars(matched), labels=labels, mismatched=side([pair.rejected for pair in pairs]))


def gradient(name: str, micro: int, dropped: float = 0.3) -> torch.Tensor:
    """What a step over four units follows, in micro-batches of ``micro``."""
    pipeline = PIPELINES[name]
    load = ModelLoader(
        Model(**SHAPE, activation_checkpointing=Recompute.full),
        DDP(),
        3,
        50,
        LoRA(dropout=dropped),
        scores=pipeline.scores,
    )
    engine = DDP().wrap(load.load(), AdamW(lr=0.1), Precision(Compute.fp32))
    with torch.no_grad():
        for number, parameter in enumerate(engine.model.parameters()):
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    models = Models(engine.model, None)
    join = labelled if name == "kto" else collate
    batches = [join(PAIRS[at : at + micro], range(10 + at, 10 + at + micro)) for at in range(0, 4, micro)]
    prepared = pipeline.prepare_step(models, engine, batches)
    engine.accumulate(partial(loss_of, pipeline, models, (0, 1)), prepared, torch.tensor(4.0))
    return torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", PIPELINES)
def test_with_dropout_the_split_into_micro_batches_changes_nothing(name):
    together = gradient(name, 4)
    for micro in (1, 2):
        torch.testing.assert_close(gradient(name, micro), together, rtol=0, atol=1e-6)
    assert not torch.allclose(gradient(name, 4, dropped=0.0), together, rtol=1e-2)


def test_what_the_last_block_leaves_out_changes_no_draw():
    x = torch.ones(1, 5, 20)
    draw_for((0, 1), [4, 5], (3, 2))
    complete = dropout(x, 0.25, "q")
    places = torch.tensor([1, 3, 3])
    narrow_to(places)
    assert torch.equal(dropout(x[:, :3], 0.25, "q"), complete[:, places])
    draw_for((0, 1), [5], (2,))
    assert torch.equal(dropout(x[:, :2], 0.25, "q"), complete[:, 3:])
    with pytest.raises(ValueError, match=r"dropout at q has 5 tokens of rows with \(2,\)"):
        dropout(x, 0.25, "q")


def test_tokens_without_rows_as_a_shared_expert_has_them_draw_alike():
    draw_for((0, 1), [4, 5])
    rows = dropout(torch.ones(2, 6, 20), 0.25, "q")
    assert torch.equal(dropout(torch.ones(12, 20), 0.25, "q"), rows.view(12, 20))


def test_a_part_of_the_tokens_has_the_draws_that_it_has_among_all():
    draw_for((0, 1), [4, 5])
    rows = dropout(torch.ones(2, 5, 20), 0.25, "q").view(1, 10, 20)
    divide((2, 5), (4, 8))
    assert torch.equal(dropout(torch.ones(1, 4, 20), 0.25, "q"), rows[:, 4:8])
    divide((2, 5), (8, 12))  # two tokens, and two that there are not
    assert torch.equal(dropout(torch.ones(4, 20), 0.25, "q")[:2], rows[0, 8:])
    draw_for((0, 1), [4, 5], (3, 7))
    ragged = dropout(torch.ones(1, 10, 20), 0.25, "q")
    divide((1, 10), (2, 5))
    assert torch.equal(dropout(torch.ones(1, 3, 20), 0.25, "q"), ragged[:, 2:5])


def learnt_of_first(between: bool) -> torch.Tensor:
    """The gradient of row 1's forward, whose blocks are computed again; ``between``: row 2 passes before its backward."""
    load = ModelLoader(Model(**SHAPE, activation_checkpointing=Recompute.full), DDP(), 3, 50, LoRA(dropout=0.5))
    model = load.load().train()
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    tokens, documents = torch.arange(12)[None], Documents.from_lengths((12,), 1)
    draw_for((0, 1), [1])
    loss = model(tokens, documents, lambda hidden, head: hidden.square().sum())
    if between:
        draw_for((0, 1), [2])
        model(tokens, documents, lambda hidden, head: hidden.square().sum())
    before = draws.current()
    loss.backward()
    assert draws.current() == before
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_what_is_computed_again_drops_what_it_dropped_before_another_row_passed():
    assert torch.equal(learnt_of_first(True), learnt_of_first(False))
