"""Negative controls: faults that deployed engines have had, each planted here and caught by the gate that is meant for it.

Others are in test_bites.py: Hadamard on one side only, a carry that is not kept across chunks (HCA), wrong choices among ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from damage import Damage, Model, damaged_bundle, functions, nodes
from onnx import numpy_helper
from onnx.helper import make_node

from foldkv.runtime.model import Model as OpenModel
from foldkv.runtime.session import Session
from foldkv.runtime.snapshots import SlotSnapshot, Snapshot
from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.behaviour import answered, figures, metrics
from foldkv.validation.behaviour_cases import sweep_cases
from foldkv.validation.gates import judge, resolve_gates
from foldkv.validation.result import ValidationResult
from foldkv.validation.runners import SessionRunner, TransformersRunner
from foldkv.validation.settings import Plan
from foldkv.validation.validate import validate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_answer")]
#: Two chunks of a session and more queries with a choice than the gates need.
PLAN = Plan(texts=1, text_tokens=128, distances=(64,), cases_per_distance=1, cases_per_kind=0, sweep_cases=0)


def failed(result: ValidationResult) -> set[str]:
    return {verdict.gate.name for verdict in result.verdicts if verdict.word == "fails"}


def run(bundle: Path, checkpoint: Path, folder: Path, **changes: int) -> ValidationResult:
    return validate(
        bundle, checkpoint, folder, plan=replace(PLAN, **changes), text=Path(__file__).parents[2] / "LICENSE"
    )


def overlap_before_the_first_window(model: Model) -> None:
    """The first window of a prompt merges with what the carry holds, as if a window had come before it."""
    for function in functions(model, "FoldkvMergeWindows"):
        [absent] = [n for n in function.node if n.op_type == "Less" and n.input[0] == "token" and n.input[1] != "first"]
        absent.input[1] = "damage_never"
        function.node.insert(0, make_node("Constant", [], ["damage_never"], value_int=-1000))


def pool_not_kept(model: Model) -> None:
    """A window whose first tokens came with an earlier chunk is pooled without them."""
    for function in functions(model, "FoldkvMergeWindows"):
        [absent] = [n for n in function.node if n.op_type == "Less" and n.input[0] == "token" and n.input[1] != "first"]
        absent.input[1] = "first"


def lost_where(modulus: int, remainder: int) -> Damage:
    """Chunks that end there read the entry before each chosen one."""

    def lost(damaged: Model) -> None:
        [model] = damaged.of_kind("csa")
        for node in nodes(model, "FoldkvSparseAttention"):
            at = list(model.graph.node).index(node)
            for name, value in (("modulus", modulus), ("remainder", remainder)):
                model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int32), f"damage_{name}"))
            new = [
                make_node("Add", ["positions", "num_tokens"], ["damage_end"]),
                make_node("Mod", ["damage_end", "damage_modulus"], ["damage_residue"]),
                make_node("Equal", ["damage_residue", "damage_remainder"], ["damage_hit"]),
                make_node("Cast", ["damage_hit"], ["damage_by"], to=onnx.TensorProto.INT32),
                make_node("Sub", [node.input[3], "damage_by"], ["damage_chosen"]),
            ]
            node.input[3] = "damage_chosen"
            for place, one in enumerate(new):
                model.graph.node.insert(at + place, one)

    return lost


#: Questions end a token after their prompts, whose lengths are 2 mod 4 here.
lost_at_residue_three = lost_where(4, 3)


@pytest.mark.parametrize(
    ("damage", "gates", "layer"),
    [
        (overlap_before_the_first_window, {"layers", "logits"}, 1),
        (pool_not_kept, {"chunks", "layers"}, 1),
        (lost_at_residue_three, {"chunks", "sweep"}, None),
    ],
    ids=["overlap_before_the_first_window", "pool_not_kept", "lost_at_residue_three"],
)
def test_faults_of_the_compressed_path(
    tiny_graph: Path, tiny_checkpoint: Path, tmp_path: Path, damage: Damage, gates: set[str], layer: int | None
) -> None:
    bundle = damaged_bundle(tiny_graph, tmp_path / "bundle", damage)
    result = run(bundle, tiny_checkpoint, tmp_path / "report", sweep_cases=1, case_tokens=64)
    assert gates <= failed(result) and result.first_divergence == layer
    if damage is lost_at_residue_three:
        assert failed(result) == gates, "the text ends elsewhere"
        bad = {row.group for row in result.behaviour if row.group and row.kl_median > 1e-4}
        assert {group for group in bad if "mod 4" in group} == {"length mod 4 = 2"}


@pytest.mark.parametrize(
    ("modulus", "remainder", "line"),
    [
        *((4, remainder, f"length mod 4 = {remainder}") for remainder in range(4)),
        (128, 127, "a multiple of 128 and the window -1"),
        (128, 0, "a multiple of 128 and the window +0"),
        (128, 1, "a multiple of 128 and the window +1"),
    ],
)
def test_a_fault_at_one_residue_or_edge_fails_the_sweep_in_its_own_line(
    sweep: Any, tiny_graph: Path, tmp_path: Path, modulus: int, remainder: int, line: str
) -> None:
    cases, expected = sweep
    bundle = damaged_bundle(tiny_graph, tmp_path / "bundle", lost_where(modulus, (remainder + 1) % modulus))
    found = []
    # A prompt is one chunk, so that none of its earlier tokens is lost.
    with OpenModel(bundle, threads=1) as model, SessionRunner(model, context=140, chunk=140) as subject:
        for case, theirs in zip(cases, expected, strict=True):
            found.append(answered(case, theirs, subject.logits(case.tokens, last=len(case.answer)), None))
    rows = {row.group: row for row in figures(cases, found)}
    [verdict] = [v for v in judge(resolve_gates({}), metrics(list(rows.values()))) if v.gate.name == "sweep"]
    assert verdict.word == "fails" and rows[line].kl_median > 1e-4
    alike = {group for group in rows if group.startswith(line.split("=")[0].split(" 128")[0])}
    assert len(alike) > 3 and all(rows[group].kl_max < 1e-8 for group in alike - {line})


@pytest.fixture(scope="module")
def sweep(tiny_checkpoint: Path) -> Any:
    """Cases of every length mod 4 and around 128, with the reference's logits at their answers."""
    cases = sweep_cases(Tokenizer(tiny_checkpoint / "tokenizer.json"), 32, 128, (16, 64), 1, seed=0)
    reference = TransformersRunner(tiny_checkpoint)
    return cases, [reference.logits(case.tokens, last=len(case.answer)) for case in cases]


