"""Generation: what is drawn does not depend on what it is decoded with."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.models.test_transformer import SMALL
from trainer.batch import Documents
from trainer.functional import logprobs
from trainer.generation import decode_graph, decoding
from trainer.generation.completion import Completion
from trainer.generation.decode_graph import FixedDecoder
from trainer.generation.decoding import Decoding
from trainer.generation.generate import generate, stream
from trainer.generation.sampling import Sampling
from trainer.models.load import Model, ModelLoader
from trainer.parallel.ddp import DDP

STOPS = (7, 11)


@pytest.fixture(scope="module")
def model():
    return ModelLoader(Model(**SMALL), DDP(), 1, 50).load().eval()


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(0)
    lengths = [1, 63, 64, 65, 130, *torch.randint(1, 60, (4,), generator=draw).tolist()]
    return [torch.randint(0, 50, (n,), generator=draw).tolist() for n in lengths]


def ids(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids for completion in completions]


def teacher_forced(model, prompt, completion, temperature) -> torch.Tensor:
    row = torch.tensor([[*prompt, *completion]])
    read = partial(logprobs, targets=row[:, 1:], temperature=temperature)
    with torch.no_grad():
        return model(row[:, :-1], Documents.from_lengths([row.shape[1] - 1], 1), read)[0][0, len(prompt) - 1 :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_tokens_that_generation_gives(model, temperature):
    sampling = Sampling(12, temperature)
    prompt, key = [3, 1, 4, 1, 5], (7, 0)
    [whole] = generate(model, [prompt], sampling, stops=(), keys=[key])
    assert list(stream(model, prompt, sampling, stops=(), key=key)) == whole.ids
    assert len(whole.ids) == 12
    end = whole.ids[4]
    assert list(stream(model, prompt, sampling, stops=(end,), key=key)) == whole.ids[: whole.ids.index(end) + 1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_drawn_does_not_depend_on_what_it_is_decoded_with(model, prompts, temperature):
    sampling = Sampling(40, temperature, top_p=0.95)
    keys = [(5, n) for n in range(len(prompts))]
    whole = ids(generate(model, prompts, sampling, stops=STOPS, keys=keys))
    assert len({len(completion) for completion in whole}) > 3 or temperature == 0
    for together in (1, 4):
        assert ids(generate(model, prompts, sampling, stops=STOPS, keys=keys, max_concurrent=together)) == whole
    assert ids(generate(model, prompts[::-1], sampling, stops=STOPS, keys=keys[::-1], max_concurrent=5)) == whole[::-1]
    for rank in (0, 1):
        part = generate(model, prompts[rank::2], sampling, stops=STOPS, keys=keys[rank::2])
        assert ids(part) == whole[rank::2]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_logprobs_are_those_of_a_teacher_forced_forward(model, prompts, temperature):
    found = generate(model, prompts, Sampling(70, temperature, top_k=20), stops=STOPS, max_concurrent=6)
    for prompt, completion in zip(prompts, found, strict=True):
        expected = teacher_forced(model, prompt, completion.ids, temperature or 1.0)
        # 1e-5: the last bits of sums over other shapes.
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


SHAPES = {
    "window": {"family": "mistral", "sliding_window": 21, "num_key_value_heads": 1},
    "delta": {
        "family": "qwen3_5_text",
        "num_hidden_layers": 4,
        "delta_key_heads": 2,
        "delta_value_heads": 4,
        "delta_key_size": 8,
        "delta_value_size": 6,
    },
    "qwen3": {"family": "qwen3", "qk_norm": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("fixed", [False, True], ids=["blocks", "fixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_windows_and_heads_are_decoded_as_they_are_trained(shape, fixed, prompts, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 100)
    model = ModelLoader(Model(**{**SMALL, "initializer_range": 0.3, **SHAPES[shape]}), DDP(), 1, 50).load().eval()
    done = 0
    for going in Decoding(model, prompts[2:7], Sampling(70), stops=(), max_concurrent=4, fixed=fixed):
        if going.done:
            expected = teacher_forced(model, going.prompt, going.ids, 1.0)
            # Weights as large as these move log-probabilities by whole nats where a token too many is seen.
            torch.testing.assert_close(torch.tensor(going.logprobs), expected, atol=1e-4, rtol=0)
            done += 1
    assert done == 5


@pytest.mark.parametrize("fixed", [False, True], ids=["blocks", "fixed"])
def test_states_of_equal_prompts_are_those_behind_the_prompt(fixed, prompts):
    """A copy of a state that has gone past its prompt would be of another text: slots are reused, and sequences end apart."""
    model = ModelLoader(Model(**{**SMALL, "initializer_range": 0.3, **SHAPES["delta"]}), DDP(), 1, 50).load().eval()
    group = [prompts[1], *[prompts[5]] * 5, prompts[2], prompts[1]]
    steps = Decoding(model, group, Sampling(30), stops=STOPS, max_concurrent=3, fixed=fixed)
    found = {going.number: going for going in steps if going.done}
    assert len({len(going.ids) for going in found.values()}) > 2
    for number, going in found.items():
        expected = teacher_forced(model, group[number], going.ids, 1.0)
        torch.testing.assert_close(torch.tensor(going.logprobs), expected, atol=1e-4, rtol=0)


def test_fixed_shapes_give_what_blocks_give(model, prompts):
    sampling = Sampling(80, 0.9)
    whole = ids(generate(model, prompts, sampling, stops=STOPS))
    steps = Decoding(model, prompts, sampling, stops=STOPS, max_concurrent=3, fixed=True)
    assert {going.number: going.ids for going in steps if going.done} == dict(enumerate(whole))


class Casts(TorchDispatchMode):
    """Counts matrices and vectors that are cast to bfloat16: weights, since activations have three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.count += args[0].ndim <= 2
        return operation(*args, **kwargs)


