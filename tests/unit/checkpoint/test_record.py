"""What a run that goes on may change: every setting, every kind of every choice and every key of a mapping, one at a time."""

import dataclasses
import enum
import re
import typing

import pytest
import yaml

from tests.command import ROOT, TINY
from trainer.checkpoint.record import (
    ABSENT,
    defaults,
    differences,
    environment_digests,
    flat,
    is_free,
    plain,
    read_record,
    settings,
)
from trainer.checkpoint.run_folder import begin, refuse_changes
from trainer.compose import compose, compose_raw
from trainer.config import _SCHEMAS, ConfigError
from trainer.rl.rewards import FunctionReward
from trainer.run import Run
from trainer.secrets import without_password

OURS = {path: cls for path, cls in _SCHEMAS.items() if cls.__module__.startswith("trainer.") and "/" in path}
"""Every choice that comes with the framework, by group/name."""
ALONE = ("rollout",)
"""Schemas that are a part of another, not a choice."""
BASE = {
    "pipeline": "ppo", "model": "transformer", "data": "prompts", "adapter": "lora", "strategy": "zero2",
    "optimizer": "muon", "schedule": "wsd",
}  # fmt: skip


def instance(cls: type, **given):
    """An object of a schema, with a text where one is required."""
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default == "???" and field.name not in given and typing.get_type_hints(cls)[field.name] is str
    ]
    return cls(**dict.fromkeys(required, "some"), **given)


def run_of(**kinds: str) -> Run:
    """A configuration of these choices; nothing of it is validated."""
    nodes = {group: instance(OURS[f"{group}/{kind}"]) for group, kind in (BASE | kinds).items()}
    if hasattr(nodes["pipeline"], "reward"):
        nodes["pipeline"].reward = {"main": instance(FunctionReward, arguments={"k": 1})}
    alone = {field.name: typing.get_type_hints(Run)[field.name] for field in dataclasses.fields(Run)}
    nodes |= {name: alone[name]() for name in ("precision", "tracking")}
    return Run(**nodes)


def other(value, hint):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, enum.Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [*value, "x"]
    if isinstance(value, dict):
        return {**value, "further": 1}
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return {int: 7, float: 7.5, str: "x"}.get(options[0], {"further": 1})


