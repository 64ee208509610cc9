"""``onecurve export --format``: any folder or run in other formats, with a table of what each cost."""

import json
import shutil

import pytest

from tests.chats import write_jsonl
from tests.command import TINY, Command, onecurve
from tests.small_folder import write_folder
from trainer.export import formats
from trainer.export.formats import FORMATS, ExportFormat

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHATS = [{"prompt": f"Say {word}.", "completion": word, "ideal": word} for word in ("red", "green", "blue")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A model, a reward model, and rows for both."""
    folder = tmp_path_factory.mktemp("desk")
    write_folder(folder / "model", template=TEMPLATE)
    write_folder(folder / "reward", scores=True, template=TEMPLATE)
    write_jsonl(folder / "chats.jsonl", CHATS)
    write_jsonl(folder / "texts.jsonl", [{"text": "Ada paints red drums."}] * 3)
    write_jsonl(folder / "pairs.jsonl", [{"prompt": "Say red.", "chosen": "red", "rejected": "no"}])
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONECURVE_CACHE", str(tmp_path / "cache"))


def export(desk, *arguments: str) -> tuple[int, list[str], str]:
    code, out, errors = onecurve(desk, "export", *arguments)
    return code, out.splitlines(), errors


def cost(folder) -> dict:
    return json.loads((folder / "onecurve.json").read_text())["cost"]


def test_a_folder_is_written_in_several_formats_with_a_table(desk, tmp_path):
    code, lines, errors = export(
        desk, "model", str(tmp_path / "out"), "--format", "bf16,fp16", "--data", "chats.jsonl", "--answer-tokens", "2"
    )
    assert (code, errors) == (0, "")
    head, original, bf16, fp16, measured = lines[-5:]
    assert head.split("  ")[0] == "format"
    assert [line.split()[0] for line in (original, bf16, fp16)] == ["original", "bf16", "fp16"]
    tokens = cost(tmp_path / "out" / "bf16")["tokens"]
    # Each answer with its end of turn: 3 + 5 + 4 letters and three ends.
    assert tokens == 15
    assert measured.startswith(
        f"KL(original || format) and perplexity on {tokens} held-out tokens of 3 sequences, exact"
    )
    assert cost(tmp_path / "out" / "fp16")["measured_on"] == cost(tmp_path / "out" / "bf16")["measured_on"]


@pytest.mark.parametrize(("model", "rows", "key"), [("model", "texts", "kl"), ("reward", "pairs", "score_change")])
def test_rows_are_read_as_the_model_s_own_stage_reads_them(model, rows, key, desk, tmp_path):
    code, _, errors = export(desk, model, str(tmp_path), "--format", "bf16", "--data", f"{rows}.jsonl")
    assert (code, errors) == (0, "")
    assert cost(tmp_path / "bf16")[key] > 0


def test_without_rows_only_sizes_are_said(desk, tmp_path):
    _, lines, _ = export(desk, "model", str(tmp_path), "--format", "bf16")
    assert any("only sizes are measured: there are no held-out rows" in line for line in lines)
    assert lines[-3].split() == ["format", "MB", "bits", "a", "weight"]


def test_everything_that_is_wrong_is_said_at_once_and_nothing_written(desk, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "rows", ExportFormat(formats.write_copy, calibrated=True))
    monkeypatch.setitem(FORMATS, "far", ExportFormat(formats.write_copy, packages=("no_such",), extra="quant"))
    (tmp_path / "bf16").mkdir()
    code, _, errors = export(desk, "model", str(tmp_path), "--format", "bf16,rows,far,in4", "--data", "nothing.jsonl")
    assert code == 2
    assert errors.splitlines() == [
        "This export cannot work, for 5 reasons:",
        "  - --format: far needs no_such, not installed here; pip install 'onecurve[quant]'",
        "  - --format: in4 is no format; did you mean int4?" if "int4" in FORMATS else errors.splitlines()[2],
        f"  - {tmp_path}/bf16 exists already; name another folder",
        "  - rows is calibrated on rows like those it will see; give --calibration FILE.jsonl",
        "  - --data: nothing.jsonl does not exist; give a file, a folder, or a hub id (owner/name, or owner/name:split)",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_a_folder_that_is_rounded_already_is_not_rounded_again(desk, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "rows", ExportFormat(formats.write_copy))
    shutil.copytree(desk / "model", tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    code, _, errors = export(desk, str(tmp_path / "fp8"), str(tmp_path / "out"), "--format", "rows")
    assert (code, "mxfp4" in errors) == (2, True)


def test_calibration_is_of_the_file_that_is_named(desk, tmp_path, monkeypatch):
    def write(source, out, rows):
        return [*formats.write_copy(formats.torch.float32, source, out, rows), f"{len(rows)} rows"]

    monkeypatch.setitem(FORMATS, "counted", ExportFormat(write, calibrated=True))
    code, lines, errors = export(
        desk, "model", str(tmp_path), "--format", "counted", "--calibration", "chats.jsonl", "--cost-tokens", "0"
    )
    assert (code, errors, f"{tmp_path}/counted: 3 rows" in lines) == (0, "", True)
    assert json.loads((tmp_path / "counted" / "onecurve.json").read_text())["calibration"]["rows"] == 3


def test_a_model_of_no_run_needs_a_place_to_write_to(desk):
    code, _, errors = export(desk, "model", "--format", "bf16")
    assert (code, errors) == (
        2,
        "error: model is no run's; say where to write: onecurve export model OUT --format ...\n",
    )


def test_a_run_is_measured_on_its_own_rows(tmp_path):
    Command(tmp_path, "run_dir=r", *TINY, "steps=1", "precision=fp32").finish()
    code, _, errors = export(tmp_path, "r", "--format", "bf16")
    assert (code, errors) == (0, "")
    own = cost(tmp_path / "r" / "export-bf16")
    assert own["tokens"] > 100
    code, _, errors = export(tmp_path, "r/export", "out", "--format", "bf16")
    assert (code, errors) == (0, "")
    assert cost(tmp_path / "out" / "bf16")["measured_on"] == own["measured_on"]
    shutil.move(tmp_path / "r" / "export", tmp_path / "r" / "old")
    assert (
        export(tmp_path, "r", "--format", "fp16")[2]
        == "error: r has no export/ yet; write it first: onecurve export r\n"
    )
