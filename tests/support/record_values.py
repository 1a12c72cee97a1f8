"""Any values of a record, chosen by the types of its fields. Plain Python: strategies for 80 fields take 0.1 s an example."""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from typing import Annotated, Any

from foldkv import records

TEXTS = ["", "x", "sm80", "dense", "é\n", "0" * 64]
JSON = [None, True, 0, -3, 2.5, "x", [], [1, "y"], {}, {"a": {"b": [None]}}]


def any_record(record: Any, seed: int) -> Any:
    """An instance of a dataclass that the reader takes; equal for equal seeds."""
    return _value(record, random.Random(seed))


def _value(kind: Any, chosen: random.Random) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return kind(**{  # type: ignore[operator]
            name: None if lack and chosen.random() < 0.5 else _value(one, chosen)
            for name, (one, lack) in records._fields(kind).items()
        })  # fmt: skip
    if origin in (types.UnionType, typing.Union):
        inner = next(part for part in parts if part is not types.NoneType)
        return chosen.choice([None, _value(inner, chosen)])
    if origin is Annotated:
        if parts[1].expected.startswith("one of "):
            return chosen.choice(parts[1].expected.removeprefix("one of ").split(", "))
        while not parts[1].allows(value := _value(parts[0], chosen)):
            pass
        return value
    if origin is dict:
        return {f"key {i}": _value(parts[1], chosen) for i in range(chosen.randrange(3))}
    if origin is tuple:
        kinds = parts[:1] * chosen.randrange(3) if parts[-1] is Ellipsis else parts
        return tuple(_value(one, chosen) for one in kinds)
    plain = {
        str: lambda: chosen.choice(TEXTS), int: lambda: chosen.randrange(1 << 40), bool: lambda: chosen.random() < 0.5,
        float: lambda: chosen.choice([0, 1.5, chosen.random()]),
    }  # fmt: skip
    return plain.get(kind, lambda: chosen.choice(JSON))()
