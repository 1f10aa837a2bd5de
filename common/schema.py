"""Plain values from a file, JSON or YAML, as a dataclass: the one place where types and limits are checked.

A field says its limits in its type: `Annotated[int, Limits(least=1)]`.
"""

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from common.nearest import nearest

T = TypeVar("T")
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    type(None): "null",
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers that a field takes, besides being finite."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{name} {bound:,}" for name, bound in bounds.items() if math.isfinite(bound))


# What most fields take. The upper limits are far beyond use, and keep arithmetic on them quick and finite.
Count = Annotated[int, Limits(least=1, most=10**9)]
CountOrZero = Annotated[int, Limits(least=0, most=10**9)]
Weight = Annotated[float, Limits(least=0, most=10**6)]
Share = Annotated[float, Limits(above=0, below=1)]
Measured = Annotated[float, "may be NaN or infinite"]  # of a result, such as the loss of a run that diverged


def from_plain(kind: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `kind`; nested dataclasses, lists, tuples and mappings are built too.

    Types are strict: `"5"`, `5.0` and `true` are not integers. Numbers are finite, unless `Measured`, and
    within their Limits. An instance of a field's dataclass is taken as it is, its fields checked.

    Args:
        where: what the values are, before the name of a key: `model` gives `model.KEY`, `matrix FILE: ` gives
            `matrix FILE: KEY`; "": keys stand alone.

    Raises:
        ValueError: one line for a wrong type, a number out of its limits, an unknown key, with the nearest
            name, or a missing one; and whatever `__post_init__` raises.
    """
    given = _given(kind, values, where, from_plain)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in given:
            raise ValueError(f"{_at(where, field.name)} is missing; add it")
    return kind(**given)


def checked_values(kind: type, values: Any, where: str) -> dict[str, Any]:
    """`values`, still plain, once their keys and types are those of the dataclass `kind`; none need be given.

    For a part of a config that others complete. Raises ValueError as from_plain does.
    """
    return _given(kind, values, where, checked_values)


def check_fields(instance: Any, where: str) -> None:
    """Raises ValueError, one line, for a field of a dataclass that has another type or breaks its Limits."""
    kind: type = type(instance)
    for name, hint in _hints(kind).items():
        as_type(hint, getattr(instance, name), _at(where, name))


def _given(kind: type, values: Any, where: str, build: Callable[[type, Any, str], Any]) -> dict[str, Any]:
    """The given fields of `kind`, checked; `build` makes what is annotated as a dataclass."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{_is(where or 'config', values)} is not a mapping of keys to values")
    hints = _hints(kind)
    for key in values:
        if key not in hints:
            raise ValueError(f"{_at(where, key)} is not a known key; {nearest(str(key), hints)}")
    return {key: as_type(hints[key], value, _at(where, key), build) for key, value in values.items()}


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of the fields that a dataclass is built from."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _at(where: str, key: Any) -> str:
    name = key if isinstance(key, str) and key.isprintable() and len(key) <= 60 else _shown(key)
    return f"{where}.{name}" if where and not where.endswith(": ") else f"{where}{name}"


def _is(where: str, value: Any) -> str:
    return f"{where}{_shown(value)}" if where.endswith(": ") else f"{where}={_shown(value)}"


def as_type(hint: Any, value: Any, where: str, build: Callable[[type, Any, str], Any] = from_plain) -> Any:
    """`value` as the type that `hint` annotates. Raises ValueError, one line, if it is of another type."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and hint != Measured:
        number = as_type(arguments[0], value, where, build)
        for limits in arguments[1:]:
            if number not in limits:
                raise ValueError(f"{where}={_shown(value)} must be {limits}")
        return number
    if origin in (typing.Union, types.UnionType):
        return _as_one_of(arguments, value, where, build)
    if origin is typing.Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        raise ValueError(f"{where}={_shown(value)} is unknown; {nearest(str(value), map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            return build(hint, value, where)  # type: ignore[arg-type]
        check_fields(value, where)
        return value
    if origin in (list, tuple):
        return _as_sequence(origin, arguments, value, where, build)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{_is(where, value)} is not a mapping of keys to values")
        of_keys, of_items = arguments
        return {
            as_type(of_keys, key, f"key of {where}"): as_type(of_items, item, _at(where, key), build)
            for key, item in value.items()
        }
    if _fits(hint, value):
        return float(value) if hint in (float, Measured) else value
    raise ValueError(f"{where}={_shown(value)} is not {_name(hint)}")


def _as_one_of(kinds: tuple[Any, ...], value: Any, where: str, build: Callable[[type, Any, str], Any]) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    kinds = tuple(kind for kind in kinds if type(value) is kind and dataclasses.is_dataclass(kind)) or kinds
    sections = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and sections:  # the one that knows most of the keys, or the first
        kinds = (max(sections, key=lambda kind: len(_hints(kind).keys() & value.keys())),)  # type: ignore[arg-type]
    if len(kinds) == 1:
        return as_type(kinds[0], value, where, build)
    for kind in kinds:
        try:
            return as_type(kind, value, where, build)
        except ValueError:  # perhaps it is of the next kind
            continue
    raise ValueError(f"{where}={_shown(value)} is not {' or '.join(_name(kind) for kind in kinds)}")


def _as_sequence(
    origin: Any, arguments: tuple[Any, ...], value: Any, where: str, build: Callable[[type, Any, str], Any]
) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}={_shown(value)} is not a list")
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        raise ValueError(f"{where}={_shown(value)} has {len(value)} entries instead of {len(arguments)}")
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return origin(
        as_type(kind, item, f"{where}[{number}]", build)
        for number, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _fits(hint: Any, value: Any) -> bool:
    if hint == Measured:
        return type(value) is float or _fits(float, value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN
    return type(value) is hint


def _name(hint: Any) -> str:
    if hint == Measured:
        return "a number"
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if hint in _NAMES:
        return _NAMES[hint]
    kind = typing.get_origin(hint) or hint
    return "a list" if kind in (list, tuple) else "a mapping of keys to values"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4,300 digits
        return f"(a number of over {sys.get_int_max_str_digits():,} digits)"
    return text if len(text) <= 60 else text[:57] + "..."
