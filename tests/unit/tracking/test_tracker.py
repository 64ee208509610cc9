"""What is written where, and what a resumed run does with lines of an earlier attempt."""

import json
import socket

import pytest

from trainer.disk import DiskError, read_objects
from trainer.tracking.tracker import Tracker, Tracking
from trainer.tracking.wandb import Mode, WandB, wandb_mode

FACTS = {
    "identity": "abc123",
    "git": None,
    "device": "a CPU",
    "defaults": {"batch.size": 32},
    "config": {"batch": {"size": 8}},
}
STEP = {"loss": 2.0, "lr": 0.1, "tokens": 64.0, "tokens_per_second": 10.0, "mfu": 0.1, "skipped": 0.0}


def tracker(folder, *, done: int = 0, main: bool = True, every: int = 1, **config) -> Tracker:
    config.setdefault("tensorboard", False)
    config.setdefault("wandb", WandB(mode=Mode.disabled))
    tracking = Tracking(every=every, **config)
    return Tracker(tracking, folder, main=main, done=done, last=9, facts=FACTS)


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_is_one_step_and_counts_are_whole_numbers(tmp_path):
    with tracker(tmp_path) as t:
        t.step(1, STEP)
        t.log(1, {"eval/loss": 1.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"tokens": 64,' in text
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **STEP}, {"step": 1, "eval/loss": 1.5}]
    assert t.latest == {**STEP, "eval/loss": 1.5}


def test_other_ranks_write_nothing(tmp_path):
    with tracker(tmp_path, main=False) as t:
        t.step(1, STEP)
        t.table(1, "samples", [{"prompt": "a", "completion": "b"}])
    assert list(tmp_path.iterdir()) == []


def test_only_every_nth_step_and_the_last_are_written(tmp_path):
    with tracker(tmp_path, every=4) as t:
        for step in range(1, 10):
            t.step(step, STEP)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [4, 8, 9]


def test_a_resumed_run_replaces_what_was_written_after_its_checkpoint_and_keeps_it_aside(tmp_path):
    with tracker(tmp_path) as t:
        for step in (1, 2, 3):
            t.step(step, {**STEP, "loss": float(step)})
            t.table(step, "samples", [{"prompt": "a", "completion": str(step)}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with tracker(tmp_path, done=2) as t:
        t.step(3, {**STEP, "loss": 33.0})
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 33]
    aside = (tmp_path / "metrics.replaced.jsonl").read_text().splitlines()
    assert json.loads(aside[0])["loss"] == 3
    assert aside[1] == '{"step": 4, "lo'
    assert [line["completion"] for line in lines(tmp_path / "samples.jsonl")] == ["1", "2"]


UNUSUAL = "line\u2028paragraph\u2029next\u0085tab\x1c, half an emoji: \ud83d"
"""What splitlines() takes for ends of lines, and what is no UTF-8."""


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"step": 2, "completion": "\xe2\x80',
        b"\0" * 40 + b"\n",
        b"[1]\n",
        b'{"no": "step"}\n',
        b"[" * 9999 + b"\n",
    ],
)
def test_any_text_comes_back_and_no_damage_keeps_a_run_from_going_on(damage, tmp_path, caplog):
    with tracker(tmp_path) as t:
        t.table(1, "samples", [{"prompt": UNUSUAL, "completion": "1"}])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(damage)
    for done in (2, 3):  # again, when what was damaged is gone
        with tracker(tmp_path, done=done) as t:
            t.table(done, "samples", [{"prompt": UNUSUAL, "completion": str(done)}])
    rows = read_objects(tmp_path / "samples.jsonl")
    assert [(row["step"], row["prompt"], row["completion"]) for row in rows] == [
        (1, UNUSUAL, "1"), (2, UNUSUAL, "2"), (3, UNUSUAL, "3"),
    ]  # fmt: skip
    said = "samples.jsonl: 1 damaged line(s) were moved to samples.replaced.jsonl"
    assert caplog.text.count(said) == bool(damage)
    if damage:
        assert (tmp_path / "samples.replaced.jsonl").read_bytes().rstrip(b"\n") == damage.rstrip(b"\n")


def test_a_run_that_begins_again_has_no_line_of_step_0_twice(tmp_path):
    for _ in range(2):  # killed before its first checkpoint
        with tracker(tmp_path) as t:
            t.log(0, {"eval/loss": 3.0})
            t.table(0, "errors", [{"prompt": "a", "completion": "b"}])
            t.step(1, STEP)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0, 1]
    assert [line["step"] for line in lines(tmp_path / "errors.jsonl")] == [0]
    assert [line["step"] for line in lines(tmp_path / "metrics.replaced.jsonl")] == [0, 1]


