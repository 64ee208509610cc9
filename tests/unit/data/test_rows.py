"""Packing, the order of data, the cache, and rows that cannot be used."""

import gzip
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command import ROOT
from trainer.config import ConfigError
from trainer.data.corpus import TextData
from trainer.data.loader import Loader, Mixture, permuted
from trainer.data.packing import best_fit, segments_of
from trainer.data.rows import Segment, collate, prepare_rows, tokenize
from trainer.data.sources import DataError, DataSource, OnBadRow
from trainer.data.streaming import Stream
from trainer.tinyworld.data import TinyWorldData

TOKENIZER = TinyWorldData().default_tokenizer()
TEXTS = [f"Ada paints {n} red drums" + " in Rome" * (n % 7) + "." for n in range(60)]


@pytest.fixture
def rows(tmp_path):
    return prepare_rows(tmp_path / "cache", ["test"], lambda: tokenize(TEXTS, TOKENIZER), TOKENIZER, 16)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 80))
def test_every_piece_is_in_exactly_one_row_and_no_row_is_too_long(lengths, capacity):
    packed = best_fit(lengths, capacity)
    assert sorted(p for row in packed for p in row) == list(range(len(lengths)))
    assert all(sum(lengths[p] for p in row) <= capacity for row in packed)
    # No two rows could be one: then best fit would have put the smaller pieces elsewhere.
    loads = sorted(sum(lengths[p] for p in row) for row in packed)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(2, 12))
