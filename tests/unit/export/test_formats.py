"""Other formats of a finished folder: written whole or not at all, with lineage and cost; refused in a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.chats import byte_tokenizer, write_jsonl
from tests.ranks import on_ranks
from tests.small_folder import write_folder
from trainer.data.corpus import Corpus, TextData
from trainer.data.store import Span
from trainer.export import formats
from trainer.export.cost import Heldout
from trainer.export.cost_table import table_lines
from trainer.export.export_rows import calibration_rows, heldout_of, scattered, sequences
from trainer.export.format_folder import write_format, write_formats
from trainer.export.formats import FORMATS, ExportFormat, folder_problems, model_problems, name_problems
from trainer.export.hugging_face import Export
from trainer.models.header import read_shape
from trainer.models.hf_format import WeightFiles
from trainer.models.lora import Full
from trainer.parallel import distributed

HELDOUT = Heldout([[Span("", [65, 66, 67, 68])], [Span("", [70, 71])]])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "model")


def record(folder: Path) -> dict:
    return json.loads((folder / "onecurve.json").read_text())


def said() -> tuple[list[str], object]:
    lines: list[str] = []
    return lines, lines.extend


def test_a_format_is_written_with_its_lineage_and_what_it_cost(source, tmp_path):
    lines, say = said()
    write_formats(source, {"bf16": tmp_path / "out" / "bf16"}, [], HELDOUT, say)
    out = tmp_path / "out" / "bf16"
    facts, stored = record(out), load_file(out / "model.safetensors")
    assert facts["parents"] == {"source": WeightFiles(source).fingerprint()}
    assert (facts["format"], facts["calibration"], facts["remarks"]) == ("bf16", None, [])
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    cost = facts["cost"]
    assert 0 < cost["kl"] < 1e-4  # weights of 0.02 rounded to 8 bits: logits differ by some thousandths
    assert cost["size"] == (out / "model.safetensors").stat().st_size
    # 16 bits and the file's header, of a model of some 6,000 weights.
    assert 16 < cost["bits_per_weight"] < 20
    assert 32 < cost["original_bits_per_weight"] < 36
    assert [path.name for path in out.parent.iterdir()] == ["bf16"]
    assert lines[-4:] == table_lines({"bf16": cost})


def test_what_is_made_of_a_format_has_both_in_its_lineage(source, tmp_path):
    write_format("bf16", source, tmp_path / "a", [])
    write_formats(tmp_path / "a", {"fp16": tmp_path / "b"}, [], HELDOUT, said()[1])
    fingerprint = WeightFiles(tmp_path / "a").fingerprint()
    assert record(tmp_path / "b")["parents"] == {"source": fingerprint}
    assert record(tmp_path / "b")["ancestors"][fingerprint]["format"] == "bf16"
    # Bfloat16 weights between 2**-14 and 1 are float16 numbers, too: nothing was lost.
    assert record(tmp_path / "b")["cost"]["kl"] == pytest.approx(0.0, abs=1e-9)


def calibrated(source: Path, out: Path, rows) -> list[str]:
    """A format that needs rows: it writes how many there were."""
    formats.write_copy(torch.float32, source, out, rows)
    return [f"{len(rows)} rows"]


COUNTED = ExportFormat(calibrated, calibrated=True)


def test_the_same_format_of_the_same_model_is_not_written_twice(source, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "counted", COUNTED)
    out = tmp_path / "export-counted"
    write_formats(source, {"counted": out}, [[1, 2]], HELDOUT, said()[1])
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    lines, say = said()
    write_formats(source, {"counted": out}, [[1, 2]], HELDOUT, say)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert lines == table_lines({"counted": record(out)["cost"]})
    # Other rows to calibrate on: what was there is kept.
    write_formats(source, {"counted": out}, [[1, 2], [3]], HELDOUT, say)
    assert record(out)["calibration"]["tokens"] == 3
    assert record(out)["remarks"] == ["2 rows"]
    assert f"{out}: 2 rows" in lines
    assert [record(folder)["calibration"]["rows"] for folder in sorted(tmp_path.iterdir())] == [2, 1]


def test_a_format_that_holds_it_already_is_measured_on_rows_that_are_new(source, tmp_path):
    out = tmp_path / "bf16"
    write_formats(source, {"bf16": out}, [], None, said()[1])
    assert "kl" not in record(out)["cost"]
    weights = (out / "model.safetensors").stat().st_mtime_ns
    write_formats(source, {"bf16": out}, [], HELDOUT, said()[1])
    assert (record(out)["cost"]["tokens"], (out / "model.safetensors").stat().st_mtime_ns) == (4, weights)


def broken(source: Path, out: Path, rows) -> list[str]:
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device", str(out / "model.safetensors"))


def test_a_format_that_fails_leaves_nothing_behind(source, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "broken", ExportFormat(broken))
    with pytest.raises(OSError, match="No space left"):
        write_format("broken", source, tmp_path / "out", [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        write_format("bf16", source, tmp_path / "out", [])


def test_a_name_that_is_no_format_is_refused_with_what_was_meant(monkeypatch):
    monkeypatch.setitem(FORMATS, "far", ExportFormat(calibrated, packages=("torch", "no_such_package"), extra="gguf"))
    assert list(name_problems(["bf61", "qqqqqq", "far", "bf16", "bf16"], "export.formats")) == [
        "export.formats: bf61 is no format; did you mean bf16?",
        f"export.formats: qqqqqq is no format; use {', '.join(FORMATS)}",
        "export.formats: far needs no_such_package, not installed here; pip install 'onecurve[gguf]'",
        "export.formats names bf16 2 times; name it once",
    ]


def test_what_a_format_cannot_hold_is_refused_by_shape_alone(source, tmp_path, monkeypatch):
    def odd(architecture, tokenizer):
        if architecture.hidden_size % 32:
            yield f"hidden_size={architecture.hidden_size} is no multiple of 32"

    monkeypatch.setitem(FORMATS, "odd", ExportFormat(calibrated, problems=odd))
    sentence = "export.formats: odd: hidden_size=16 is no multiple of 32"
    assert list(model_problems(["odd", "bf16"], read_shape(source), byte_tokenizer(), "export.formats")) == [sentence]
    assert list(folder_problems(["odd"], source, "--format")) == [sentence.replace("export.formats", "--format")]
    wide = replace(read_shape(source), hidden_size=32)
    assert list(Export(formats=["odd"]).validate(wide, byte_tokenizer(), Full())) == []


# ---- rows


def test_a_sequence_that_shares_its_beginning_is_compared_with_all_of_it():
    unit = [
        Span("", [1, 2, 3, 4], [False, False, True, True]),
        Span("", [2, 9, 8], [False, True, True], 1),
        Span("", [7], None, 2),
    ]
    assert [(span.ids, span.trained) for span in sequences(unit)] == [
        ([1, 2, 3, 4], [False, False, True, True]),
        ([1, 2, 9, 8], [False, False, True, True]),
        ([1, 2, 7], [False, False, False]),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Documents of 1 to 39 letters, in rows of 40; a third of them in a second held-out source."""
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": chr(65 + n % 26) * (n + 1)} for n in range(39)]
    files = [write_jsonl(folder / name, rows) for name, rows in (("a.jsonl", texts), ("b.jsonl", texts[::3]))]
    return TextData(train=[str(files[0])], eval=[str(f) for f in files], cache=str(folder / "cache")).open(
        byte_tokenizer(), 40, 0
    )


