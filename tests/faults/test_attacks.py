"""31 attacks on the newest checkpoint of a run: each is named and passed over, and the run goes on from the one before."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.small_run import Run, same
from trainer.checkpoint.folder import MANIFEST, verify

FILE = "rank-00000-000.safetensors"
Attack = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints after the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    run = Run(folder, keep=0)
    for first, last in ((1, 2), (3, 4)):
        run.steps(first, last)
        run.checkpointer.save(last)
    return folder


def forged(change: Callable[[dict], Any]) -> Attack:
    """A manifest with other content and the digest that belongs to it: what another release, or somebody, might write."""

    def attack(folder: Path) -> None:
        body = json.loads((folder / MANIFEST).read_text())["body"]
        change(body)
        text = json.dumps(body, sort_keys=True)
        document = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
        (folder / MANIFEST).write_text(json.dumps(document))

    return attack


def written(name: str, content: bytes) -> Attack:
    return lambda folder: (folder / name).write_bytes(content)


def changed(name: str, change: Callable[[bytes], bytes]) -> Attack:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def linked(name: str, target: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return attack


def replaced_by_folder(name: str) -> Attack:
    def attack(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return attack


def renamed(to: str) -> Attack:
    """The manifest names a file elsewhere, which is there."""

    def change(body: dict) -> None:
        [facts] = body["files"].values()
        body["files"] = {to: facts}
        body["fragments"] = [[to, *row[1:]] for row in body["fragments"]]

    return forged(change)


ATTACKS: dict[str, Attack] = {
    "the manifest is a folder": replaced_by_folder(MANIFEST),
    "the manifest is a loop of links": linked(MANIFEST, MANIFEST),
    "the manifest is a link to nowhere": linked(MANIFEST, "nowhere"),
    "the manifest cannot be read (EIO)": linked(MANIFEST, "/proc/self/mem"),
    "the manifest is gone": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest is empty": written(MANIFEST, b""),
    "the manifest is NULs": written(MANIFEST, bytes(500)),
    "the manifest is cut": changed(MANIFEST, lambda data: data[:300]),
    "the manifest is no UTF-8": written(MANIFEST, b'{"body": "\xff\xfe"}'),
    "the manifest is nested too deep": written(MANIFEST, b"[" * 100_000),
    "the manifest is a list": written(MANIFEST, b"[]"),
    "the manifest has a number of too many digits": written(MANIFEST, b'{"body": ' + b"1" * 9999 + b"}"),
    "the manifest holds half of an emoji": written(MANIFEST, b'{"body": {"a": "\\ud83d"}, "sha256": ""}'),
    "one figure of the manifest differs": changed(MANIFEST, lambda data: data.replace(b'"step": 4', b'"step": 5')),
    "another format": forged(lambda body: body.update(format=3)),
    "a box is larger than its tensor": forged(lambda body: body["fragments"][0].__setitem__(4, [[0, 99], [0, 8]])),
    "a fragment is named twice": forged(lambda body: body["fragments"].append(body["fragments"][0])),
    "a field of another release": forged(lambda body: body.update(compression="zstd")),
    "a field is missing": forged(lambda body: body.pop("engine")),
    "fragments have another form": forged(lambda body: body.update(fragments=[["a", "b"]])),
    "fragments are a number": forged(lambda body: body.update(fragments=3)),
    "files are a list": forged(lambda body: body.update(files=[FILE])),
    "a file without a digest": forged(lambda body: body["files"][FILE].pop("sha256")),
    "a size that is no number": forged(lambda body: body["files"][FILE].update(bytes="many")),
    "files that are named nowhere": forged(lambda body: body.update(files={})),
    "a file of the other checkpoint": renamed(f"../step-00000002/{FILE}"),
    "a file by its absolute path": renamed("/etc/hostname"),
    "the tensors are a folder": replaced_by_folder(FILE),
    "the tensors are a loop of links": linked(FILE, FILE),
    "the tensors cannot be read (EIO)": linked(FILE, "/proc/self/mem"),
    "the tensors are of the other checkpoint": lambda f: shutil.copy(f.with_name("step-00000002") / FILE, f / FILE),
    "the tensors are followed by more": changed(FILE, lambda data: data + b"\0"),
    "a bit of the tensors' header differs": changed(FILE, lambda data: bytes([data[0] ^ 1]) + data[1:]),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attacked_checkpoint_is_named_and_passed_over(kind, saved, tmp_path, caplog):
    shutil.copytree(saved, tmp_path / "c")
    ATTACKS[kind](tmp_path / "c" / "step-00000004")
    run, before = Run(tmp_path / "c", seed=9), Run(tmp_path / "before", seed=9)
    assert run.checkpointer.restore() == 2
    shutil.copytree(saved / "step-00000002", tmp_path / "before" / "step-00000002")
    before.checkpointer.restore()
    assert same(run.state(), before.state())
    assert "checkpoint step-00000004 is damaged and is passed over: " in caplog.text
    assert verify(tmp_path / "c" / "step-00000004")
    # Trained on and saved again, it takes the name, and what was attacked is kept.
    run.steps(3, 4)
    run.checkpointer.save(4)
    assert verify(tmp_path / "c" / "step-00000004") == []
    assert len(list((tmp_path / "c").glob("step-00000004.damaged-*"))) == 1
