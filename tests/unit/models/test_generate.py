"""Generation: what is drawn, and that it does not depend on what it is drawn with."""

import pytest

from tests.unit.models.test_transformer import SMALL
from trainer.models.generate import Sampling, generate, stream
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_tokens_that_generation_gives(temperature):
    model = ModelLoader(Model(**SMALL), DDP(), 1, 50).load().eval()
    sampling = Sampling(12, temperature)
    prompt, key = [3, 1, 4, 1, 5], (7, 0)
    [whole] = generate(model, [prompt], sampling, stops=(), keys=[key])
    assert list(stream(model, prompt, sampling, stops=(), key=key)) == whole.ids
    assert len(whole.ids) == 12
    end = whole.ids[4]
    assert list(stream(model, prompt, sampling, stops=(end,), key=key)) == whole.ids[: whole.ids.index(end) + 1]
