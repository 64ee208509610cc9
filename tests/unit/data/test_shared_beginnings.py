"""Samples of a conversation that begin alike: the beginning is computed once, and the numbers are those of separate ones."""

from functools import partial

import torch

from tests.chats import byte_tokenizer, marked, write_jsonl
from tests.unit.data.test_turns import THINKING
from tests.unit.models.test_transformer import built
from trainer.batch import Branches
from trainer.data.chats import ChatData
from trainer.data.rows import Encoded, prepare_rows
from trainer.data.shared_beginnings import branched
from trainer.functional import cross_entropy

TOKENIZER = byte_tokenizer("<|im_end|>")
LENGTH = 24


def sample(ids: list[int], *learnt: int) -> Encoded:
    return Encoded(ids, [n in learnt for n in ids])


REMEMBERED = sample([1, 2, 3, 6, 7, 8, 9], 8, 9)
THOUGHT = sample([1, 2, 3, 4, 5, 6], 4, 5, 6)
CONVERSATIONS = [
    [THOUGHT, REMEMBERED],
    [sample([20, 21, 22], 22)],
    [
        sample([1, 2, 30, 31], 30, 31),
        sample([1, 2, 31, 32, 33, 34], 33, 34),
        sample([1, 2, 31, 32, 34, 35, 36, 37], 36),
    ],
    [sample([1, 2, 3, 40, 41, 42], 40, 41), sample([1, 2, 3, *range(50, 64)], 60, 63)],
]


def store(tmp_path, conversations, *, shared=True, length=LENGTH):
    lay = partial(branched, length=length) if shared else iter
    key = ["shared" if shared else "separate"]
    return prepare_rows(tmp_path, key, lambda: (e for c in conversations for e in lay(c)), TOKENIZER, length)


def sequences(batch) -> list[tuple[list[int], list[float]]]:
    """Inputs of every sequence that are no padding, and the targets that it alone learns."""
    index = getattr(batch.documents, "index", torch.arange(batch.tokens.numel()))
    tokens, targets, mask = (
        t.flatten()[index].split(list(batch.documents.lengths)) for t in (batch.tokens, batch.targets, batch.mask)
    )
    parts = zip(tokens, targets, mask, strict=True)
    return sorted((t.tolist(), t2[m > 0].tolist()) for t, t2, m in parts if t[0] != TOKENIZER.pad)


def test_a_sample_is_laid_down_from_its_last_shared_token_to_learn_from():
    assert list(branched([THOUGHT, REMEMBERED], LENGTH)) == [
        REMEMBERED,
        # 3 predicts 4 here, and 6 in the other one.
        Encoded([3, 4, 5, 6], [False, True, True, True], shared=2),
    ]


def test_a_beginning_ends_where_the_second_sample_learns():
    twice = sample([1, 2, 3, 4, 5], 2, 3)
    assert [e.shared for e in branched([twice, sample([1, 2, 3, 4, 6], 6)], LENGTH)] == [0, 0]
    assert [e.shared for e in branched([sample([1, 2, 3, 4, 5], 4, 5), twice], LENGTH)] == [0, 2]


def test_a_sample_that_finds_no_room_in_the_row_is_laid_down_in_full():
    # Nine positions together: half of a row, or more of one where the first takes more than half of it.
    assert [[e.shared for e in branched([THOUGHT, REMEMBERED], n)] for n in (18, 11, 9)] == [[0, 2]] * 3
    assert [list(branched([THOUGHT, REMEMBERED], n)) for n in (17, 8)] == [[REMEMBERED, THOUGHT]] * 2


def test_rows_hold_every_sample_with_what_it_learns(tmp_path):
    rows, separate = store(tmp_path, CONVERSATIONS), store(tmp_path, CONVERSATIONS, shared=False)
    batch, alone = (s.collate([*range(len(s)), -1]) for s in (rows, separate))
    assert isinstance(batch.documents, Branches)
    assert batch.tokens.shape == (1, LENGTH * (len(rows) + 1))
    inputs = [[*e.ids[:-1]] for c in CONVERSATIONS for e in c]
    assert [ids for ids, _ in sequences(batch)] == [ids for ids, _ in sequences(alone)] == sorted(inputs)
    assert batch.weight == alone.weight == separate.facts["trained"] == rows.facts["trained"]
    assert rows.facts["shared"] == separate.facts["tokens"] - rows.facts["tokens"] == 2 + 3 + 1 + 2
    assert "8 more in beginnings that are computed once" in rows.summary("x")[0]
    assert batch.seen == rows.facts["tokens"]


def test_losses_and_gradients_are_those_of_separate_samples(tmp_path):
    conversations = [[Encoded([n % 50 for n in e.ids], e.trained) for e in c] for c in CONVERSATIONS]
    results = []
    for shared in (True, False):
        rows, model = store(tmp_path, conversations, shared=shared), built()
        batch = rows.collate(range(len(rows)))
        read = partial(cross_entropy, targets=batch.targets, mask=batch.mask, places=batch.places)
        loss = model(batch.tokens % 50, batch.documents, read)[0]
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, gradients), (alone, expected) = results
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


def test_a_conversation_whose_reasoning_is_dropped_later_is_computed_once(tmp_path):
    reasoned = [
        {"role": role, "content": f"{n}", **({"reasoning": "well"} if role == "assistant" else {})}
        for n in range(3) for role in ("user", "assistant")
    ]  # fmt: skip
    (tmp_path / "own.jinja").write_text(THINKING)
    file = write_jsonl(tmp_path / "chats.jsonl", [{"messages": reasoned}])
    data = ChatData(train=[str(file)], template=str(tmp_path / "own.jinja"), cache=str(tmp_path / "cache"))
    [source] = data.sources(data.train)
    rows = data.rows(source, TOKENIZER, 512)
    turn = "<|im_start|>user\n{0}<|im_end|>\n<|im_start|>assistant\n{0}<|im_end|>\n"  # 23 tokens, 19 before the answer
    assert [(s.title, marked(TOKENIZER, s.ids, s.trained)) for s in rows.spans(0)] == [
        (
            "",
            turn.format(0) + turn.format(1) + "<|im_start|>user\n2<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\nwell\n</think>\n\n2<|im_end|>⟧\n",
        ),
        ("behind the first 42 tokens of the one before", "\n⟦<think>\nwell\n</think>\n\n1<|im_end|>⟧\n"),
        ("behind the first 19 tokens of the one before", "\n⟦<think>\nwell\n</think>\n\n0<|im_end|>⟧\n"),
    ]