def test_tensorboard_has_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracker(tmp_path, tensorboard=True) as t:
        t.step(1, STEP)
        t.step(2, {**STEP, "loss": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_wandb_offline_continues_the_same_run(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for done in (0, 1):
        with tracker(tmp_path, done=done, wandb=WandB(mode=Mode.offline)) as t:
            config = t._sinks[1]._run.config
            assert (config["batch"]["size"], config["run"]["device"], "defaults" in config["run"]) == (
                8,
                "a CPU",
                False,
            )
            t.step(done + 1, STEP)
            t.table(done + 1, "samples", [{"prompt": "a", "completion": "b"}])
    kept = sorted(p.name for p in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(kept) == 2
    assert all("-abc123" in name for name in kept)


def test_a_server_that_does_not_answer_neither_ends_nor_stalls_a_run(tmp_path, monkeypatch, caplog):
    with socket.socket() as silent:
        # It takes connections and says nothing, which is worse than one that refuses them.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        with tracker(tmp_path, wandb=WandB(mode=Mode.online, timeout=2)) as t:
            t.step(1, STEP)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **STEP}]
    [kept] = (tmp_path / "wandb").glob("offline-run-*-abc123")
    assert next(kept.glob("*.wandb")).stat().st_size > 0
    assert "this attempt is recorded offline and uploaded when the run ends or continues" in caplog.text
    assert f"wandb sync {kept}" in caplog.text


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        (Mode.auto, {}, "offline"),
        (Mode.auto, {"WANDB_API_KEY": "k"}, "online"),
        (Mode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        (Mode.online, {"WANDB_MODE": "offline"}, "online"),
    ],
)
def test_wandb_is_online_only_with_a_key(mode, environment, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(mode) == expected


ROW = {"prompt": "a", "completion": "b" * 100}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metrics", lambda t: t.step(1, STEP)),
        ("samples", lambda t: t.table(1, "samples", [ROW])),
        ("histograms", lambda t: t.histograms(1, {"eval/loss": [1.0, 2.0]})),
    ],
)
def test_a_full_disk_is_named_with_the_file_that_was_written(name, write, room, tmp_path):
    wanted = rf"^{tmp_path}/{name}.jsonl could not be written \(File too large\); free space there, then run again$"

    def run():
        with tracker(tmp_path, report=False) as t:
            room(60)
            write(t)

    with pytest.raises(DiskError, match=wanted):
        run()


@pytest.mark.parametrize("first", [None, ValueError("what ended the run")])
def test_a_disk_that_is_full_at_the_end_does_not_hide_what_ended_the_run(first, room, tmp_path):
    wanted = (DiskError, rf"^{tmp_path} could not be written") if first is None else (ValueError, "what ended the run")

    def run():
        with tracker(tmp_path, report=False, tensorboard=True) as t:
            room(300)  # for a line of metrics, not for TensorBoard's of the same step
            t.step(1, STEP)
            if first is not None:
                raise first

    with pytest.raises(wanted[0], match=wanted[1]):
        run()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, **STEP}]


def test_a_run_says_its_last_step_as_data(tmp_path):
    with tracker(tmp_path, done=2):
        pass
    assert json.loads((tmp_path / "progress.json").read_text()) == {"done": 2, "last": 9}


def test_an_evaluation_without_values_prints_no_empty_line(tmp_path, capsys):
    with tracker(tmp_path) as t:
        t.log(0, {})
        t.log(0, {"eval/loss": 1.5})
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0")] == [
        "step 0: eval/loss 1.5"
    ]


def test_the_console_begins_with_the_run_and_ends_with_what_to_do_next(tmp_path, capsys):
    with tracker(tmp_path, done=2) as t:
        t.table(3, "samples", [{"prompt": "A long story. " * 20 + "Who?", "completion": "Ada. " * 100, "ended": True}])
        t.log(3, {})
        (tmp_path / "export").mkdir()
        t.next_command = "onecurve chat EXPORT"
    first, sample, *_, done, then = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}: continuing after step 2 of 9 on a CPU; logged to metrics.jsonl"
    # The last 60 characters of the question and the first 200 of the answer.
    assert sample.startswith("samples after step 3: '...")
    assert sample.endswith(f"Who?' -> '{'Ada. ' * 40}...'")
    assert done == f"done: {tmp_path}/export, {tmp_path}/report.html"
    assert then == "next: onecurve chat EXPORT"
    assert (tmp_path / "metrics.jsonl").read_text() == ""
