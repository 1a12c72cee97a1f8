"""The engines of a bundle: one plan per segment, and how each takes its weights. Standard library only.

A plan holds no weight: it depends on the kind of layer, and not on values. Weights are inputs. Where they lie is in the
lock; the table here says in what form an engine takes them, and a runtime brings them into it as it loads them. Build
writes the table, and the runtime reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ...errors import ArtifactError
from .chain import ITEM_BYTES, STEP, Call

ENGINES = "engines.json"
VERSION = 1
#: Forms of a weight: the bytes as they are stored; values in another type; values of a matrix in blocks, times its scales;
#: rows of bytes as rows of words.
STORED, CONVERTED, DEQUANTISED, WORDS = "stored", "converted", "dequantised", "words"


@dataclass(frozen=True)
class Taken:
    """How an engine takes a weight.

    Attributes:
        form: STORED, CONVERTED, DEQUANTISED or WORDS.
        dtype: of the input, a key of ``ITEM_BYTES``.
        shape: of the input.
        scale: of DEQUANTISED, the role of the scales, which the engine does not take.
        block: of DEQUANTISED, the rows and columns that share a scale.
        spans: of WORDS, for each part of a row: its first byte as stored, its bytes, and its first byte in a row of words.
    """

    form: str
    dtype: str
    shape: tuple[int, ...]
    scale: str = ""
    block: tuple[int, int] = (0, 0)
    spans: tuple[tuple[int, int, int], ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes that the weight takes on a device."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class EngineTable:
    """The plan of every segment, the calls in order, and how each segment takes its weights."""

    plans: dict[str, str]
    calls: tuple[Call, ...]
    weights: dict[str, dict[str, Taken]]

    def bytes_of(self, call: Call) -> int:
        """Bytes of the weights of one call on a device."""
        return sum(taken.bytes for taken in self.weights[call.segment].values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on a device."""
        return sum(self.bytes_of(call) for call in self.calls)

    def write(self, path: Path) -> None:
        """Write the table as JSON, one segment per line."""
        content = {
            "version": VERSION,
            "plans": self.plans,
            "calls": [[call.owner, call.segment] for call in self.calls],
            "weights": {
                name: {role: _row(taken) for role, taken in roles.items()} for name, roles in self.weights.items()
            },
        }
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        for name in self.weights:
            text = text.replace(f'{json.dumps(name)}:{{"', f'\n{json.dumps(name)}:{{"')
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> EngineTable:
        """Read and check a table.

        Raises:
            ArtifactError: it is missing, of another version or damaged.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, expected {VERSION}")
            table = cls(
                {str(name): str(file) for name, file in content["plans"].items()},
                tuple(Call(str(owner), str(segment)) for owner, segment in content["calls"]),
                {
                    name: {role: _taken(row) for role, row in roles.items()}
                    for name, roles in content["weights"].items()
                },
            )
            unknown = {call.segment for call in table.calls} - (table.plans.keys() & table.weights.keys())
            if unknown or STEP not in table.plans:
                raise ValueError(f"no segment {', '.join(sorted(unknown)) or STEP}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{path} is no table of engines ({type(error).__name__}: {error}). Make the bundle again."
            ) from None
        return table


def _row(taken: Taken) -> list[Any]:
    more: dict[str, Any] = {}
    if taken.form == DEQUANTISED:
        more = {"scale": taken.scale, "block": list(taken.block)}
    elif taken.spans:
        more = {"spans": [list(span) for span in taken.spans]}
    return [taken.form, taken.dtype, list(taken.shape), *([more] if more else [])]


def _taken(row: Any) -> Taken:
    form, dtype, shape, *rest = row
    more: Mapping[str, Any] = rest[0] if rest else {}
    taken = Taken(
        form, dtype, tuple(shape), str(more.get("scale", "")), tuple(more.get("block", (0, 0))),
        tuple((int(at), int(size), int(start)) for at, size, start in more.get("spans", ())),
    )  # fmt: skip
    if form not in (STORED, CONVERTED, DEQUANTISED, WORDS) or dtype not in ITEM_BYTES:
        raise ValueError(f"a weight is taken as {form!r} in {dtype!r}")
    if not all(type(size) is int and size >= 0 for size in (*taken.shape, *taken.block)) or len(taken.block) != 2:
        raise ValueError(f"a weight has the shape {shape!r} and the block {taken.block!r}")
    if form == DEQUANTISED and (not taken.scale or 0 in taken.block):
        raise ValueError(f"a weight is dequantised by {taken.scale!r} in blocks of {taken.block!r}")
    return taken
