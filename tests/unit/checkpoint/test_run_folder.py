"""The folder of a run: which one is used, what may change in a run that goes on, and who holds it."""

import json
from dataclasses import dataclass, field

import pytest
import yaml
from filelock import FileLock

from trainer.checkpoint.run_folder import begin, choose, defaults, differences
from trainer.config import ConfigError
from trainer.parallel.distributed import RankError
from trainer.stopping import Stopped

CONFIG = {"seed": 0, "steps": 10, "batch": {"size": 8, "micro": 4}}
MADE_FROM = {"data": "abc", "tokenizer": "def"}


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has begun."""
    folder = tmp_path / "run"
    with begin(folder, CONFIG, MADE_FROM, 1):
        pass
    return folder


def test_a_folder_that_is_free_is_used_and_nothing_is_created(tmp_path):
    for policy in ("auto", "new", "never"):
        assert choose(str(tmp_path / "run"), policy, CONFIG, MADE_FROM) == tmp_path / "run"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_is_continued_left_alone_or_refused(begun):
    assert choose(str(begun), "auto", CONFIG, MADE_FROM) == begun
    assert choose(str(begun), "new", CONFIG, MADE_FROM) == begun.with_name("run-2")
    with pytest.raises(ConfigError, match="holds a run already and resume=never; use another run_dir, or resume=new"):
        choose(str(begun), "never", CONFIG, MADE_FROM)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not a run directory; use another run_dir, or resume=new"):
        choose(str(tmp_path), "auto", CONFIG, MADE_FROM)


def test_what_a_launcher_leaves_before_the_run_does_not_make_the_folder_taken(tmp_path):
    (tmp_path / "logs").mkdir()
    assert choose(str(tmp_path), "never", CONFIG, MADE_FROM) == tmp_path


def test_a_run_that_goes_on_may_change_how_the_work_is_done_but_not_what_is_computed(begun):
    free = {**CONFIG, "steps": 20, "batch": {"size": 8, "micro": 2}}
    assert choose(str(begun), "auto", free, MADE_FROM) == begun
    changed = {**CONFIG, "seed": 1, "batch": {"size": 16, "micro": 4}}
    with pytest.raises(ConfigError) as refused:
        choose(str(begun), "auto", changed, MADE_FROM)
    assert [problem.partition(" when ")[0] for problem in refused.value.problems] == [
        "seed was 0", "batch.size was 8",
    ]  # fmt: skip
    assert all("set it back, or start afresh with resume=new" in problem for problem in refused.value.problems)


def test_other_data_under_the_same_settings_is_refused(begun):
    with pytest.raises(ConfigError, match=r"the data changed since .* was begun; restore it, or start afresh"):
        choose(str(begun), "auto", CONFIG, {**MADE_FROM, "data": "xyz"})


def test_a_further_attempt_keeps_the_identity_and_is_recorded(begun):
    first = yaml.safe_load((begun / "config.yaml").read_text())["facts"]
    with begin(begun, {**CONFIG, "steps": 20}, MADE_FROM, 2) as facts:
        assert facts["identity"] == first["identity"]
    record = yaml.safe_load((begun / "config.yaml").read_text())
    assert record["config"]["steps"] == 20
    assert [attempt["ranks"] for attempt in record["facts"]["attempts"]] == [2]


def test_a_run_that_stops_early_leaves_a_marker_until_it_goes_on(begun):
    with pytest.raises(Stopped), begin(begun, CONFIG, MADE_FROM, 1):
        raise Stopped(3, 10, "SIGTERM")
    assert json.loads((begun / "stopped.json").read_text()) == {"step": 3, "last": 10, "reason": "SIGTERM"}
    with begin(begun, CONFIG, MADE_FROM, 1):
        assert not (begun / "stopped.json").exists()


def test_a_folder_that_another_process_holds_is_refused(begun, monkeypatch):
    monkeypatch.setattr("trainer.checkpoint.run_folder.LOCK_TIMEOUT", 0.1)
    with (
        FileLock(begun / ".lock"),
        pytest.raises(RankError, match="in use by another process; wait for it or use resume=new"),
        begin(begun, CONFIG, MADE_FROM, 1),
    ):
        pass


@dataclass
class Inner:
    rate: float = 0.1
    names: list = field(default_factory=list)


@dataclass
class Outer:
    path: str
    inner: Inner = field(default_factory=Inner)


def test_defaults_are_those_of_the_settings_that_differ():
    assert defaults(Outer("x")) == {"path": None}
    assert defaults(Outer("x", Inner(0.2, ["a"]))) == {"path": None, "inner.rate": 0.1, "inner.names": []}


def test_a_setting_that_the_record_does_not_know_is_no_difference():
    assert list(differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "new": 4}})) == [("b.c", 2, 3)]
