"""`parse` sees everything that is wrong at once, and says it in one sentence each."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto

import pytest
from omegaconf import OmegaConf

from trainer.config import ConfigError, Node, _open, _shadow, describe_field, parse, setting


class Colour(StrEnum):
    red = auto()
    blue = auto()


ESTIMATORS = {"mean": 1, "median": 2}


@dataclass
class Inner(Node):
    rate: float | None = setting(None, "a rate", above=0)
    names: list[str] = setting(list, "names")
    weights: dict[str, float] = setting(dict, "weights", least=0)

    def problems(self) -> Iterator[str]:
        if "bad" in self.names:
            yield "inner.names holds 'bad'; remove it"


@dataclass
class Outer(Node):
    steps: int = setting(5, "steps", least=1, most=100)
    colour: Colour = setting(Colour.red, "a colour")
    folder: str = setting("runs/${label}", "a folder")
    label: str = setting("x", "a label")
    flag: bool = setting(False, "a flag")
    needed: str = setting(doc="what must be given")
    inner: Inner = setting(Inner)
    estimator: str | None = setting(None, "an estimator", choices=ESTIMATORS)


def composed(**values):
    node = _open(OmegaConf.structured(_shadow(Outer)))
    return OmegaConf.merge(node, OmegaConf.create(values))


def problems_of(**values) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(composed(**values))
    return caught.value.problems


def test_a_good_configuration_becomes_typed_objects():
    outer = parse(composed(needed="a", colour="blue", inner={"rate": 1, "names": ["p"], "weights": {"a": 2}}))
    assert outer == Outer(5, Colour.blue, "runs/x", "x", False, "a", Inner(1.0, ["p"], {"a": 2.0}))
    assert isinstance(outer.inner.rate, float)


def test_all_problems_are_shown_together():
    assert problems_of(
        stepz=3, steps="many", colour="green", flag="perhaps", inner={"rat": 1.0, "rate": -1.0, "weights": {"a": -2}}
    ) == [
        "Outer has no setting 'stepz'; did you mean 'steps'?",
        "steps='many' is not an integer",
        "colour='green' is not one of red, blue",
        "flag='perhaps' is not true or false",
        "needed is required: what must be given",
        "Inner has no setting 'inner.rat'; did you mean 'inner.rate'?",
        "inner.rate=-1.0 must be above 0",
        "inner.weights=-2.0 must be at least 0",
    ]


def test_a_setting_at_the_wrong_depth_is_found_by_its_name():
    assert problems_of(needed="a", rate=2.0) == ["Outer has no setting 'rate'; did you mean 'inner.rate'?"]


def test_a_choice_is_a_name_of_its_registry_even_one_added_later(monkeypatch):
    assert problems_of(needed="a", estimator="meen") == [
        "estimator=meen is not one of mean, median; did you mean mean?"
    ]
    assert parse(composed(needed="a", estimator="median")).estimator == "median"
    monkeypatch.setitem(ESTIMATORS, "mine", 3)
    assert parse(composed(needed="a", estimator="mine")).estimator == "mine"
    [field] = [f for f in dataclasses.fields(Outer) if f.name == "estimator"]
    assert describe_field(field, str | None) == "one of mean, median, mine or null"


def test_limits_are_inclusive_where_they_say_so():
    assert parse(composed(needed="a", steps=100)).steps == 100
    assert problems_of(needed="a", steps=101) == ["steps=101 must be at most 100"]
    assert problems_of(needed="a", inner={"rate": 0.0}) == ["inner.rate=0.0 must be above 0"]


def test_a_fraction_is_no_integer_and_a_group_is_no_value():
    assert problems_of(needed="a", steps=1.5) == ["steps=1.5 is not an integer"]


def test_an_interpolation_of_nothing_is_named():
    found = problems_of(needed="a", folder="${nowhere}/x")
    assert len(found) == 1
    assert found[0].startswith("folder cannot be resolved")


def test_rules_between_settings_are_collected_too():
    assert problems_of(steps=0, needed="a", inner={"names": ["bad"]}) == [
        "steps=0 must be at least 1",
        "inner.names holds 'bad'; remove it",
    ]


def test_defaults_are_not_shared_between_two_parses():
    parse(composed(needed="a")).inner.names.append("mine")
    assert parse(composed(needed="a")).inner.names == []
