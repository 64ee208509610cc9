"""Forty-four faults of files: each is one sentence that names the file, and none is a shorter or another corpus."""

import codecs
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from trainer.data.sources import DataError, DataSource, OnBadRow

TEXTS = [f"Ada paints {n} red drums in Rome." for n in range(60)]
LINES = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
JSONL = b"".join(LINES)
ARRAY = json.dumps([{"text": text} for text in TEXTS], indent=1).encode()
TABLE = pa.table({"text": TEXTS})
GZ = gzip.compress(JSONL)
FRAME = zstandard.ZstdCompressor(write_checksum=True)
ZST = FRAME.compress(JSONL)


def parquet(table: pa.Table = TABLE) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, write_page_checksum=True, compression="none")
    return out.getvalue()


def arrow(new=pa.ipc.new_stream) -> bytes:
    out = io.BytesIO()
    with new(out, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=20)
    return out.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


def with_line(line: bytes) -> bytes:
    return b"".join([LINES[0], line, *LINES[1:]])


PARQUET, STREAM, FILE = parquet(), arrow(), arrow(pa.ipc.new_file)
NO_TEXT = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"b\xffd"]).buffers())})

DAMAGED = {
    "gzip cut in half": ("a.jsonl.gz", GZ[: len(GZ) // 2], "damaged or cut off"),
    "gzip without its last byte": ("a.jsonl.gz", GZ[:-1], "damaged or cut off"),
    "gzip with a flipped bit": ("a.jsonl.gz", flipped(GZ, len(GZ) // 2), "damaged or cut off"),
    "gzip with a wrong check sum": ("a.jsonl.gz", flipped(GZ, len(GZ) - 6), "damaged or cut off"),
    "gzip with something behind it": ("a.jsonl.gz", GZ + b"<html>", "damaged or cut off"),
    "text that is called gzip": ("a.jsonl.gz", JSONL, "damaged or cut off"),
    "gzip of no bytes": ("a.jsonl.gz", b"", "it has 0 bytes"),
    "gzip of a text cut in half": ("a.txt.gz", GZ[: len(GZ) // 2], "damaged or cut off"),
    "zstd cut in half": ("a.jsonl.zst", ZST[: len(ZST) // 2], "its last frame has no end"),
    "zstd without its last byte": ("a.jsonl.zst", ZST[:-1], "its last frame has no end"),
    "zstd cut in its second frame": ("a.jsonl.zst", ZST + ZST[:40], "its last frame has no end"),
    "zstd with a flipped bit": ("a.jsonl.zst", flipped(ZST, len(ZST) // 2), "damaged or cut off"),
    "zstd with a flipped first byte": ("a.jsonl.zst", flipped(ZST, 0), "damaged or cut off"),
    "zstd with something behind it": ("a.jsonl.zst", ZST + b"<html>", "damaged or cut off"),
    "text that is called zstd": ("a.jsonl.zst", JSONL, "damaged or cut off"),
    "zstd of no bytes": ("a.jsonl.zst", b"", "it has 0 bytes"),
    "zstd of a text cut in half": ("a.txt.zst", ZST[: len(ZST) // 2], "its last frame has no end"),
    "Parquet cut in half": ("a.parquet", PARQUET[: len(PARQUET) // 2], "damaged or cut off"),
    "Parquet without its last byte": ("a.parquet", PARQUET[:-1], "damaged or cut off"),
    "Parquet with a flipped bit in a page": ("a.parquet", flipped(PARQUET, 200), "damaged or cut off"),
    "Parquet with a flipped bit at its end": ("a.parquet", flipped(PARQUET, len(PARQUET) - 6), "damaged or cut off"),
    "text that is called Parquet": ("a.parquet", JSONL, "damaged or cut off"),
    "Parquet of no bytes": ("a.parquet", b"", "damaged or cut off"),
    "Arrow stream cut in half": ("a.arrow", STREAM[: len(STREAM) // 2], "its stream has no end"),
    "Arrow stream cut between batches": ("a.arrow", STREAM[:-8], "its stream has no end"),
    "Arrow stream of no bytes": ("a.arrow", b"", "its stream has no end"),
    "Arrow file cut in half": ("a.arrow", FILE[: len(FILE) // 2], "damaged or cut off"),
    "text that is called Arrow": ("a.arrow", JSONL, "its stream has no end"),
    "UTF-16": ("a.jsonl", JSONL.decode().encode("utf-16"), "is UTF-16, not UTF-8; convert it with iconv -f UTF-16"),
    "UTF-16, big end first": ("a.txt", codecs.BOM_UTF16_BE + "Ada".encode("utf-16-be"), "is UTF-16, not UTF-8"),
    "UTF-32": ("a.json", ARRAY.decode().encode("utf-32"), "is UTF-32, not UTF-8"),
    "a JSON array cut in half": ("a.json", ARRAY[: len(ARRAY) // 2], r"a.json, line \d+: not JSON .* none of its rows"),
    "a JSON array with a byte of Latin-1": ("a.json", ARRAY.replace(b"7 red", b"\xe9"), r"a.json, line 24: not UTF-8"),
}
"""Files of which nobody knows how much is gone: an error, whatever data.on_bad_row says."""

BAD_ROWS = {
    "a row cut at the end": ("a.jsonl", b"".join(LINES) + LINES[3][:20], r"line 61: not JSON .*may be cut off here"),
    "a row of NULs": ("a.jsonl", with_line(b"\0" * 30 + b"\n"), r"line 2: not JSON"),
    "a row of Latin-1": (
        "a.jsonl",
        with_line(b'{"text": "\xe9t\xe9"}\n'),
        r"line 2: not UTF-8 \(byte 10 of the line\)",
    ),
    "half a character": (
        "a.jsonl",
        with_line(b'{"text": "cut \\ud83d"}\n'),
        r"line 2: half a character \(\\ud83d\) behind",
    ),
    "half a character in an array": (
        "a.json",
        ARRAY.replace(b"7 red", b"\\udc00", 1),
        r"row 7: half a character \(\\udc00\)",
    ),
    "a row nested too deep": ("a.jsonl", with_line(b"[" * 10**5 + b"\n"), "line 2: nested too deep"),
    "a number of 5,000 digits": (
        "a.jsonl",
        with_line(b'{"text": ' + b"9" * 5000 + b"}\n"),
        r"line 2: not JSON \(Exceeds",
    ),
    "an array in a line": ("a.jsonl", with_line(b"[1]\n"), "line 2: a JSON array, not a JSON object"),
    "a number in a line": ("a.jsonl", with_line(b"3\n"), "line 2: not a JSON object"),
    "a comma behind a row": (
        "a.jsonl",
        with_line(LINES[0][:-1] + b",\n"),
        r"line 2: not JSON \(Extra data at column 44\)",
    ),
    "a text of NULs": ("a.txt", b"good\0\0", "holds a NUL at byte 4, so it is damaged or no text"),
    "a cell that is not UTF-8": ("a.parquet", parquet(NO_TEXT), r"row 1: not UTF-8"),
}
"""Rows that can be left out, and are counted."""


def source(folder: Path, case: tuple[str, bytes, str], on_bad_row: OnBadRow) -> DataSource:
    (folder / case[0]).write_bytes(case[1])
    return DataSource(str(folder / case[0]), on_bad_row=on_bad_row)


def refusal(one: DataSource, said: str) -> None:
    with pytest.raises(DataError, match=said) as refused:
        list(one.documents())
    assert one.path in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("on_bad_row", OnBadRow)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_never_read_as_a_shorter_one(name, on_bad_row, tmp_path):
    refusal(source(tmp_path, DAMAGED[name], on_bad_row), DAMAGED[name][2])


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_parsed_is_named_or_counted(name, tmp_path):
    refusal(source(tmp_path, BAD_ROWS[name], OnBadRow.error), BAD_ROWS[name][2])
    skipping = source(tmp_path, BAD_ROWS[name], OnBadRow.skip)
    good = list(skipping.documents())
    assert good == (["good"] if name == "a cell that is not UTF-8" else [t for t in TEXTS if t in good])
    assert len(good) in ((0,) if name == "a text of NULs" else (1, 59, 60))
    assert len(skipping.skipped) == 1


FOOTER = len(PARQUET) - 8 - int.from_bytes(PARQUET[-8:-4], "little")
"""Where the part of a Parquet file begins that has no check sum."""


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl.gz", GZ, range(0, len(GZ), 6)),
        ("a.jsonl.zst", ZST, range(0, len(ZST), 5)),
        ("a.parquet", PARQUET, [*range(0, FOOTER, 40), *range(FOOTER, len(PARQUET))]),
    ],
    ids=["gzip", "zstd", "Parquet"],
)
def test_a_flipped_bit_changes_nothing_in_silence(name, content, places, tmp_path):
    for place in places:
        one = source(tmp_path, (name, flipped(content, place), ""), OnBadRow.skip)
        try:
            read = list(one.documents())
        except DataError as error:
            assert one.path in str(error)  # noqa: PT017
        else:  # what names a column has no check sum: its rows are left out, and counted
            assert read == TEXTS or len(one.skipped) == len(TEXTS) - len(read)


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", JSONL), ("a.json", ARRAY), ("a.jsonl.gz", JSONL), ("a.jsonl.zst", JSONL)]
)
def test_a_byte_order_mark_and_crlf_are_no_content(name, content, tmp_path):
    marked = codecs.BOM_UTF8 + content.replace(b"\n", b"\r\n")
    packed = {"gz": gzip.compress, "zst": FRAME.compress}.get(name.rpartition(".")[2], bytes)(marked)
    assert list(source(tmp_path, (name, packed, ""), OnBadRow.error).documents()) == TEXTS
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"Ada.")
    assert list(DataSource(str(tmp_path / "a.txt")).documents()) == ["Ada."]


def test_frames_of_zstd_that_follow_each_other_are_one_file(tmp_path):
    frames = FRAME.compress(JSONL[:500]) + FRAME.compress(JSONL[500:])
    assert list(source(tmp_path, ("a.jsonl.zst", frames, ""), OnBadRow.error).documents()) == TEXTS


@pytest.mark.parametrize("content", [STREAM, FILE], ids=["stream", "file"])
def test_both_of_arrows_formats_are_read(content, tmp_path):
    assert list(source(tmp_path, ("a.arrow", content, ""), OnBadRow.error).documents()) == TEXTS


def test_keys_that_only_other_rows_have_are_not_there_and_it_is_said(tmp_path):
    rows = [{"call": {"city": "Oslo"}, "text": "a"}, {"call": {"time": 7}, "text": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    one = DataSource(str(tmp_path / "a.parquet"))
    assert [row for _, row in one.rows()] == rows
    assert [count for note, count in one.notes.items() if "read as keys that are not there" in note] == [2]