def louder(model: Model) -> None:
    """Experts of layer 1 whose values the clamp of SwiGLU cuts."""
    for expert in ("shared_experts", *(f"experts.{number}" for number in range(8))):
        for part in ("w1", "w3"):
            model.values[f"layers.1.ffn.{expert}.{part}.weight"] = lambda value: 20 * value


def clamp_removed(model: Model) -> None:
    louder(model)
    for one in model.of_kind(""):
        for node in nodes(one, "FoldkvRoutedExperts"):
            [limit] = [attribute for attribute in node.attribute if attribute.name == "limit"]
            limit.f = 1e9
        for node in nodes(one, "Clip"):
            node.op_type = "Identity"
            del node.input[1:]


@pytest.mark.parametrize(
    ("damage", "layer"), [(louder, None), (clamp_removed, 1)], ids=lambda value: getattr(value, "__name__", "")
)
def test_a_clamp_that_is_removed_is_found_where_values_reach_it(
    tiny_graph: Path, tmp_path: Path, damage: Damage, layer: int | None
) -> None:
    bundle = damaged_bundle(tiny_graph, tmp_path / "bundle", damage)
    result = run(bundle, tmp_path / "bundle" / "checkpoint", tmp_path / "report")
    assert result.first_divergence == layer
    assert failed(result) >= {"layers", "logits", "kl-mean"} if layer else not failed(result)


def test_a_window_ring_that_stays_stale_after_a_restore(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore: Callable[[Session, Snapshot], None] = Session.restore

    def stale(self: Session, snapshot: Snapshot) -> None:
        names = [tensor.name for tensor in self.bundle.state.tensors]
        [now], [kept] = self.snapshot().rows, snapshot.rows
        rows = tuple(mine if "window" in name else old for name, mine, old in zip(names, now, kept, strict=True))
        restore(self, replace(snapshot, rows=(rows,)))

    monkeypatch.setattr(Session, "restore", stale)
    result = run(tiny_bundle, tiny_checkpoint, tmp_path / "report")
    assert failed(result) == {"restore"}


@pytest.mark.parametrize("kept", ["window", "carry"])
def test_one_of_two_drafts_is_taken_back_but_not_from_the_ring_or_the_carry(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    restore: Callable[[Session, int, SlotSnapshot], None] = Session.restore_slot

    def partly(self: Session, slot: int, snapshot: SlotSnapshot) -> None:
        names, now = [tensor.name for tensor in self.bundle.state.tensors], self.snapshot_slot(slot).rows
        assert any(kept in name for name in names)
        rows = tuple(mine if kept in name else old for name, mine, old in zip(names, now, snapshot.rows, strict=True))
        restore(self, slot, replace(snapshot, rows=rows))

    monkeypatch.setattr(Session, "restore_slot", partly)
    result = run(tiny_bundle, tiny_checkpoint, tmp_path / "report")
    assert failed(result) == {"restore"}


def scales_read_as_numbers(damaged: Model) -> None:
    """The byte of a power of two (e8m0) is read as the number that it is."""
    for function in functions(damaged, "FoldkvQuantizeFp8"):
        power = next(node for node in function.node if node.op_type == "FoldkvPower")
        product = next(node for node in function.node if node.op_type == "Mul" and power.output[0] in node.input)
        at = list(function.node).index(product)
        new = [
            make_node("Constant", [], ["damage_bias"], value_int=127),
            make_node("Add", [power.input[0], "damage_bias"], ["damage_byte"]),
            make_node("Cast", ["damage_byte"], ["damage_scale"], to=onnx.TensorProto.FLOAT),
        ]
        product.input[list(product.input).index(power.output[0])] = "damage_scale"
        for place, one in enumerate(new):
            function.node.insert(at + place, one)


def index_rows_in_another_tiling(damaged: Model) -> None:
    """Index rows are written with their halves swapped, and read as if they were not."""
    [model] = damaged.of_kind("csa")
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in nodes(model, "FoldkvCompressFp4"):
        matrix = kept[node.input[10]]
        name = f"{node.input[10]}_tiled"
        if all(tensor.name != name for tensor in model.graph.initializer):
            model.graph.initializer.append(numpy_helper.from_array(np.roll(matrix, len(matrix) // 2, axis=1), name))
        node.input[10] = name


@pytest.mark.parametrize(
    ("damage", "gates", "layer"),
    [
        (scales_read_as_numbers, {"oracle", "layers"}, 0),
        (index_rows_in_another_tiling, {"oracle", "topk-overlap"}, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_of_packed_rows(
    served_graph: Path, tiny_checkpoint: Path, tmp_path: Path, damage: Damage, gates: set[str], layer: int | None
) -> None:
    # The layers are judged by their typical token, which an entry more or less need not reach.
    result = run(damaged_bundle(served_graph, tmp_path / "bundle", damage), tiny_checkpoint, tmp_path / "report")
    assert gates <= failed(result) and result.first_divergence == layer