def test_cut_documents_keep_every_pair_once(lengths, capacity):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts, sizes = segments_of(offsets, capacity)
    pairs = sorted(p for s, n in zip(starts.tolist(), sizes.tolist(), strict=True) for p in range(s, s + n))
    inside = [p for first, last in itertools.pairwise(offsets) for p in range(first, last - 1)]
    assert pairs == inside


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.text(max_size=5))
def test_the_permutation_is_one(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_the_permutation_of_a_billion_rows_costs_nothing():
    places = [permuted(i, 10**9, "key") for i in range(1000)]
    assert len(set(places)) == 1000
    assert max(places) > 9 * 10**8


def test_a_row_holds_its_documents_with_boundaries_and_restarting_positions(rows):
    batch = rows.collate(range(len(rows)))
    wanted = sorted([TOKENIZER.bos, *TOKENIZER.encode(t), TOKENIZER.eos] for t in TEXTS)
    found, at = [], 0
    flat = [t.flatten() for t in (batch.tokens, batch.targets, batch.mask, batch.documents.positions)]
    for length in batch.documents.lengths:
        tokens, targets, mask, positions = (t[at : at + length] for t in flat)
        assert positions.tolist() == list(range(length))
        assert len(set(mask.tolist())) == 1
        if mask[0]:
            found.append([tokens[0].item(), *targets.tolist()])
            assert tokens[1:].tolist() == targets[:-1].tolist()
        at += length
    # Documents of more than 16 pairs are cut; put together again they are all there.
    whole = [ids for ids in found if ids[0] == TOKENIZER.bos and ids[-1] == TOKENIZER.eos]
    assert batch.weight.item() == sum(len(w) - 1 for w in wanted)
    assert sorted(whole) == [w for w in wanted if len(w) <= 17]


@pytest.fixture
def mixture(rows):
    return Mixture([rows], [1.0], 0)


def order(rows, ranks: int, steps: int, size: int = 6) -> list[list[int]]:
    """Rows of every step, sorted: what a step learns from."""
    loaders = [Loader(rows, micro=size // ranks, seed=4, rank=r, ranks=ranks) for r in range(ranks)]
    found = [sorted(n for loader in loaders for n in next(loader).rows.tolist()) for _ in range(steps)]
    for loader in loaders:
        loader.close()
    return found


@pytest.mark.parametrize("shared", [0, 2])
def test_padding_is_told_from_documents(shared):
    row = [Segment(np.arange(4)), Segment(np.arange(3), None, shared)]
    found = collate([row, [Segment(np.arange(9))], []], [0, 1, -1], 8, 0).documents.real
    expected = [[True] * 5 + [False] * 3, [True] * 8, [False] * 8]
    flat = [[flag for flags in expected for flag in flags]]
    assert found.tolist() == (flat if shared else expected)
    assert collate([[Segment(np.arange(9))]], [0], 8, 0).documents.real is None


def test_a_step_learns_from_the_same_rows_on_any_number_of_ranks(mixture):
    one = order(mixture, 1, 20)
    assert order(mixture, 2, 20) == one
    assert order(mixture, 3, 20) == one


def test_an_epoch_has_every_row_once_and_the_next_another_order(mixture):
    loader = Loader(mixture, micro=1, seed=0, rank=0, ranks=1)
    first, second = ([next(loader).rows.item() for _ in range(len(mixture))] for _ in range(2))
    loader.close()
    assert sorted(first) == sorted(second) == list(range(len(mixture)))
    assert first != second


def test_a_loader_continues_where_it_was_consumed_on_other_ranks_too(mixture):
    loader = Loader(mixture, micro=6, seed=4, rank=0, ranks=1)
    for _ in range(7):
        next(loader)  # the thread is ahead of this by now
    state = json.loads(json.dumps(loader.state_dict()))
    expected = [sorted(next(loader).rows.tolist()) for _ in range(3)]
    loader.close()
    pair = [Loader(mixture, micro=3, seed=4, rank=r, ranks=2) for r in range(2)]
    for one in pair:
        one.load_state_dict(state)
    assert [sorted(n for one in pair for n in next(one).rows.tolist()) for _ in range(3)] == expected
    for one in pair:
        one.close()


def test_the_state_of_other_data_is_refused(rows, tmp_path):
    other = prepare_rows(tmp_path / "cache", ["other"], lambda: tokenize(TEXTS[:9], TOKENIZER), TOKENIZER, 16)
    state = Loader(rows, micro=1, seed=0, rank=0, ranks=1).state_dict()
    with pytest.raises(ConfigError, match="other data"):
        Loader(other, micro=1, seed=0, rank=0, ranks=1).load_state_dict(state)


def test_weights_are_passes_of_a_source_in_an_epoch(tmp_path):
    a = prepare_rows(tmp_path / "cache", ["a"], lambda: tokenize(TEXTS[:30], TOKENIZER), TOKENIZER, 16)
    b = prepare_rows(tmp_path / "cache", ["b"], lambda: tokenize(TEXTS[30:], TOKENIZER), TOKENIZER, 16)
    mixture = Mixture([a, b], [2.0, 0.5], seed=1)
    epochs = [[mixture.resolve(e, i) for i in range(len(mixture))] for e in range(2)]
    counts = [[rows.count(n) for n in range(len(a) + len(b))] for rows in epochs]
    assert counts[0][: len(a)] == [2] * len(a)
    together = [x + y for x, y in zip(counts[0][len(a) :], counts[1][len(a) :], strict=True)]
    # Half a pass an epoch: each row of b once in two epochs (an odd row out by rounding).
    assert sum(together) == 2 * round(len(b) / 2)
    assert max(together) <= 1 + len(b) % 2


def files(folder: Path) -> list[Path]:
    rows = "".join(json.dumps({"text": t, "id": n}) + "\n" for n, t in enumerate(TEXTS[:5]))
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows.encode()))
    pq.write_table(pa.table({"text": TEXTS[:5]}), folder / "d.parquet")
    (folder / "e.txt").write_text(TEXTS[0])
    return sorted(folder.iterdir())


def test_every_kind_of_file_gives_its_documents(tmp_path):
    found = {f.name: list(DataSource(str(f)).documents()) for f in files(tmp_path)}
    assert found.pop("e.txt") == TEXTS[:1]
    assert list(found.values()) == [TEXTS[:5]] * 4
    assert list(DataSource(str(tmp_path)).documents()) == [*TEXTS[:5] * 4, TEXTS[0]]


BAD = [
    (b'{"text": "cut', "not JSON"),
    (b'{"txt": "x"}', "no column 'text', the row has txt"),
    (b'{"text": 3}', "'text' is int, not text"),
    (b'{"text": ""}', "the document is empty"),
    (b'"text"', "not a JSON object"),
    (b'{"text": "\xff"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_a_bad_row_is_named_with_file_and_line_or_counted(line, why, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good too"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: ") as caught:
        list(DataSource(str(file)).documents())
    assert why in str(caught.value)
    source = DataSource(str(file), on_bad_row=OnBadRow.skip)
    assert list(source.documents()) == ["good", "good too"]
    assert len(source.skipped) == 1
    assert why in source.skipped[0]


def text_data(file: Path, cache: Path, **settings) -> TextData:
    return TextData(cache=str(cache), train=[str(file)], **settings)


def test_skipped_rows_are_logged_and_all_bad_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n{}\n')
    said = text_data(file, tmp_path / "c", on_bad_row=OnBadRow.skip).open(TOKENIZER, 16, 0).summary
    assert any("left out 1 of its rows" in line for line in said)
    file.write_text("{}\n")
    with pytest.raises(DataError, match="has no document left to learn from"):
        text_data(file, tmp_path / "c", on_bad_row=OnBadRow.skip).open(TOKENIZER, 16, 0)


def test_a_changed_file_is_prepared_again_and_an_unchanged_one_is_not(tmp_path):
    [file, *_] = files(tmp_path)
    data = text_data(file, tmp_path / "cache")
    first = data.open(TOKENIZER, 16, 0)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    assert data.open(TOKENIZER, 16, 0).fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == times
    file.write_text(file.read_text().replace("red", "blue", 1))
    assert data.open(TOKENIZER, 16, 0).fingerprint != first.fingerprint


def test_a_file_that_is_learnt_from_and_measured_on_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("Ada paints red drums in Rome.\n" * 20)
    for streaming in (False, True):
        data = text_data(
            tmp_path / "a.txt", tmp_path / "cache", eval=[str(tmp_path / f"{n}.txt") for n in "ab"], streaming=streaming
        )
        said = [line for line in data.open(TOKENIZER, 32, 0).summary if "data.train" in line]
        assert said == [f"data.eval: {tmp_path}/a.txt is in data.train, too: its figures say nothing about other data"]


def _prepare(cache: str, out: "multiprocessing.Queue[str]") -> None:
    out.put(prepare_rows(Path(cache), ["same"], lambda: tokenize(TEXTS * 50, TOKENIZER), TOKENIZER, 16).fingerprint)


def test_processes_that_prepare_the_same_rows_at_once_do_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [context.Process(target=_prepare, args=(str(tmp_path), out)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({out.get(timeout=120) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


KILLED = """
import sys, time
from pathlib import Path
from trainer.tinyworld.data import TinyWorldData
from trainer.data.rows import prepare_rows, tokenize
def documents():
    for n in range(2000):
        yield f"Ada paints {n}."
    print("ready", flush=True)
    time.sleep(60)
tokenizer = TinyWorldData().default_tokenizer()
prepare_rows(Path(sys.argv[1]), ["key"], lambda: tokenize(documents(), tokenizer), tokenizer, 16)
"""


def test_a_killed_preparation_leaves_nothing_that_looks_finished(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(".tmp-" in p.name for p in tmp_path.iterdir())
    rows = prepare_rows(tmp_path, ["key"], lambda: tokenize(TEXTS, TOKENIZER), TOKENIZER, 16)
    assert rows.facts["documents"] == len(TEXTS)
    assert not any(".tmp-" in p.name for p in tmp_path.iterdir())


def stream(folder: Path, window: int = 7) -> Stream:
    for n in range(3):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[20 * n : 20 * n + 20])
        (folder / f"{n}.jsonl").write_text(lines)
    return Stream([DataSource(str(folder))], TOKENIZER, 24, window)


def steps_of(one: Stream, ranks: int, steps: int, state: dict | None = None) -> tuple[list[list[int]], dict]:
    loaders = [one.loader(micro=6 // ranks, seed=4, rank=r, ranks=ranks) for r in range(ranks)]
    for loader in loaders:
        if state:
            loader.load_state_dict(state)
    found = [sorted(n for loader in loaders for n in next(loader).rows.tolist()) for _ in range(steps)]
    after = loaders[0].state_dict()
    assert all(loader.state_dict() == after for loader in loaders)
    for loader in loaders:
        loader.close()
    return found, after


def test_a_stream_has_the_same_order_on_any_number_of_ranks_and_resumes_by_five_numbers(tmp_path):
    one = stream(tmp_path)
    whole, _ = steps_of(one, 1, 30)
    assert steps_of(one, 2, 30)[0] == whole
    before, state = steps_of(one, 2, 11)
    assert set(state) == {"epoch", "shard", "window", "row", "fingerprint"}
    after, _ = steps_of(one, 3, 19, json.loads(json.dumps(state)))
    assert before + after == whole


def test_an_epoch_of_a_stream_has_every_document_once(tmp_path):
    one = stream(tmp_path)
    loader = one.loader(micro=1, seed=0, rank=0, ranks=1)
    seen: dict[int, list[int]] = {}
    tokens = 0
    for batch in islice(loader, 400):
        if batch.rows.item() in seen:
            break
        seen[batch.rows.item()] = batch.tokens[batch.mask.bool()].tolist()
        tokens += int(batch.weight)
    loader.close()
    assert tokens == sum(len(TOKENIZER.encode(t)) + 1 for t in TEXTS)


@pytest.mark.parametrize("name", ["tokens.bin", "starts.npy", "lengths.npy", "rows.npy", "facts.json", "sizes.json"])
def test_prepared_data_that_was_cut_short_is_prepared_again_and_said(name, tmp_path, caplog, rows):
    whole = [rows.collate([n]).tokens.tolist() for n in range(len(rows))]
    file = tmp_path / "cache" / rows.fingerprint / name
    os.truncate(file, file.stat().st_size // 2)
    again = prepare_rows(tmp_path / "cache", ["test"], lambda: tokenize(TEXTS, TOKENIZER), TOKENIZER, 16)
    assert [again.collate([n]).tokens.tolist() for n in range(len(again))] == whole
    assert "prepared data is damaged and is prepared again" in caplog.text
    assert name in caplog.text
    caplog.clear()
    prepare_rows(tmp_path / "cache", ["test"], lambda: pytest.fail("it was whole"), TOKENIZER, 16)
    assert caplog.text == ""