def test_autocast_casts_no_weight_at_a_token(prompts):
    model = ModelLoader(Model(**{**SMALL, "family": "qwen2", "attention_bias": True}), DDP(), 1, 50).load().eval()
    # Autocast's own memory of casts would hide those that a graph makes.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        steps = iter(Decoding(model, prompts[:2], Sampling(20), stops=(), fixed=True))
        for _ in range(2 + 2):  # the first tokens of both, and their first decoded ones
            next(steps)
        with Casts() as casts:
            for _ in range(2 * 10):
                next(steps)
    assert casts.count == 0


def test_what_is_decoded_again_is_captured_once(prompts, monkeypatch):
    model = ModelLoader(Model(**SMALL), DDP(), 1, 50).load().eval()
    captured = []
    capture = FixedDecoder._captured
    monkeypatch.setattr(FixedDecoder, "_captured", lambda *a: captured.append(a[2]) or capture(*a))

    def decode(sampling: Sampling, *, autocast: bool = False, **options) -> list[list[int]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            steps = Decoding(model, prompts, sampling, stops=STOPS, fixed=True, **options)
            done = {going.number: going.ids for going in steps if going.done}
            expected = ids(generate(model, prompts, sampling, stops=STOPS))
        assert done == dict(enumerate(expected))
        return expected

    for autocast in (False, True):
        again = partial(decode, Sampling(20, 0.9), autocast=autocast)
        first = again()
        # Fewer tokens fit in the same graph; and it knows where weights are, not what they are.
        decode(Sampling(10, 0.9), autocast=autocast)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        assert again() != first
        # An unfinished generation leaves nothing behind.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            next(iter(Decoding(model, prompts, Sampling(20, 0.9), stops=STOPS, fixed=True)))
        assert again() != first
        assert captured == [192]
        captured.clear()
    decode(Sampling(20, 0.9))  # another format
    decode(Sampling(20, 0.9, top_k=3))  # other filters
    decode(Sampling(20, 0.9, top_k=3), max_concurrent=3)  # fewer slots
    decode(Sampling(70, 0.9, top_k=3), max_concurrent=3)  # longer sequences
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())  # elsewhere
    decode(Sampling(70, 0.9, top_k=3), max_concurrent=3)
    assert len(captured) == 5


