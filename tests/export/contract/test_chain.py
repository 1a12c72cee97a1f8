"""The table of a chain: what is written is read, its second form, and rows that no build writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foldkv.errors import ArtifactError
from foldkv.export.contract.chain import Bound, Call, ChainTable, Stacked
from foldkv.export.contract.stacks import (
    HEADER,
    Decoded,
    RowBlocks,
    Stack,
    facts_in,
    file_bytes,
    header,
    offsets,
    reads_stacks,
)

STACKS: dict[str, Stack | Decoded] = {
    "experts.w13": Stack("experts.codes", (0, 2), "uint8", (2, 8, 16)),
    "experts.w2": Stack("experts.scales", (1,), "float8e8m0", (2, 4, 4)),
    "wq": Decoded("wq", "wq.scale", (4, 8), (6, 8)),
}
KEPT = {"norm": Bound("placed.bin", True, 64, "float32", (8,)), "gate": Bound("a", False, 8, "bfloat16", (2, 8))}
TABLE = ChainTable(
    {"step": "segments/step.onnx", "moe": "segments/moe.onnx", "head": "segments/head.onnx"},
    (Call("layers.0", "moe"), Call("head", "head")),
    {
        "layers.0": KEPT | {"experts.codes": Bound("a", False, 40, "int8", (2, 96))},
        "head": {"weight": Bound("a", False, 8, "bfloat16", (5, 4))},
    },
    {
        "moe": Stacked(
            "segments/moe.stacked.onnx", STACKS, ("experts.codes",), {"wq": RowBlocks(3, 2)}, "segments/moe.wide.onnx"
        ),
        "head": Stacked("segments/head.stacked.onnx", {}, (), {"weight": RowBlocks(5, 4)}, "segments/head.wide.onnx"),
    },
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    TABLE.write(tmp_path / "chain.json")
    assert ChainTable.read(tmp_path / "chain.json") == TABLE


def test_the_second_form_takes_stacks_instead() -> None:
    other = TABLE.in_stacks()
    assert other.segments == {"step": "segments/step.onnx"} | {
        name: f"segments/{name}.stacked.onnx" for name in ("moe", "head")
    }
    assert other.calls == TABLE.calls
    assert other.weights["head"] == {
        "weight.rows.0": Bound("a", False, 8, "bfloat16", (4, 4)),
        "weight.rows.1": Bound("a", False, 8 + 4 * 4 * 2, "bfloat16", (1, 4)),
    }
    assert other.weights["layers.0"] == KEPT | {
        "experts.w13": Bound("stacks/layers.0", True, HEADER, "uint8", (2, 8, 16)),
        "experts.w2": Bound("stacks/layers.0", True, HEADER + 256, "float8e8m0", (2, 4, 4)),
        "wq.rows.0": Bound("stacks/layers.0", True, HEADER + 288, "bfloat16", (2, 8)),
        "wq.rows.1": Bound("stacks/layers.0", True, HEADER + 320, "bfloat16", (1, 8)),
        "wq.rows.2": Bound("stacks/layers.0", True, HEADER + 336, "bfloat16", (2, 8)),
        "wq.rows.3": Bound("stacks/layers.0", True, HEADER + 368, "bfloat16", (1, 8)),
    }
    assert other.in_stacks() == other
    assert file_bytes(STACKS) == HEADER + 256 + 32 + 96 and offsets(STACKS)["experts.w2"] == HEADER + 256


def test_the_third_form_takes_matrices_whole_in_float32() -> None:
    second, other = TABLE.in_stacks(), TABLE.in_stacks(wide=True)
    assert other.segments == {name: file.replace("stacked", "wide") for name, file in second.segments.items()}
    assert other.weights["head"] == {"weight": Bound("wide/head", True, 0, "float32", (5, 4))}
    assert other.weights["layers.0"] == {
        role: bound for role, bound in second.weights["layers.0"].items() if ".rows." not in role
    } | {"wq": Bound("wide/layers.0", True, 0, "float32", (6, 8))}
    assert TABLE.matrices() == {
        "layers.0": {"wq": Bound("stacks/layers.0", True, HEADER + 288, "bfloat16", (6, 8))},
        "head": {"weight": Bound("a", False, 8, "bfloat16", (5, 4))},
    }
    without = replace(TABLE, stacked={name: replace(form, blocks={}, wide="") for name, form in TABLE.stacked.items()})
    assert without.in_stacks(wide=True) == without.in_stacks() and not any(without.matrices().values())


def test_a_header_is_one_of_safetensors_of_a_fixed_size() -> None:
    head = header(STACKS, {"sha256": "0" * 64})
    length = int.from_bytes(head[:8], "little")
    assert len(head) == HEADER == 8 + length and facts_in(head) == {"sha256": "0" * 64}
    rows = json.loads(head[8:])
    assert rows["experts.w2"] == {"dtype": "F8_E8M0", "shape": [2, 4, 4], "data_offsets": [256, 288]}
    assert rows["wq"] == {"dtype": "BF16", "shape": [6, 8], "data_offsets": [288, 384]}
    with pytest.raises(ValueError, match="of which 4088 fit"):
        header(STACKS, {"layer": "x" * HEADER})
    for wrong in (
        head[:-1],
        b"\0" * HEADER,
        head.replace(b"__metadata__", b"__metalata__"),
        head.replace(b"{", b"[", 1),
    ):
        with pytest.raises(ValueError):
            facts_in(wrong)


def test_versions_of_onnx_runtime_are_compared_as_numbers() -> None:
    found = {version: reads_stacks(version) for version in ("1.9.1", "1.31.0", "1.32.0", "1.100.0", "2.0.0.dev1")}
    assert found == {"1.9.1": False, "1.31.0": False, "1.32.0": True, "1.100.0": True, "2.0.0.dev1": True}


def change(part: int, value: object, role: str = "experts.w13") -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        content["stacked"]["moe"][1][role][part] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change(2, "float32"), "a stack has dtype 'float32'"), (change(3, [2, 8]), "shape"), (change(3, [2, 7, 16]), "parts"),
        (change(3, [2, 0, 16]), "shape"), (change(1, []), "parts"), (change(1, [-1]), "parts"), (change(1, 0), "parts 0"),
        (lambda content: content["stacked"].update(other=content["stacked"]["moe"]), "no segment other"),
        (lambda content: content.pop("stacked"), "KeyError"), (lambda content: content.update(version=1), "version 1"),
        (change(2, [4], "wq"), r"blocks of \[4\]"), (change(3, [6, 0], "wq"), r"the shape \[6, 0\]"),
        (lambda content: content["stacked"]["moe"][3].update(wq=[3, 0]), "blocks have 0 of 3 rows"),
        (lambda content: content["stacked"]["moe"].__setitem__(4, ""), "the third form of a segment is '' and has 1 matrices"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_error(tmp_path: Path, damage: Callable[[dict[str, Any]], object], reason: str) -> None:
    path = tmp_path / "chain.json"
    TABLE.write(path)
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"chain.json is no table of a chain .*{reason}.*Make the bundle again"):
        ChainTable.read(path)
