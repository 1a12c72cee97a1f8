"""A row format and an operator from outside of the package, through the public functions, and what unknown ones give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript import FLOAT, INT8, script
from onnxscript import opset20 as op
from torch import Tensor

from foldkv.errors import InputError
from foldkv.export.contract import operators as contract_operators
from foldkv.export.contract import rows as contract_rows
from foldkv.export.contract.layouts import CacheLayout
from foldkv.export.contract.operators import (
    BLOCKS,
    STATE,
    OperatorSpec,
    TensorSpec,
    operator_spec,
    register_operator,
)
from foldkv.export.contract.rows import INDEX_FP8, NVFP4, RowFormat, register_row_format, row_format_named
from foldkv.export.contract.state import StateTensor
from foldkv.export.operators import registry, row_formats
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET, OPSET, operator, schema, translation_table
from foldkv.export.operators.row_formats import RowBodies, RowPacker, pack, register_row_packer, row_bodies, unpack
from foldkv.export.operators.window import FoldkvReadRows
from foldkv.export.trace import add_functions, operator_counts, quiet
from foldkv.optimize.passes.functions import attach_reader, attach_writer
from foldkv.plugins.launch import plan

FORMAT, OPERATOR, WIDTH = "int8_sixteenths", "FoldkvScaledRows", 24
#: int8 codes of a fixed step, 1/16, without scales.
DECLARED = RowFormat(FORMAT, code_bits=8)
SCALED = OperatorSpec(
    OPERATOR,
    inputs=(TensorSpec("entries", ("B", "E", "D"), STATE, ("entries",), BLOCKS), TensorSpec("by", (1,))),
    outputs=(TensorSpec("out", ("B", "E", "D")),),
    attributes={"factor": float},
)


def pack_sixteenths(values: Tensor, rope_dim: int) -> Tensor:
    return (values * 16).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)


def unpack_sixteenths(data: Tensor, width: int, rope_dim: int) -> Tensor:
    return data.view(torch.int8).float() / 16


@script(OPSET, default_opset=op)
def FoldkvSixteenths(x: FLOAT):  # type: ignore[no-untyped-def]
    return op.Clip(op.Round(x * 16.0), -127.0, 127.0)


@script(OPSET, default_opset=op)
def FoldkvQuantizeSixteenths(x: FLOAT):  # type: ignore[no-untyped-def]
    return FoldkvSixteenths(x) / 16.0


@script(OPSET, default_opset=op)
def FoldkvPackSixteenths(x: FLOAT):  # type: ignore[no-untyped-def]
    return op.Cast(FoldkvSixteenths(x), to=3)


@script(OPSET, default_opset=op)
def FoldkvUnpackSixteenths(rows: INT8, width: int):  # type: ignore[no-untyped-def]
    return op.Cast(op.Slice(rows, [0], op.Reshape(op.Constant(value_int=1) * width, [1]), [-1]), to=1) / 16.0


@script(OPSET, default_opset=op)
def FoldkvRounding(x: FLOAT):  # type: ignore[no-untyped-def]
    # A body that writes rows of the format's values, as an operator of a served graph does.
    return op.Identity(FoldkvQuantizeSixteenths(x + 1.0))


@script()
def rounding(x: FLOAT["B", "E", "D"]) -> FLOAT["B", "E", "D"]:  # noqa: F821, UP037
    return FoldkvRounding(x)


def scaled_rows(entries: Tensor, by: Tensor, factor: float) -> Tensor:
    return entries.float() * by * factor


@script(OPSET, default_opset=op)
def FoldkvScaledRows(entries: FLOAT, by: FLOAT, factor: float):  # type: ignore[no-untyped-def]
    return FoldkvReadRows(entries) * by * factor


@pytest.fixture(scope="module")
def scaled() -> Iterator[Any]:
    """Both are registered for the tests of this file, as another package would do when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract_rows, "_FORMATS", dict(contract_rows._FORMATS))
        patch.setattr(contract_operators, "_OPERATORS", dict(contract_operators._OPERATORS))
        patch.setattr(registry, "_OPERATORS", dict(registry._OPERATORS))
        patch.setattr(row_formats, "_PACKERS", dict(row_formats._PACKERS))
        register_row_format(DECLARED)
        bodies = RowBodies(FoldkvQuantizeSixteenths, FoldkvPackSixteenths, FoldkvUnpackSixteenths)
        register_row_packer(FORMAT, RowPacker(pack_sixteenths, unpack_sixteenths, bodies))
        register_operator(SCALED)
        yield operator(OPERATOR, eager=scaled_rows, function=FoldkvScaledRows)


class Scale(torch.nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, entries: Tensor, by: Tensor) -> Tensor:
        out: Tensor = self.call(entries, by, 0.5)
        return out


