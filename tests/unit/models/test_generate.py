"""Generation a token at a time."""

import pytest

from tests.unit.models.test_transformer import SMALL
from trainer.models.generate import generate, stream
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_tokens_that_generation_gives(temperature):
    model = ModelLoader(Model(**SMALL), DDP(), 1, 50).load().eval()
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 7}
    [whole] = generate(model, [[3, 1, 4, 1, 5]], stops=(), **settings)
    assert list(stream(model, [3, 1, 4, 1, 5], stops=(), **settings)) == whole
    assert len(whole) == 12
    end = whole[4]
    assert list(stream(model, [3, 1, 4, 1, 5], stops=(end,), **settings)) == whole[: whole.index(end) + 1]