def changed(node, path=""):
    """Every object that differs from ``node`` in one setting, with the setting's full name."""
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            variants = changed(value, f"{name}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            variants = [(n, {**value, k: one}) for k in value for n, one in changed(value[k], f"{name}.{k}.")]
            variants += [(f"{name}.more", {**value, "more": instance(FunctionReward)})]
        elif isinstance(value, dict):
            variants = [(f"{name}.further", other(value, None))]
            variants += [(f"{name}.{key}", {k: v for k, v in value.items() if k != key}) for key in value]
            variants += [(f"{name}.{key}", {**value, key: "other"}) for key in value]
        else:
            variants = [(name, other(value, hints[field.name]))]
        for setting, variant in variants:
            yield setting, dataclasses.replace(node, **{field.name: variant})


def refusals(before: dict, now: Run) -> list[str]:
    return [name for name, _, _ in differences(before, settings(now)) if not is_free(name)]


@pytest.mark.parametrize("choice", ["", *OURS])
def test_every_setting_is_refused_at_a_resume_or_free_as_the_page_says(choice):
    group, _, kind = choice.partition("/")
    run = run_of(**({group: kind} if group in BASE else {}))
    if group == "reward":
        run.pipeline.reward, group = {"main": instance(OURS[choice])}, "pipeline.reward"
    record, page = flat(yaml.safe_load(yaml.safe_dump(plain(run)))), documented()
    assert refusals(record, run) == []
    for name, variant in changed(run):
        if not name.startswith(f"{group}." if group else ""):
            continue
        in_page = re.sub(r"^pipeline\.reward\.\w+", "pipeline.reward.NAME", name)
        says = next(page[key] for key in (in_page, name.rpartition(".")[0], "pipeline.reward") if key in page)
        different = refusals(record, variant)
        assert says == ("refused" if different else "free"), name
        # Where there was no mapping, each of its keys is new.
        assert all(key == name or key.startswith(f"{name}.") for key in different), name


def documented() -> dict[str, str]:
    """What docs/configuration.md says of every setting at a resume."""
    rows = re.findall(
        r"^\| `([\w.]+)` \|.*\| (free|refused) \| ", (ROOT / "docs" / "configuration.md").read_text(), re.M
    )
    return dict(rows)


def test_the_page_says_it_of_every_setting():
    assert {field.name for field in dataclasses.fields(Run)} <= {name.partition(".")[0] for name in documented()}


@pytest.mark.parametrize("group", sorted(BASE))
def test_every_kind_of_a_group_is_told_from_every_other(group):
    kinds = [path.partition("/")[2] for path in OURS if path.startswith(f"{group}/")]
    runs = {kind: run_of(**{group: kind}) for kind in kinds}
    for kind in kinds:
        record = plain(runs[kind])
        for now in kinds:
            names = [name for name, _, _ in differences(flat(record), settings(runs[now])) if name != "optimizer.lr"]
            assert names == ([] if now == kind else [group]), (kind, now)


def test_a_record_of_an_earlier_release_goes_on_unless_what_it_knows_differs():
    record = {name: value for name, value in flat(plain(run_of())).items() if not name.endswith(".kind")}
    del record["schedule.floor"]  # as if it had come since
    assert refusals(record, run_of()) == []
    run = run_of()
    run.schedule.floor = 0.5
    assert list(differences(record, settings(run))) == [("schedule.floor", ABSENT, 0.5)]
    run.schedule.decay = 0.1
    assert refusals(record, run) == ["schedule.decay", "schedule.floor"]


@pytest.mark.parametrize(
    ("group", "before", "now", "fitting"),
    [
        ("schedule", "constant", "cosine", "constant"),
        ("schedule", "linear", "wsd", "linear or cosine"),
        ("adapter", "none", "lora", "none"),
        ("optimizer", "adamw", "muon", "adamw"),
    ],
)
def test_the_kind_that_a_record_of_an_earlier_release_had_is_told_by_its_settings(group, before, now, fitting):
    record = {
        name: value for name, value in flat(plain(run_of(**{group: before}))).items() if not name.endswith(".kind")
    }
    assert refusals(record, run_of(**{group: before})) == []
    [(name, old, new)] = [d for d in differences(record, settings(run_of(**{group: now}))) if d[0] != "optimizer.lr"]
    assert (name, old, new) == (group, fitting, now)


def test_a_composed_tree_has_the_settings_of_its_object():
    arguments = ["pipeline=dpo", "data=preference", "data.train=[a]", "adapter=lora", "schedule=constant", "steps=3"]
    tree = {setting.name: setting.value for setting in settings(compose_raw(arguments))}
    assert tree["schedule.kind"] == "constant"
    for more, name in ((["schedule=cosine"], "schedule"), (["+data.weights={a: 2}"], "data.weights.a")):
        assert [n for n, _, _ in differences(tree, settings(compose_raw([*arguments, *more])))] == [name]


def test_no_password_and_no_environment_variable_is_in_a_record(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    monkeypatch.setenv("MY_STEPS", "7")
    run = compose(
        [
            *TINY,
            "steps=${oc.env:MY_STEPS}",
            "data.cache=http://me:hunter2@host/x",
            "name=n-${oc.env:MY_SECRET}",
            "run_dir=r",
        ]
    )
    assert (run.steps, run.data.cache, run.name) == (7, "http://me:hunter2@host/x", "n-hunter2")
    record = plain(run)
    assert (record["steps"], record["data"]["cache"]) == ("${oc.env:MY_STEPS}", "http://***@host/x")
    assert "hunter2" not in yaml.safe_dump(record)
    with begin(tmp_path / "r", run, {}, 1) as attempt:
        attempt.accept(0, 7)
    assert "hunter2" not in (tmp_path / "r" / "config.yaml").read_text()
    refuse_changes(tmp_path / "r", run)
    # A record of an earlier release has the value itself.
    assert list(differences({**flat(record), "steps": 7}, settings(run))) == []


def test_an_environment_variable_that_changed_is_named_and_its_value_in_no_record(monkeypatch, tmp_path):
    for name, value in (("MY_RATE", "0.0123457"), ("MY_GROUP", "g")):
        monkeypatch.setenv(name, value)
    words = [*TINY, "steps=7", "run_dir=r", "optimizer.lr=${oc.env:MY_RATE}", "tracking.wandb.group=${oc.env:MY_GROUP}"]
    folder = tmp_path / "r"
    for _ in range(2):
        with begin(folder, compose(words), {}, 1) as attempt:
            attempt.accept(0, 7)
        assert "environment" not in attempt.facts
    assert list(read_record(folder / "config.yaml")["facts"]["environment"]) == ["optimizer.lr"]
    assert "0.0123457" not in (folder / "config.yaml").read_text()
    monkeypatch.setenv("MY_GROUP", "another")  # which is free to change
    refuse_changes(folder, compose(words))
    monkeypatch.setenv("MY_RATE", "0.0123458")
    with pytest.raises(ConfigError) as refused:
        refuse_changes(folder, compose(words))
    [problem] = refused.value.problems
    assert problem.startswith(
        f"optimizer.lr is ${{oc.env:MY_RATE}} as it was when {folder} was begun, but the environment"
    )
    assert "012345" not in problem


def test_digests_of_values_have_a_salt_and_leave_out_what_is_compared_by_its_content(tmp_path):
    node = Outer("secret")
    node.as_typed = {"path": "${oc.env:MY_PATH}"}
    assert environment_digests(node, "a") == environment_digests(node, "a") != environment_digests(node, "b")
    assert list(environment_digests(node, "a")) == ["path"]
    node.path = str(tmp_path)  # a folder that is there, wherever another machine has it
    assert environment_digests(node, "a") == {}


def test_a_password_in_a_url_is_left_out_and_nothing_else():
    text = "url=https://user:p@ss@host:80/v1 'git+ssh://t0ken@x/y' me@here file:///a@b http://h/a@b http://h?x=a@b"
    assert without_password(text) == (
        "url=https://***@host:80/v1 'git+ssh://***@x/y' me@here file:///a@b http://h/a@b http://h?x=a@b"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is empty"),
        ("config: {seed: [", "cannot be read (ParserError)"),
        ("\0\0\0\0", "cannot be read (ReaderError)"),
        ("- a\n- b\n", "is not the record of a run"),
        ("name: some other tool's\n", "is not the record of a run"),
        ("config: {}\nfacts: {}\n", "is not the record of a run"),
        (b"\xff\xfe\x00", "cannot be read (UnicodeDecodeError)"),
    ],
)
def test_a_damaged_record_is_one_sentence_with_the_way_out(content, why, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refused:
        read_record(file)
    [problem] = refused.value.problems
    assert problem.startswith(f"{file} {why}, so nobody can tell")
    assert problem.endswith("restore it from a backup, or start afresh with resume=new")


@dataclasses.dataclass
class Inner:
    rate: float = 0.1
    names: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Outer:
    path: str
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_defaults_are_those_of_the_settings_that_differ():
    assert defaults(Outer("x")) == {"path": None}
    assert defaults(Outer("x", Inner(0.2, ["a"]))) == {"path": None, "inner.rate": 0.1, "inner.names": []}
