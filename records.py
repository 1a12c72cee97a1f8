"""Tables of JSON files as dataclasses. A key is declared once, as a field; writer and reader both follow the fields.

A field's type says what its value may be: text, numbers, ``X | None`` (null), ``tuple[X, ...]`` (a list), ``dict[str, X]`` (a
table with any keys), another dataclass (a table with these keys), or ``Any`` (taken as it is). :class:`Rule` narrows a type.
Keys that a dataclass does not declare are ignored. Standard library only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from .errors import ArtifactError, listing

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which values of a type are taken, and how a message calls them."""

    allows: Callable[[Any], bool]
    expected: str


def at_least(least: int) -> Rule:
    """Integers from ``least`` on."""
    return Rule(lambda value: bool(value >= least), f"an integer of {least} or more")


def one_of(*names: str) -> Rule:
    """One of these texts."""
    return Rule(lambda value: value in names, f"one of {', '.join(names)}")


#: A text that is not empty, and integers from 0 and from 1 on.
Name = Annotated[str, Rule(bool, "a text that is not empty")]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]


_MAY_LACK = "may lack"
#: ``OrAbsent[X] = None``: where there is nothing to say, the field is None and its key is left out.
OrAbsent = Annotated[T | None, _MAY_LACK]


def to_json(record: Any) -> Any:
    """A record as JSON values, its keys in the order of its fields."""
    if dataclasses.is_dataclass(record):
        fields = _fields(typing.cast(Any, type(record)))
        values = {name: getattr(record, name) for name in fields}
        absent = {name for name, (_, may_lack) in fields.items() if may_lack and values[name] is None}
        return {name: to_json(value) for name, value in values.items() if name not in absent}
    if isinstance(record, dict):
        return {key: to_json(value) for key, value in record.items()}
    return [to_json(value) for value in record] if isinstance(record, list | tuple) else record


def from_json(record: type[T], table: Any, *, title: str, step: str) -> T:
    """Read a record.

    Args:
        record: the dataclass.
        table: parsed JSON.
        title: what is wrong if it is, for the message.
        step: what to do then.

    Raises:
        ArtifactError: keys are missing or have values of another type or out of range; the message lists all of them.
    """
    findings: list[str] = []
    found = _table(record, table, "", findings)
    if findings:
        raise ArtifactError(listing(title, findings, step))
    return typing.cast(T, found)


@functools.cache
def _fields(record: Any) -> dict[str, tuple[Any, bool]]:
    """Per field in order: its type, and whether its key may be absent."""
    hints = typing.get_type_hints(record, include_extras=True)
    found = {}
    for field in dataclasses.fields(record):
        kind = hints[field.name]
        may_lack = typing.get_origin(kind) is Annotated and typing.get_args(kind)[1] is _MAY_LACK
        found[field.name] = (typing.get_args(kind)[0] if may_lack else kind, may_lack)
    return found


def _table(record: Any, value: Any, path: str, findings: list[str]) -> Any:
    """The record; None with findings."""
    if not isinstance(value, dict):
        findings.append(f"{path or 'the file'} is {_shown(value)}; expected a table")
        return None
    before, read = len(findings), {}
    for name, (kind, may_lack) in _fields(record).items():
        place = f"{path}.{name}" if path else name
        if name in value:
            read[name] = _value(kind, value[name], place, findings)
        elif not may_lack:
            findings.append(f"{place} is missing; expected {_expected(kind)}")
    return record(**read) if len(findings) == before else None


def _value(kind: Any, value: Any, path: str, findings: list[str]) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(_not_none(parts), value, path, findings)
    if dataclasses.is_dataclass(kind):
        return _table(kind, value, path, findings)
    if not _fits(kind, value):
        findings.append(f"{path} is {_shown(value)}; expected {_expected(kind)}")
        return None
    if origin is dict:
        return {key: _value(parts[1], item, f"{path}.{key}", findings) for key, item in value.items()}
    if origin is tuple:
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_value(k, value[i], f"{path}[{i}]", findings) for i, k in enumerate(kinds))
    return value


def _not_none(parts: tuple[Any, ...]) -> Any:
    [kind] = [part for part in parts if part is not types.NoneType]
    return kind


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a type; the items of lists and tables are not looked at."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        return _fits(parts[0], value) and parts[1].allows(value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, list) and (parts[-1] is Ellipsis or len(value) == len(parts))
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind  # True is no integer


def _expected(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return str(parts[1].expected)
    if origin in (types.UnionType, typing.Union):
        return f"{_expected(_not_none(parts))}, or null"
    if origin is tuple:
        return "a list" if parts[-1] is Ellipsis else f"a list of {len(parts)}"
    words = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(kind, "a table" if origin is dict or dataclasses.is_dataclass(kind) else "a value")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
