"""What of a folder is read: one split, no cards, what `datasets` saved; and what is said of the rest."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.data.sources import DataError, DataSource, OnBadRow


def texts(folder, heldout=False):
    one = DataSource(str(folder), heldout=heldout)
    assert one.problem() is None
    return list(one.documents()), list(one.notes)


def write(folder, *names):
    """Files whose only document is their name."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.table({"text": [name]}), file)
        else:
            file.write_text(name if name.endswith((".md", ".txt")) else json.dumps({"text": name}))


SNAPSHOT = (
    "README.md",
    "dataset_infos.json",
    ".gitattributes",
    "data/train-00000-of-00001.parquet",
    "data/test-0.parquet",
)
FOLDERS = {
    "a snapshot of the hub": (SNAPSHOT, [SNAPSHOT[3]], [SNAPSHOT[4]]),
    "three splits": (("train.jsonl", "validation.jsonl", "test.jsonl"), ["train.jsonl"], ["validation.jsonl"]),
    "splits that are folders": (("train/a.jsonl", "dev/a.jsonl"), ["train/a.jsonl"], ["dev/a.jsonl"]),
    "what is not named is train": (("a.jsonl", "held-out.jsonl"), ["a.jsonl"], ["held-out.jsonl"]),
    "one split alone": (("test-0.jsonl", "test-1.jsonl"), ["test-0.jsonl", "test-1.jsonl"], ["test-0.jsonl", "test-1.jsonl"]),
    "no split at all": (("a.jsonl", "b.jsonl"), ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
    "titles with such words": (("a test of it.txt", "the valid king.md"), *[["a test of it.txt", "the valid king.md"]] * 2),
    "words inside of words": (("latest.jsonl", "contest.jsonl"), *[["contest.jsonl", "latest.jsonl"]] * 2),
    "a cache beside the data": ((".cache/huggingface/x.json", "a.jsonl"), ["a.jsonl"], ["a.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_one_split_and_what_is_not_read_is_said(name, tmp_path):
    names, train, heldout = FOLDERS[name]
    write(tmp_path, *names)
    for wanted, split in ((train, False), (heldout, True)):
        read, notes = texts(tmp_path, heldout=split)
        assert read == wanted
        unread = [n for n in names if n not in wanted and not n.startswith(".")]
        assert [n for n in unread if not any(n in note for note in notes)] == []


def test_a_folder_of_training_files_is_not_measured_on(tmp_path):
    write(tmp_path, "train-0.jsonl")
    assert "has no split to measure on, only train-0.jsonl" in str(DataSource(str(tmp_path), heldout=True).problem())


def saved(folder, *texts):
    """A data set as ``save_to_disk`` of ``datasets`` writes it, a file for each text."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(texts):05}.arrow" for n in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        table = pa.table({"text": [text]})
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_what_datasets_saved_is_opened_as_it_is(tmp_path):
    saved(tmp_path / "one", "a", "b")
    assert texts(tmp_path / "one") == (["a", "b"], [])
    for split in ("train", "test"):
        saved(tmp_path / "all" / split, split)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(tmp_path / "all") == (["train"], [f"the splits test of {tmp_path / 'all'} are not read"])
    assert texts(tmp_path / "all", heldout=True)[0] == ["test"]


def test_a_saved_data_set_that_is_not_all_there_is_refused(tmp_path):
    saved(tmp_path / "one", "a", "b")
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    assert "lacks data-00001-of-00002.arrow" in str(DataSource(str(tmp_path / "one")).problem())
    (tmp_path / "one" / "state.json").write_text('{"_data_fi')
    assert "state.json is damaged" in str(DataSource(str(tmp_path / "one")).problem())
    (tmp_path / "one" / "state.json").write_text('{"_indices_files": [1]}')
    assert "save it again behind flatten_indices()" in str(DataSource(str(tmp_path / "one")).problem())
    saved(tmp_path / "all" / "train_sft", "a")
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train_sft", "train_gen"]}')
    with pytest.raises(DataError, match="has the splits train_sft, train_gen; name one of them"):
        DataSource(str(tmp_path / "all")).files()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def linked(folder, name):
    (folder / name).symlink_to(folder / "gone")


FAULTS = {
    "a link into a cache that was cleaned up": (
        lambda one: linked(one, "b.jsonl"),
        "b.jsonl link to files that are gone",
    ),
    "a clone without LFS": (lambda one: (one / "b.txt").write_bytes(POINTER), "b.txt is a pointer of Git LFS"),
    "a state that is a list": (lambda one: state(one, []), "state.json is damaged"),
    "a state that lists numbers": (lambda one: state(one, {"_data_files": [3]}), "state.json is damaged"),
    "a state that lists no names": (lambda one: state(one, {"_data_files": [{"file": "a"}]}), "state.json is damaged"),
    "a state that names a file elsewhere": (
        lambda one: state(one, {"_data_files": [{"filename": "../a.arrow"}]}),
        "state.json is damaged .*names nothing that lies beside it",
    ),
    "a saved shard that is empty": (
        lambda one: state(one, {"_data_files": [{"filename": "b.arrow"}]}),
        "b.arrow is damaged or cut off",
    ),
    "splits that are no list": (lambda one: splits(one, {"splits": 3}), "dataset_dict.json is damaged"),
    "a split that is not there": (
        lambda one: splits(one, {"splits": ["train"]}),
        "lacks train, which its dataset_dict",
    ),
    "a split that is the folder above": (lambda one: splits(one, {"splits": [".."]}), "dataset_dict.json is damaged"),
}


def state(folder, value):
    (folder / "state.json").write_text(json.dumps(value))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "b.arrow").touch()


def splits(folder, value):
    (folder / "dataset_dict.json").write_text(json.dumps(value))


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_folder_is_an_error_that_names_the_file(name, tmp_path):
    write(tmp_path, "a.jsonl")
    damage, sentence = FAULTS[name]
    damage(tmp_path)
    with pytest.raises(DataError, match=sentence) as refused:
        list(DataSource(str(tmp_path), on_bad_row=OnBadRow.skip).documents())
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shards_that_are_not_all_there_are_counted_aloud(tmp_path):
    write(tmp_path, *(f"train-{n:05}-of-00003.parquet" for n in (0, 2)), "test-00000-of-00001.parquet")
    read, notes = texts(tmp_path)
    assert len(read) == 2
    assert f"only 2 of the 3 files train-*-of-00003 are in {tmp_path}; is all of it downloaded?" in notes
    write(tmp_path, "train-00001-of-00003.parquet")
    assert len(texts(tmp_path)[1]) == 1


def test_a_name_that_is_no_file_is_not_asked_of_the_hub():
    with pytest.raises(DataError, match=r"^chats\.jsonl does not exist; give a file, a folder, or a hub id"):
        next(DataSource("chats.jsonl").rows())
