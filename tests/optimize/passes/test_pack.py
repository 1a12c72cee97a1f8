"""Packed state on the cpu: the bytes that were planned, and the bits of the served graph with dense rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from foldkv.artifact import read_manifest
from foldkv.errors import InputError
from foldkv.export.checkpoint.config_reader import spec_from_file
from foldkv.export.contract.rows import row_format_named
from foldkv.export.memory import plan_memory
from foldkv.export.package import read_package
from foldkv.export.stitch import flat_model
from foldkv.optimize.build import build_bundles
from foldkv.optimize.passes.pack import pack_state
from foldkv.runtime.buffers import plan_bytes
from foldkv.runtime.session import Session


def prompt(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(32, 127, count)]


def test_packed_rows_give_the_bits_of_dense_ones_whatever_the_chunks(served_bundles: dict[str, Path]) -> None:
    prompts = [prompt(0, 150), prompt(1, 73)]
    for chunk in (1, 37, 256):
        with (
            Session(served_bundles["dense"], context=200, batch=2, chunk=chunk) as dense,
            Session(served_bundles["fp8+fp4"], context=200, batch=2, chunk=chunk) as packed,
        ):
            for have, want in zip(
                packed.prefill(prompts, logits="all"), dense.prefill(prompts, logits="all"), strict=True
            ):
                np.testing.assert_array_equal(have, want)
            for token in range(60, 70):
                np.testing.assert_array_equal(packed.decode([token, token]), dense.decode([token, token]))


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (129, 3), (4096, 2), (65536, 1)])
def test_a_session_allocates_what_was_planned_to_the_byte(
    served_bundles: dict[str, Path], tiny_checkpoint: Path, context: int, batch: int
) -> None:
    plan = plan_memory(spec_from_file(tiny_checkpoint), context=context, batch=batch, layout="fp8+fp4")
    with Session(served_bundles["fp8+fp4"], context=context, batch=batch, chunk=1) as session:
        assert plan_bytes(session.bundle.state, context, batch) == plan.groups
        assert session.state_bytes == plan.total


def test_a_snapshot_of_packed_rows_gives_the_same_bits(served_bundles: dict[str, Path]) -> None:
    with Session(served_bundles["fp8+fp4"], context=128) as session:
        session.prefill([prompt(2, 70)])
        before = session.snapshot()
        first = [session.decode([token]) for token in range(65, 75)]
        session.restore(before)
        np.testing.assert_array_equal(first, [session.decode([token]) for token in range(65, 75)])


def test_the_manifest_says_the_layout_and_carries_stay_float32(served_bundles: dict[str, Path]) -> None:
    manifest = read_manifest(served_bundles["fp8+fp4"], kind="foldkv.bundle")
    assert (manifest["layout"], manifest["profile"]) == ("fp8+fp4", "served")
    for row in manifest["state"]:
        width, dtype = {"window": (88, "int8"), "entries": (88, "int8"), "index_entries": (17, "int8")}.get(
            row["group"], (row["width"], "float32")
        )
        assert (row["width"], row["dtype"]) == (width, dtype)


def test_nodes_that_touch_packed_rows_say_so_as_injected_ones_do(served_graph: Path) -> None:
    package = read_package(served_graph)
    model, state = ir.from_proto(flat_model(package)), package.state
    pack_state(model, state, "fp8+fp4", 16)
    marked = {node.op_type: node.attributes for node in model.graph if "row_format" in node.attributes}
    assert set(marked) == {
        "FoldkvPackFp8", "FoldkvWindowUpdate", "FoldkvCompressFp8Packed", "FoldkvCompressFp4Packed",
        "FoldkvCompressOnlineFp8Packed",
        "FoldkvSparseAttentionPacked", "FoldkvDenseAttention", "FoldkvIndexScores",
    }  # fmt: skip
    for name, attributes in marked.items():
        rows = "index_fp4" if "Fp4" in name or "Index" in name else "fp8_ds_mla"
        assert attributes["row_format"].value == rows and attributes["rope_dim"].value == 16
        assert attributes["layout_version"].value == row_format_named(rows).version


def test_a_table_is_stored_once_and_no_row_is_decoded_before_it_is_cut_out(served_bundles: dict[str, Path]) -> None:
    found = []
    for file in sorted((served_bundles["fp8+fp4"] / "segments").iterdir()):
        model = onnx.load(file)
        shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
        found.append((shapes.count((65536,)), shapes.count((256, 2))))
        assert not any(node.op_type == "Constant" for node in model.graph.node)
        for node in model.graph.node:
            for name in node.input:
                if name.startswith("past.") and name.endswith("entries"):
                    assert node.op_type in ("GatherND", "ScatterND", "Shape"), f"{file}: {name} is read whole"
    assert max(count for counts in found for count in counts) == 1 and sum(map(sum, found)) >= 3


def test_packed_rows_without_plugins_are_refused_for_a_gpu_and_for_hf(
    served_graph: Path, tiny_graph: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"a100: layout fp8.fp4 needs plugins"):
        build_bundles(served_graph, tmp_path, ["cpu", "a100"], plugins=False, layout="fp8+fp4")
    for plugins in (True, False):
        with pytest.raises(InputError, match="Export with --profile served"):
            build_bundles(tiny_graph, tmp_path, ["cpu"], plugins=plugins, layout="fp8+fp4")
    assert not any(tmp_path.iterdir())
