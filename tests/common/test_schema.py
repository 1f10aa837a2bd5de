"""Plain values to dataclasses: every wrong type is one line that names the key."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from common.schema import Limits, Measured, check_fields, checked_values, from_plain


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outer:
    size: int
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    either: int | str | None = None
    section: Inner | float = 0.0
    pairs: tuple[tuple[int, float], ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    free: Any = None


def test_nested_values_are_built() -> None:
    values = {
        "size": 3,
        "inner": {"rate": 1, "names": ["a"]},
        "maybe": {},
        "either": "x",
        "pairs": [[1, 2.5], (2, 3)],
        "table": {"a": 1},
        "free": [object],
    }
    built = from_plain(Outer, values, "config")
    assert built == Outer(
        3, False, "fast", Inner(1.0, ["a"]), Inner(), "x", 0.0, ((1, 2.5), (2, 3.0)), {"a": 1}, [object]
    )
    assert type(built.inner.rate) is float


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], "config=[] is not a mapping of keys to values"),
        ({}, "config.size is missing; add it"),
        ({"size": 1, "sise": 2}, "config.sise is not a known key; did you mean 'size'?"),
        ({"size": True}, "config.size=True is not an integer"),
        ({"size": "3"}, "config.size='3' is not an integer"),
        ({"size": 3.0}, "config.size=3.0 is not an integer"),
        ({"size": None}, "config.size=None is not an integer"),
        ({"size": 1, "on": 1}, "config.on=1 is not true or false"),
        ({"size": 1, "mode": "fasst"}, "config.mode='fasst' is unknown; did you mean 'fast'?"),
        ({"size": 1, "inner": {"rate": math.nan}}, "config.inner.rate=nan is not a finite number"),
        ({"size": 1, "inner": {"rate": math.inf}}, "config.inner.rate=inf is not a finite number"),
        ({"size": 1, "inner": {"rate": True}}, "config.inner.rate=True is not a finite number"),
        ({"size": 1, "inner": {"names": "ab"}}, "config.inner.names='ab' is not a list"),
        ({"size": 1, "inner": {"names": ["a", 1]}}, "config.inner.names[1]=1 is not text"),
        ({"size": 1, "inner": None}, "config.inner=None is not a mapping of keys to values"),
        ({"size": 1, "maybe": 3}, "config.maybe=3 is not a mapping of keys to values"),
        ({"size": 1, "either": 2.5}, "config.either=2.5 is not an integer or text"),
        ({"size": 1, "section": {"rate": "x"}}, "config.section.rate='x' is not a finite number"),
        (
            {"size": 1, "section": "x"},
            "config.section='x' is not a mapping of keys to values or a finite number",
        ),
        ({"size": 1, "pairs": [[1]]}, "config.pairs[0]=[1] has 1 entries instead of 2"),
        ({"size": 1, "table": {"a": "b"}}, "config.table.a='b' is not an integer"),
        ({"size": 1, "table": {2: 1}}, "key of config.table=2 is not text"),
    ],
)
def test_wrong_values_are_one_line(values: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        from_plain(Outer, values, "config")


@dataclass(frozen=True)
class Round:
    radius: Annotated[float, Limits(above=0, most=10)] = 1.0


@dataclass(frozen=True)
class Square:
    side: Annotated[int, Limits(least=1)]
    name: str = ""


@dataclass(frozen=True)
class Shapes:
    one: Round | Square | None = None
    count: Annotated[int, Limits(least=1, most=10**9)] | None = None


def test_a_section_of_several_kinds_is_the_one_that_knows_its_keys() -> None:
    assert from_plain(Shapes, {"one": {"side": 2}}, "") == Shapes(one=Square(2))
    assert from_plain(Shapes, {"one": {}}, "") == Shapes(one=Round())
    assert from_plain(Shapes, {"one": Square(2)}, "") == Shapes(one=Square(2))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"one": {"side": 0}}, "one.side=0 must be at least 1"),
        ({"one": {"side": 1, "nam": ""}}, "one.nam is not a known key; did you mean 'name'?"),
        ({"one": {"radius": 0}}, "one.radius=0 must be above 0 and at most 10"),
        ({"one": Round(11)}, "one.radius=11 must be above 0 and at most 10"),
        ({"count": 10**10}, "count=10000000000 must be at least 1 and at most 1,000,000,000"),
        (
            {"count": 10**5000},
            "count=(a number of over 4,300 digits) must be at least 1 and at most 1,000,000,000",
        ),
        ({"one": {"radius": 10**400}}, f"one.radius=1{'0' * 56}... is not a finite number"),
        ({"a\nb": 1}, "'a\\nb' is not a known key; known: count, one"),
        (3, "config=3 is not a mapping of keys to values"),
    ],
)
def test_limits_and_keys_without_a_prefix(values: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        from_plain(Shapes, values, "")


def test_a_part_of_a_config_is_checked_without_being_built() -> None:
    assert checked_values(Outer, {"inner": {"rate": 1}}, "config") == {"inner": {"rate": 1.0}}
    with pytest.raises(ValueError, match="config.inner.rate='x' is not a finite number"):
        checked_values(Outer, {"inner": {"rate": "x"}}, "config")


def test_the_fields_of_an_instance() -> None:
    check_fields(Shapes(one=Square(2), count=3), "shapes")
    with pytest.raises(ValueError, match=re.escape("shapes.one.side=0.5 is not an integer")):
        check_fields(Shapes(one=Square(0.5)), "shapes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"size": "3"}, "matrix a.yaml: size='3' is not an integer"),
        ({"sise": 1}, "matrix a.yaml: sise is not a known key; did you mean 'size'?"),
        ({}, "matrix a.yaml: size is missing; add it"),
        (3, "matrix a.yaml: 3 is not a mapping of keys to values"),
        ({"size": 1, "inner": {"rate": "x"}}, "matrix a.yaml: inner.rate='x' is not a finite number"),
    ],
)
def test_where_may_be_a_file(values: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        from_plain(Outer, values, "matrix a.yaml: ")


@dataclass(frozen=True)
class Result:
    loss: Measured | None = None
    by_depth: dict[str, Measured] = field(default_factory=dict)


def test_a_measured_number_may_be_nan() -> None:
    built = from_plain(Result, {"loss": math.inf, "by_depth": {"1": math.nan, "2": 1}}, "result")
    assert built.loss == math.inf
    assert math.isnan(built.by_depth["1"])
    with pytest.raises(ValueError, match="^result.by_depth.1='x' is not a number$"):
        from_plain(Result, {"by_depth": {"1": "x"}}, "result")
