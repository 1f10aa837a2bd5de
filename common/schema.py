"""Plain values from a file, JSON or YAML, as a dataclass: the one place where their types are checked."""

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from common.nearest import nearest

T = TypeVar("T")
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "text",
    type(None): "null",
}


def from_plain(kind: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `kind`; nested dataclasses, lists, tuples and mappings are built too.

    Types are strict: `"5"`, `5.0` and `true` are not integers. Numbers are finite. An instance of a field's
    dataclass is taken as it is.

    Args:
        where: what the values are, before the name of a key: `model`.

    Raises:
        ValueError: one line for a wrong type, an unknown key, with the nearest name, or a missing one; and
            whatever `__post_init__` raises.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}={_shown(values)} is not a mapping of keys to values")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"{where}.{key} is not a known key; {nearest(str(key), fields)}")
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        if name not in values and not optional:
            raise ValueError(f"{where}.{name} is missing; add it")
    hints = typing.get_type_hints(kind)
    return kind(**{key: as_type(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def as_type(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` annotates. Raises ValueError, one line, if it is of another type."""
    if hint is Any:
        return value
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _as_one_of(arguments, value, where)
    if origin is typing.Literal:
        if value in arguments and type(value) in map(type, arguments):
            return value
        raise ValueError(f"{where}={_shown(value)} is unknown; {nearest(str(value), map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_plain(hint, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple):
        return _as_sequence(origin, arguments, value, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={_shown(value)} is not a mapping of keys to values")
        return {
            as_type(arguments[0], key, f"the key {key!r} of {where}"): as_type(
                arguments[1], item, f"{where}.{key}"
            )
            for key, item in value.items()
        }
    if _fits(hint, value):
        return float(value) if hint is float else value
    raise ValueError(f"{where}={_shown(value)} is not {_name(hint)}")


def _as_one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return as_type(kinds[0], value, where)
    for kind in kinds:
        try:
            return as_type(kind, value, where)
        except ValueError:  # perhaps it is of the next kind
            continue
    raise ValueError(f"{where}={_shown(value)} is not {' or '.join(_name(kind) for kind in kinds)}")


def _as_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}={_shown(value)} is not a list")
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if fixed and len(value) != len(arguments):
        raise ValueError(f"{where}={_shown(value)} has {len(value)} entries instead of {len(arguments)}")
    kinds = arguments if fixed else [arguments[0]] * len(value)
    return origin(
        as_type(kind, item, f"{where}[{number}]")
        for number, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _fits(hint: Any, value: Any) -> bool:
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN
    return type(value) is hint


def _name(hint: Any) -> str:
    if hint in _NAMES:
        return _NAMES[hint]
    kind = typing.get_origin(hint) or hint
    return {list: "a list", tuple: "a list", dict: "a mapping"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