def exported(call: Any) -> ir.Model:
    """A graph with one node of the operator, by the way that models take."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Scale(call).eval(), (torch.zeros(2, 5, WIDTH), torch.ones(1)), dynamo=True, opset_version=ONNX_OPSET,
            optimize=False, custom_translation_table=translation_table(), verbose=False,
        )  # fmt: skip
    assert program is not None
    return program.model


def run(model: ir.Model, entries: Tensor, by: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    [out] = session.run(None, dict(zip(names, (entries.numpy(), by.numpy()), strict=True)))
    return torch.from_numpy(out)


def test_a_new_format_is_planned_packed_and_unpacked(scaled: Any) -> None:
    entries = StateTensor("0.entries", 0, "entries", "past", "present", None, 4, WIDTH)
    stored = CacheLayout("own", FORMAT, FORMAT).stored(entries, 8)
    assert (stored.dtype, stored.width, stored.bytes(1000, 2)) == ("int8", 24, 2 * 250 * 24)
    values = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    rows = pack(values, FORMAT)
    assert rows.shape == (3, 7, stored.width) and rows.dtype == torch.int8
    assert ((unpack(rows, FORMAT, WIDTH) - values).abs() <= 1 / 32).all()


def test_a_new_operator_is_a_node_with_a_schema_and_a_body(scaled: Any) -> None:
    model = exported(scaled)
    assert operator_counts(model) == {OPERATOR: 1}
    declared = schema(SCALED)
    assert [value.name for value in declared.inputs] == ["entries", "by"] and set(declared.attributes) == {"factor"}
    assert str(scaled._schema).endswith("(Tensor entries, Tensor by, float factor) -> Tensor")
    add_functions(model)
    onnx.checker.check_model(ir.to_proto(model))
    entries, by = torch.randn(2, 5, WIDTH), torch.tensor([3.0])
    torch.testing.assert_close(run(model, entries, by), scaled(entries, by, 0.5), rtol=0, atol=0)


def test_bodies_read_and_write_rows_in_the_new_format_without_knowing_it(scaled: Any) -> None:
    values, by = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)), torch.tensor([2.0])
    model = exported(scaled)
    attach_reader(model, FoldkvScaledRows, FORMAT, WIDTH, 8, name=f"{OPERATOR}Packed")
    [node] = [node for node in model.graph if node.domain == DOMAIN]
    node.op_type = f"{OPERATOR}Packed"
    model.graph.inputs[0].dtype = ir.DataType.INT8
    rows = pack(values, FORMAT)
    assert torch.equal(run(model, rows, by), unpack(rows, FORMAT, WIDTH) * 2 * 0.5)

    model = ir.from_proto(rounding.to_model_proto())
    attach_writer(model, FoldkvRounding, FORMAT, name="FoldkvRoundingPacked")
    [node] = [node for node in model.graph if node.domain == DOMAIN]
    node.op_type = "FoldkvRoundingPacked"
    model.graph.outputs[0].dtype = ir.DataType.INT8
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"x": values.numpy()})
    np.testing.assert_array_equal(found, pack(values + 1.0, FORMAT).numpy())


def test_declarations_that_contradict_each_other_are_refused(scaled: Any) -> None:
    with pytest.raises(InputError, match=r"int8_sixteenths.*declared twice"):
        register_row_format(RowFormat(FORMAT, code_bits=4))
    with pytest.raises(InputError, match="two packers"):
        register_row_packer(FORMAT, RowPacker(unpack_sixteenths, pack_sixteenths))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"FoldkvScaledRows.*declared twice"):
        register_operator(OperatorSpec(OPERATOR, SCALED.inputs, SCALED.outputs))
    with pytest.raises(InputError, match=r"updates carry .* by out"):
        register_operator(
            OperatorSpec("FoldkvOdd", (TensorSpec("carry", ("B", 3)),), (TensorSpec("out", ("B",)),), updates={0: 0})
        )
    other = OperatorSpec("FoldkvOther", SCALED.inputs, SCALED.outputs, attributes={"weight": float})
    register_operator(other)
    with pytest.raises(InputError, match=r"the torch definition takes .*'factor'.*; declared are .*'weight'"):
        operator("FoldkvOther", eager=scaled_rows, function=FoldkvScaledRows)


def test_what_is_not_known_is_an_error_that_says_what_is() -> None:
    with pytest.raises(InputError, match="row format 'int5' is not known; expected one of dense, fp8_ds_mla"):
        row_format_named("int5")
    for call in (lambda: pack(torch.zeros(64), "int5"), lambda: unpack(torch.zeros(64), "int5", 64)):
        with pytest.raises(InputError, match="'int5' is not known"):
            call()
    with pytest.raises(InputError, match="cannot be packed as 'nvfp4': nothing packs it; expected one of fp8_ds_mla"):
        pack(torch.zeros(64), NVFP4)
    with pytest.raises(InputError, match="'nvfp4': nothing packs it"):
        unpack(torch.zeros(64), NVFP4, 64)
    with pytest.raises(InputError, match="graphs cannot read rows in 'index_fp8'"):
        row_bodies(INDEX_FP8)
    with pytest.raises(InputError, match="'int5' is not known"):
        CacheLayout("own", "int5", "int5").stored(StateTensor("a", 0, "window", "x", "y", 8, None, 64), 8)
    with pytest.raises(InputError, match="operator 'FoldkvNothing' is not known; expected one of FoldkvWindowUpdate"):
        operator_spec("FoldkvNothing")
    with pytest.raises(InputError, match="operator 'FoldkvNothing' is not known"):
        operator("FoldkvNothing", eager=scaled_rows, function=FoldkvScaledRows)
    with pytest.raises(ValueError, match="rows in int5; its kernels read dense, fp8_ds_mla"):
        plan("FoldkvWindowAttention", {}, {}, sm=80, dtype="bfloat16", row_format="int5")
