"""What attention and the residual stream are in, in every precision, where the code believes that it is on CUDA."""

from functools import partial

import pytest
import torch

from tests.cuda.emulated_varlen import emulated
from tests.ranks import on_ranks
from tests.unit.models.test_transformer import SMALL, built, gradients
from trainer.batch import Documents, PackedRows
from trainer.functional import cross_entropy, logprobs
from trainer.generation.generate import generate
from trainer.generation.sampling import Sampling
from trainer.models import transformer
from trainer.models.load import Model, ModelLoader
from trainer.optim import AdamW
from trainer.parallel import distributed
from trainer.parallel.ddp import DDP
from trainer.parallel.precision import Compute, Precision
from trainer.parallel.zero import Zero1, Zero2, Zero3, deepspeed_variables

STRATEGIES = {"ddp": DDP(), **{
    f"{kind.__name__.lower()} {form}": kind(autocast=form == "autocast")
    for kind in (Zero1, Zero2, Zero3) for form in ("autocast", "weights")
}}  # fmt: skip
TOKENS = torch.arange(24)[None]


def seen_by_attention() -> dict[str, list[str]]:
    """What the kernels were called with, by strategy, precision and use; and what became of the wavelengths."""
    plain = torch.is_autocast_enabled
    # Without an argument the question is about CUDA: this answers as there.
    torch.is_autocast_enabled = lambda kind="cpu": plain(kind)
    documents = Documents.from_lengths((10, 14), 1)
    batch = PackedRows(torch.zeros(1), TOKENS, documents, torch.tensor(24.0), TOKENS.roll(-1), torch.ones(1, 24))
    seen = {}
    for name, strategy in STRATEGIES.items():
        for compute in (Compute.bf16, Compute.fp16):
            precision = Precision(compute)
            load = ModelLoader(Model(**SMALL), strategy, 0, 50, precision=precision)
            twin, engine = load.frozen(), strategy.wrap(load.load(), AdamW(lr=0.01), precision)
            uses = {}

            def loss_of(batch, engine=engine):
                read = partial(cross_entropy, targets=batch.targets, mask=batch.mask)
                return engine.model(batch.tokens, batch.documents, read)[0], None

            with emulated() as calls:
                engine.accumulate(loss_of, [batch], batch.weight)
                uses["training"] = {str(call.dtype) for call in calls}
                calls.clear()
                with engine.evaluating():
                    twin(TOKENS, documents, partial(logprobs, targets=TOKENS))
                    uses["twin"] = {str(call.dtype) for call in calls}
                    calls.clear()
                    with engine.gathered() as module:
                        generate(module, [[1, 2, 3]], Sampling(2, 1.0), stops=())
                        uses["generation"] = {str(call.dtype) for call in calls}
            uses["wavelengths"] = {str(m.model.inverse.dtype) for m in (engine.module, getattr(twin, "module", twin))}
            seen.update({f"{name} {compute} {use}": sorted(kinds) for use, kinds in uses.items()})
    torch.is_autocast_enabled = plain
    return seen


def test_attention_computes_in_the_chosen_format_under_every_strategy():
    [seen] = on_ranks(1, seen_by_attention)
    formats = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
    expected = {
        f"{name} {compute} {use}": ["torch.float32" if use == "wavelengths" else dtype]
        for name in STRATEGIES for compute, dtype in formats.items()
        for use in ("training", "twin", "generation", "wavelengths")
    }  # fmt: skip
    assert seen == expected


def stream(autocast: torch.dtype | None) -> tuple[set[torch.dtype], dict[str, torch.Tensor]]:
    """The formats that a block's input and output have, and a model's gradients."""
    model, seen = built(), set()
    for block in model.model.layers:
        block.register_forward_hook(lambda _, inputs, out: seen.update({inputs[0].dtype, out.dtype}))
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        return seen, gradients(model)


def test_the_residual_stream_is_bfloat16_where_products_are_with_the_same_gradient(monkeypatch):
    wide, expected = stream(torch.bfloat16)
    monkeypatch.setattr(transformer, "NARROW_STREAM", {"cpu"})
    narrow, gradient = stream(torch.bfloat16)
    assert (wide, narrow) == ({torch.float32}, {torch.bfloat16})
    for name, exact in expected.items():
        assert gradient[name].dtype is torch.float32
        # Six sums are rounded to 8 bits on the way, there and back.
        torch.testing.assert_close(gradient[name], exact, rtol=0, atol=3e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_the_residual_stream_is_never_float16_nor_narrowed_in_float32(autocast, monkeypatch):
    monkeypatch.setattr(transformer, "NARROW_STREAM", {"cpu"})
    seen, _ = stream(autocast)
    assert seen == {torch.float32}


def test_deepspeed_takes_the_device_that_the_session_took():
    alone, shared = torch.device("cuda", 0), torch.device("cuda", 3)
    variables = [deepspeed_variables(distributed.World(3, 4, 3, d)) for d in (alone, shared, torch.device("cpu"))]
    assert [v["LOCAL_RANK"] for v in variables] == ["0", "3", "3"]
    assert [v["DS_ACCELERATOR"] for v in variables] == ["cuda", "cuda", "cpu"]
