"""The folder of a run: which one is used, what may change in a run that goes on, and who holds it."""

import json
from dataclasses import dataclass, field, replace

import pytest
import yaml
from filelock import FileLock

from tests.command import TINY
from trainer.checkpoint.run_folder import begin, choose
from trainer.compose import compose
from trainer.config import ConfigError, InputError
from trainer.settings import BatchSizes
from trainer.stopping import Stopped


@dataclass
class Small:
    """Some settings of a run."""

    seed: int = 0
    steps: int = 10
    batch: BatchSizes = field(default_factory=lambda: BatchSizes(8, 4))


CONFIG = Small()
MADE_FROM = {"data": "abc", "tokenizer": "def", "models": {"model.path": "ghi"}}


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has begun."""
    folder = tmp_path / "run"
    with begin(folder, CONFIG, MADE_FROM, 1) as attempt:
        attempt.accept(0, 10)
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
    free = replace(CONFIG, steps=20, batch=BatchSizes(8, 2))
    assert choose(str(begun), "auto", free, MADE_FROM) == begun
    changed = replace(CONFIG, seed=1, batch=BatchSizes(16, 4))
    with pytest.raises(ConfigError) as refused:
        choose(str(begun), "auto", changed, MADE_FROM)
    assert [problem.partition(" when ")[0] for problem in refused.value.problems] == [
        "seed was 0", "batch.size was 8",
    ]  # fmt: skip
    assert all("set it back, or start afresh with resume=new" in problem for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("now", "what"),
    [
        ({"data": "xyz"}, "the data"),
        ({"tokenizer": "xyz"}, "the tokenizer"),
        ({"models": {"model.path": "xyz"}}, "the model in model.path"),
        (
            {"models": {"model.path": "ghi", "pipeline.reward.main.path": "new"}},
            "the model in pipeline.reward.main.path",
        ),
    ],
)
def test_other_data_or_models_under_the_same_settings_are_refused(now, what, begun):
    with pytest.raises(ConfigError, match=rf"^{what} changed since .* was begun; restore it, or start afresh"):
        choose(str(begun), "auto", CONFIG, {**MADE_FROM, **now})


def test_a_further_attempt_keeps_the_identity_and_is_recorded(begun):
    first = yaml.safe_load((begun / "config.yaml").read_text())["facts"]
    with begin(begun, replace(CONFIG, steps=20), MADE_FROM, 2) as attempt:
        assert attempt.facts["identity"] == first["identity"]
        attempt.accept(10, 20)
    record = yaml.safe_load((begun / "config.yaml").read_text())
    assert record["config"]["steps"] == 20
    assert [attempt["ranks"] for attempt in record["facts"]["attempts"]] == [2]


def test_an_attempt_that_is_not_accepted_leaves_the_record_and_a_new_folder_as_they_were(begun, tmp_path):
    before = (begun / "config.yaml").read_bytes()
    with pytest.raises(RuntimeError, match="of another model"), begin(begun, replace(CONFIG, steps=20), MADE_FROM, 1):
        raise RuntimeError("of another model")
    with (
        pytest.raises(InputError, match=r"steps=6 is fewer than the 8 steps that .* has taken, .* use steps=8 or more"),
        begin(begun, replace(CONFIG, steps=6), MADE_FROM, 1) as attempt,
    ):
        attempt.accept(8, 6)
    assert (begun / "config.yaml").read_bytes() == before
    with begin(tmp_path / "new", CONFIG, MADE_FROM, 1):  # and it fails before it is accepted
        (tmp_path / "new" / "checkpoints").mkdir()
    # So the next attempt may have other settings.
    assert choose(str(tmp_path / "new"), "never", replace(CONFIG, seed=3), MADE_FROM) == tmp_path / "new"


def test_what_was_begun_while_an_attempt_waited_for_the_folder_is_compared_too(begun):
    with pytest.raises(InputError, match="seed was 0 when"), begin(begun, replace(CONFIG, seed=1), MADE_FROM, 1):
        pass


def test_a_run_of_an_earlier_release_goes_on_and_has_its_models_recorded(begun, caplog):
    record = yaml.safe_load((begun / "config.yaml").read_text())
    del record["facts"]["models"]
    (begun / "config.yaml").write_text(yaml.safe_dump(record))
    assert choose(str(begun), "auto", CONFIG, MADE_FROM) == begun
    with begin(begun, CONFIG, MADE_FROM, 1) as attempt:
        attempt.accept(0, 10)
    assert "was begun by an earlier release; its models are compared from now on" in caplog.text
    assert yaml.safe_load((begun / "config.yaml").read_text())["facts"]["models"] == MADE_FROM["models"]


def test_a_run_whose_record_names_no_kinds_goes_on_and_it_is_said(tmp_path, caplog):
    run = compose([*TINY, "steps=2"])
    with begin(tmp_path / "r", run, MADE_FROM, 1) as attempt:
        attempt.accept(0, 2)
    file = tmp_path / "r" / "config.yaml"
    before = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(without_kinds(before)))
    for times in (1, 1):  # from then on they are recorded
        with begin(tmp_path / "r", run, MADE_FROM, 1) as attempt:
            attempt.accept(0, 2)
        assert (
            caplog.text.count("whose record does not say the kind of pipeline, model, data, adapter, strategy") == times
        )
    assert yaml.safe_load(file.read_text())["config"] == before["config"]


def without_kinds(node):
    """A record as releases before 0.2 wrote it."""
    return {k: without_kinds(v) for k, v in node.items() if k != "kind"} if isinstance(node, dict) else node


def test_what_a_killed_attempt_left_is_removed_and_no_link_is_followed(begun, tmp_path):
    (tmp_path / "mine").write_text("precious")
    left = [
        "export.tmp-1a2b3c4d",
        "adapter.tmp-1a2b3c4d",
        "config.yaml.partial",
        "samples.jsonl.partial-12",
        ".shared-ab",
    ]
    (begun / left[0]).mkdir()
    (begun / left[0] / "model.safetensors").write_bytes(b"half")
    (begun / left[1]).symlink_to(tmp_path)
    (begun / left[2]).symlink_to(tmp_path / "mine")
    for name in left[3:]:
        (begun / name).touch()
    (begun / "export").mkdir()
    with begin(begun, CONFIG, MADE_FROM, 1) as attempt:
        attempt.accept(0, 10)
    assert not {path.name for path in begun.iterdir()} & set(left)
    assert (tmp_path / "mine").read_text() == "precious"
    assert (begun / "export").is_dir()


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
        pytest.raises(InputError, match="in use by another process; wait for it or use resume=new"),
        begin(begun, CONFIG, MADE_FROM, 1),
    ):
        pass
