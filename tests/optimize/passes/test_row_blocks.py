"""Products in blocks of rows: the same values as with the whole matrix, for any size of blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from foldkv.errors import BuildError, InputError
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract import step_time
from foldkv.export.contract.chain import CHAIN, ChainTable
from foldkv.export.contract.stacks import Decoded, RowBlocks, block_name
from foldkv.export.loading import weight_value
from foldkv.optimize.passes import row_blocks
from foldkv.optimize.passes.row_blocks import take_row_blocks
from foldkv.runtime import Session, stacks
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chain import ChainModel

ROLE = "wq.weight"
#: x, W and the statements of a product, as segments have them.
FORMS = {
    "linear": (
        (2, 3, 16), (12, 16), "transposed = Transpose <perm = [1, 0]> (values) y = MatMul (x, transposed)",
    ),
    "gemm": ((5, 16), (12, 16), "y = Gemm <transB = 1> (x, values)"),
    "groups": (
        (3, 4, 16), (12, 16),
        """shape = Constant <value_ints = [3, 4, 16]> () grouped = Reshape (values, shape)
        transposed = Transpose <perm = [0, 2, 1]> (grouped) y = MatMul (x, transposed)""",
    ),
}  # fmt: skip


def model_of(form: str) -> ir.Model:
    x, weight, product = FORMS[form]
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    product (float{list(x)} x, bfloat16{list(weight)} weight) => (float y) {{
        values = Cast <to = 1> (weight)
        {product}
    }}"""
    proto = onnx.parser.parse_model(text)
    for name, new in (("weight", ROLE), ("values", f"{ROLE}.value")):
        for holder in (proto.graph.input, proto.graph.node):
            for one in holder:
                if isinstance(one, onnx.ValueInfoProto):
                    one.name = new if one.name == name else one.name
                else:
                    for names in (one.input, one.output):
                        names[:] = [new if each == name else each for each in names]
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def bfloat16(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and values in float64."""
    bits = (np.random.default_rng(0).standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 100])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_in_blocks_is_the_product(form: str, rows: int) -> None:
    model, (x_shape, shape, _) = model_of(form), FORMS[form]
    groups = x_shape[0] if form == "groups" else 1
    blocks = RowBlocks(shape[0] // groups, min(rows, shape[0] // groups))
    take_row_blocks(model, ROLE, blocks, ir.DataType.BFLOAT16)
    bits, weight = bfloat16(shape)
    x = np.random.default_rng(1).standard_normal(x_shape).astype(np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    for number, (start, end) in enumerate(blocks.spans(shape[0])):
        part = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits[start:end], TensorProto.BFLOAT16)
        binding.bind_ortvalue_input(block_name(ROLE, number), part)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    expected = x.astype(np.float64) @ (
        weight.reshape(groups, -1, shape[1]).swapaxes(1, 2) if form == "groups" else weight.T
    )
    [found] = binding.copy_outputs_to_cpu()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert {value.name for value in model.graph.inputs} == {
        "x",
        *(block_name(ROLE, number) for number in range(len(blocks.spans(shape[0])))),
    }


def test_blocks_cover_every_row_once_and_no_two_groups() -> None:
    for rows, groups, size in ((12, 1, 5), (12, 3, 4), (12, 3, 3), (7, 1, 7)):
        spans = RowBlocks(rows // groups, size).spans(rows)
        assert [row for start, end in spans for row in range(start, end)] == list(range(rows))
        assert all(start // (rows // groups) == (end - 1) // (rows // groups) for start, end in spans)
    assert row_blocks.row_blocks(129280, 4096, 1) == RowBlocks(129280, 256)
    assert row_blocks.row_blocks(8, 1 << 30, 1) == RowBlocks(8, 1), "a row is never cut"


def test_what_is_no_product_is_refused() -> None:
    model = model_of("linear")
    node = next(node for node in model.graph if node.op_type == "Transpose")
    model.graph.insert_after(node, ir.node("Neg", [node.inputs[0]]))
    with pytest.raises(BuildError, match=f"weight {ROLE} is used by Neg, Transpose; expected one product"):
        take_row_blocks(model, ROLE, RowBlocks(12, 4), ir.DataType.BFLOAT16)


@pytest.mark.slow
def test_a_large_model_computes_the_same_in_all_forms(large_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "VALIDATION", 0)
    tokens = np.random.default_rng(0).integers(0, 256, 150).tolist()
    logits, lines = {}, dict[str, list[str]]()
    forms: dict[str, dict[str, Any]] = {
        "stored": {"place": False},
        "bfloat16": {"matrices": "bfloat16"},
        "float32": {"matrices": "float32"},
        "auto": {},
    }
    for name, form in forms.items():
        lines[name] = []
        with Session(large_bundle, context=256, chunk=64, progress=lines[name].append, **form) as session:
            assert session.model.matrices == {"stored": "auto", "auto": "float32"}.get(name, name)
            rows = [session.prefill([tokens])[0]]
            rows += [session.decode([token])[0] for token in tokens[:8]]
            logits[name] = np.array(rows)
    spread = float(logits["stored"].std())
    assert all(np.abs(found - logits["stored"]).max() < 1e-4 * spread for found in logits.values())
    assert np.array_equal(logits["auto"], logits["float32"])
    slow = "expect about 0 s a token: for validation only"
    [widened, _] = lines["float32"]
    assert re.fullmatch(r"widening [\d.]+ \w+ of matrices to float32, in memory", widened)
    assert lines == {
        "stored": [slow], "bfloat16": [slow],
        "float32": [widened, slow], "auto": [widened, slow],
    }  # fmt: skip
    assert (large_bundle / "placed.bin").stat().st_size < 1 << 17, "no matrix is placed"


@pytest.mark.slow
def test_decoded_matrices_are_the_checkpoints_values(
    large_bundle: Path, released_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path))
    monkeypatch.setattr(stacks, "IN_MEMORY", 0)
    checkpoint, model = Checkpoint(released_checkpoint("instruct")), ChainModel(load_bundle(large_bundle))
    table, compared = ChainTable.read(large_bundle / CHAIN), 0
    second = table.in_stacks()
    for call in table.calls:
        form = table.stacked.get(call.segment)
        for role, blocks in form.blocks.items() if form else ():
            weight = weight_value(checkpoint, f"{call.owner}.{role}" if call.layer is not None else role)
            names = [block_name(role, number) for number in range(len(blocks.spans(len(weight))))]
            found = np.concatenate([model.files.view(second.weights[call.owner][name]) for name in names])
            values = (found.astype(np.uint32) << 16).view(np.float32)
            assert np.array_equal(values, weight.float().numpy()), (call.owner, role)
            compared += form is not None and isinstance(form.stacks.get(role), Decoded)
    assert compared > 20
    model.close()


@pytest.mark.slow
def test_a_matrix_that_bfloat16_cannot_hold_is_refused(
    large_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKV_CACHE", str(tmp_path))
    monkeypatch.setattr(stacks, "IN_MEMORY", 0)
    read = stacks.Stacks._whole

    def tiny(self: stacks.Stacks, weight: object) -> np.ndarray:
        found = read(self, weight)  # type: ignore[arg-type]
        return np.zeros_like(found) if found.size < 200 else found  # scales of 2^-127

    monkeypatch.setattr(stacks.Stacks, "_whole", tiny)
    with pytest.raises(InputError, match=r"layers.\d.*: a value is too small for bfloat16. Run .*--no-place"):
        ChainModel(load_bundle(large_bundle))
    assert not list(tmp_path.rglob("*.part"))