def test_a_large_decoder_gives_its_memory_back(model, prompts, monkeypatch):
    monkeypatch.setattr(decode_graph, "RETAINED_BYTES", 0)
    for _ in Decoding(model, prompts, Sampling(3), stops=(), fixed=True):
        pass
    assert model not in decode_graph._retained


def test_a_prompt_longer_than_a_chunk_passes_through_in_pieces(model, prompts, monkeypatch):
    sampling = Sampling(20, 0.9)
    whole = generate(model, prompts, sampling, stops=STOPS)
    monkeypatch.setattr(decoding, "CHUNK", 24)
    pieces = generate(model, prompts, sampling, stops=STOPS)
    assert ids(pieces) == ids(whole)
    for one, other in zip(pieces, whole, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_completion_ends_by_a_stop_token_or_by_the_limit(model, prompts):
    found = generate(model, prompts, Sampling(30), stops=STOPS)
    for completion in found:
        assert completion.ended == (completion.ids[-1] in STOPS)
        assert completion.ended or len(completion.ids) == 30
        assert not set(completion.ids[:-1]) & set(STOPS)
        assert len(completion.logprobs) == len(completion.ids)
    assert {completion.ended for completion in found} == {True, False}
    short = generate(model, prompts, Sampling(1), stops=STOPS, max_concurrent=2)
    assert ids(short) == [completion.ids[:1] for completion in found]
    assert all(c.ended == (c.ids[0] in STOPS) for c in short)


def test_a_model_that_ends_at_once_is_served(model, prompts):
    found = generate(model, prompts, Sampling(30), stops=range(50), max_concurrent=3)
    assert [len(completion.ids) for completion in found] == [1] * len(prompts)
    assert all(completion.ended for completion in found)


def test_no_prompts_give_no_completions_and_empty_ones_are_refused(model):
    assert generate(model, [], Sampling(), stops=STOPS) == []
    with pytest.raises(ValueError, match=r"prompts \[1\] are empty"):
        generate(model, [[1], []], Sampling(), stops=STOPS)
    with pytest.raises(ValueError, match="1 keys and 2 prompts"):
        generate(model, [[1], [2]], Sampling(), stops=STOPS, keys=[(0,)])


def test_equal_prompts_pass_through_once_and_are_continued_differently(model, prompts):
    group = [prompts[4]] * 6
    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    found = generate(model, [*group, prompts[1]], Sampling(8), stops=())
    hook.remove()
    assert seen == [130 + 63] + [7] * 7
    assert len({tuple(completion.ids) for completion in found[:6]}) == 6
    alone = [generate(model, [prompts[4]], Sampling(8), stops=(), keys=[(0, n)])[0] for n in range(6)]
    assert ids(found[:6]) == ids(alone)
    # Fewer slots than the group: those that follow are copied from one that still runs.
    copied = generate(model, [*group, prompts[1]], Sampling(8), stops=(found[0].ids[2],), max_concurrent=3)
    assert [c.ids for c in copied[1:]] == [_until(c.ids, found[0].ids[2]) for c in found[1:]]


def test_a_beginning_that_prompts_share_passes_through_once(model, prompts, monkeypatch):
    monkeypatch.setattr(decoding, "SPARED", 40)
    beginning = prompts[4][:40]
    # The first is the beginning itself; the last begins otherwise, and would leave nothing that all share.
    group = [beginning, *([*beginning, *prompt] for prompt in prompts[:4]), prompts[4][1:]]
    seen = []
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    shared = generate(model, group[:5], Sampling(8), stops=())
    # 40 tokens, and the rests of 1, 63, 64 and 65; then a token each.
    assert seen == [40 + 0 + 1 + 63 + 64 + 65, *[5] * 7]
    monkeypatch.setattr(decoding, "CHUNK", 140)
    seen.clear()
    generate(model, group[:5], Sampling(1), stops=())
    # 40 + 0 + 1 + 63 fit; 64 and 65 more do not.
    assert seen == [104, 40 + 64, 40 + 65]
    monkeypatch.setattr(decoding, "CHUNK", 2048)
    monkeypatch.setattr(decoding, "ATTENDED", 190)
    seen.clear()
    generate(model, group[:5], Sampling(1), stops=())
    # Attention looks at 40 + 41 + 103 tokens, and with the next 104 at more than 190.
    assert seen == [104, 104, 105]
    monkeypatch.setattr(decoding, "ATTENDED", 8192)
    monkeypatch.setattr(decoding, "SPARED", 161)
    seen.clear()
    generate(model, group[:5], Sampling(1), stops=())
    # 4 times 40 is less.
    assert seen == [40 + 41 + 103 + 104 + 105]
    monkeypatch.setattr(decoding, "SPARED", 40)
    seen.clear()
    generate(model, group, Sampling(1), stops=())
    assert seen == [sum(map(len, group))]
    hook.remove()
    alone = [generate(model, [prompt], Sampling(8), stops=(), keys=[(0, n)])[0] for n, prompt in enumerate(group[:5])]
    assert ids(shared) == ids(alone)
    for one, other in zip(shared, alone, strict=True):
        # 1e-5: the last bits of sums over other shapes.
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_the_cache_is_bounded_by_what_is_decoded_together(model, prompts):
    steps = Decoding(model, prompts, Sampling(40), stops=STOPS, max_concurrent=3)
    # The longest prompt has 130 tokens: 170 with its completion, 3 blocks of 64.
    assert steps.cache.width == 3
    for _ in steps:
        assert len(steps.running) <= 3
        in_use = [block for blocks in steps.cache.blocks_of for block in blocks]
        # In use are always the first blocks, without a gap.
        assert sorted(in_use) == list(range(steps.cache.used))
        assert steps.cache.of(0)[0].shape == (3 * 3, 2, 64, 8)
    assert steps.cache.used == 0


def test_weights_and_autocast_in_bfloat16_decode(model, prompts):
    with torch.autocast("cpu", torch.bfloat16):
        mixed = generate(model, prompts, Sampling(8, 0), stops=())
    plain = generate(model, prompts, Sampling(8, 0), stops=())
    narrow = ModelLoader(Model(**SMALL), DDP(), 1, 50).load().eval().to(torch.bfloat16)
    low = generate(narrow, prompts, Sampling(8, 0), stops=())
    for one, other, exact in zip(mixed, low, plain, strict=True):
        # A bfloat16 has 8 bits: the first log-probability is that of float32 within a few of them.
        assert one.logprobs[0] == pytest.approx(exact.logprobs[0], abs=0.05)
        assert other.logprobs[0] == pytest.approx(exact.logprobs[0], abs=0.05)


def test_training_goes_on_after_generation(model, prompts):
    """What generation keeps for later (indices of documents) can be used in a backward."""
    generate(model, prompts, Sampling(2), stops=())
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.tensor([[token for prompt in prompts for token in prompt]])
    values, _ = model(tokens, Documents.from_lengths(lengths, 1), partial(logprobs, targets=tokens))
    values.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


@pytest.mark.gpu
def test_a_graph_decodes_what_the_cpu_decodes(model, prompts):
    sampling = Sampling(80, 0.9, top_p=0.9)
    expected = ids(generate(model, prompts, sampling, stops=STOPS))
    there = ModelLoader(Model(**SMALL), DDP(), 1, 50).load().eval().cuda()
    assert ids(generate(there, prompts, sampling, stops=STOPS, max_concurrent=4)) == expected


def _until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