def test_every_unit_is_taken_once_and_the_first_ones_come_from_all_over(corpus):
    parts = list(corpus.heldout.values())
    units = [tuple(tuple(span.ids) for span in unit) for unit in scattered(parts)]
    assert sorted(units) == sorted(tuple(tuple(s.ids) for s in p.spans(n)) for p in parts for n in range(len(p)))
    assert units[: len(parts[0])] != [tuple(tuple(s.ids) for s in parts[0].spans(n)) for n in range(len(parts[0]))]


def test_rows_that_calibrate_are_the_same_for_everyone_and_cut(corpus, monkeypatch):
    rows = calibration_rows(corpus.train)
    assert rows == calibration_rows(corpus.train)
    assert sum(map(len, rows)) == sum(n + 3 for n in range(39))  # with BOS and EOS
    monkeypatch.setattr("trainer.export.export_rows.CALIBRATION_ROWS", 5)
    monkeypatch.setattr("trainer.export.export_rows.CALIBRATION_LENGTH", 4)
    short = calibration_rows(corpus.train)
    assert [row[:4] for row in rows[:5]] == short


def test_the_number_of_held_out_tokens_is_what_was_asked_for(corpus):
    few = heldout_of(corpus, 100, 8)
    sizes = [sum(len(span.ids) for span in unit) for unit in few.units]
    assert sum(sizes[:-1]) < 100 <= sum(sizes)
    assert heldout_of(corpus, 0, 8) is None
    assert heldout_of(replace(corpus, heldout={}), 100, 8) is None
    assert heldout_of(corpus, 10**9, 8).digest != few.digest


# ---- ranks


def on_both(folder: str, data: str) -> list:
    corpus = TextData(train=[data], eval=[data], cache=f"{folder}/cache").open(byte_tokenizer(), 40, 0)
    lines: list[str] = []
    try:
        Export(formats=["bf16"]).write_formats(Path(folder), corpus, 8, lines.extend)
        Export(formats=["bf16"]).write_formats(Path(folder) / "nowhere", corpus, 8, lines.extend)
    except Exception as error:
        lines.append(type(error).__name__)
    return [distributed.world().is_main, len(lines), lines[-1]]


def test_one_rank_writes_and_the_others_wait_and_learn_of_its_failure(tmp_path):
    write_folder(tmp_path / "export")
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "Ada paints."}] * 4)
    main, other = on_ranks(2, on_both, str(tmp_path), str(data))
    assert record(tmp_path / "export-bf16")["cost"]["tokens"] > 0
    assert (main[0], main[2]) == (True, "InputError")
    assert other == [False, 1, "InputError"]
