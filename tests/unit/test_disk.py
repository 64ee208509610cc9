"""Files: a disk that is full, closed or broken is one sentence with the file's name, whoever writes."""

import ast
import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.chats import byte_tokenizer
from tests.command import ROOT
from trainer.config import InputError
from trainer.data.templates import open_template
from trainer.disk import (
    AccessError,
    DiskError,
    disk_error,
    new_folder,
    read_text,
    save_tensors,
    write_text,
    writing,
)
from trainer.jobs.recipe import Recipe


def write_adding(file: Path) -> None:
    with writing(file), file.open("a") as stream:
        stream.write("x" * 100)


WRITERS = {
    "a text": lambda file: write_text(file, "x" * 100),
    "tensors": lambda file: save_tensors({"a": torch.zeros(100)}, file),
    "lines that are added": write_adding,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_named_with_the_file_and_the_remedy(kind, room, tmp_path):
    file = tmp_path / "old"
    file.write_text("before")
    room(50)
    with pytest.raises(DiskError) as full:
        WRITERS[kind](file)
    assert str(full.value) == f"{file} could not be written (File too large); free space there, then run again"
    assert not isinstance(full.value, InputError)
    if kind == "a text":
        assert [path.name for path in tmp_path.iterdir()] == ["old"]
        assert file.read_text() == "before"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(monkeypatch, tmp_path):
    done = []

    def fsync(descriptor):
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.partition(".partial-")[0])

    rename = Path.replace

    def replace(self, target):
        done.append("named")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "config.yaml", "a")
    assert done == ["config.yaml", "named", tmp_path.name]
    assert (tmp_path / "config.yaml").read_text() == "a"


def test_what_a_killed_process_left_beside_a_file_neither_stops_the_next_nor_is_written(tmp_path):
    (tmp_path / "other").write_text("other")
    (tmp_path / "config.yaml.partial").symlink_to(tmp_path / "other")
    write_text(tmp_path / "config.yaml", "a")
    assert (tmp_path / "config.yaml").read_text() == "a"
    assert (tmp_path / "other").read_text() == "other"


def test_what_a_killed_process_left_of_a_folder_goes_with_the_next_that_makes_it(tmp_path):
    folder = tmp_path / "export[1]"
    if not (child := os.fork()):
        with new_folder(folder) as inside:
            inside.mkdir()
            (inside / "half").write_text("x")
            os._exit(9)  # as a signal ends it: nothing is cleaned up
    os.waitpid(child, 0)
    [left] = tmp_path.glob("*.tmp-*")
    assert (left / folder.name / "half").is_file()
    (tmp_path / "export[1]2.tmp-0").mkdir()  # of another folder, and of nobody who is known
    with new_folder(folder) as inside:
        inside.mkdir()
        assert not left.exists()
        with suppress(KeyError), new_folder(folder):
            raise KeyError  # another who makes it, and gives up
        assert inside.is_dir()
        (inside / "all").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export[1]", "export[1]2.tmp-0"]
    assert [path.name for path in folder.iterdir()] == ["all"]


def test_a_text_that_is_not_utf_8_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"chat.jinja is not UTF-8 \(byte 3\); convert it with iconv$"):
        read_text(file)
    for opened in (
        lambda: open_template(str(file), byte_tokenizer()),
        lambda: Recipe.read(str(file.rename(file.with_suffix(".yaml")))),
    ):
        with pytest.raises(InputError, match="is not UTF-8"):
            opened()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        *((code, DiskError) for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)),
        *((code, AccessError) for code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG)),
        (errno.ENOENT, None), (errno.ECONNREFUSED, None), (errno.EPIPE, None),
    ],
)  # fmt: skip
def test_only_a_full_a_closed_and_a_broken_disk_are_told_apart(code, kind):
    known = disk_error(OSError(code, os.strerror(code), "runs/a"))
    assert type(known) is (kind or type(None))
    assert kind is None or str(known).startswith("runs/a c")
    # What may be well at another attempt is no mistake of the user's.
    assert isinstance(known, InputError) == (kind is AccessError)


ON_THEIR_OWN = {
    "disk.py": "this is where it is defined",
    "data/store.py": "its writers run within `prepared`",
    "data/prompts.py": "its writers run within `prepared`",
    "gpu_check/bench.py": "in a process of its own, whose end is read by another",
    "gpu_check/sections.py": "the same",
    "jobs/process.py": "a rank's log, which the rank writes",
}


def test_every_file_is_written_where_a_full_disk_is_named():
    """By a function of `trainer.disk`, or within its `writing`."""
    for file in sorted((ROOT / "trainer").rglob("*.py")):
        name = str(file.relative_to(ROOT / "trainer"))
        if name in ON_THEIR_OWN:
            continue
        tree = ast.parse(file.read_text())
        guarded = [n for n in ast.walk(tree) if isinstance(n, ast.With) and any(map(is_writing, n.items))]
        inside = {id(node) for block in guarded for node in ast.walk(block)}
        bare = [node.lineno for node in ast.walk(tree) if writes(node) and id(node) not in inside]
        assert bare == [], f"{name}: lines {bare}"


def is_writing(item: ast.withitem) -> bool:
    call = item.context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "writing"


def writes(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    opens = node.func.attr == "open" and any(set("wax") & set(mode) and len(mode) <= 3 for mode in modes)
    return node.func.attr in ("write_text", "write_bytes", "export_chrome_trace") or opens
