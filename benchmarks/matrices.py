"""Products with e4m3 matrices of V4-Flash on the CPU: as stored, in float32, in bfloat16 as a whole and in blocks of rows.

``python benchmarks/matrices.py -o benchmarks/results/matrices-cpu.json``. The forms take turns in one process; every figure is the
median of several rounds over matrices that no cache holds. Errors are against numpy in float64, of the largest value.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from memory_speed import bandwidth
from onnx import TensorProto

import foldkv
from foldkv.export.contract.stacks import block_name
from foldkv.optimize.passes.row_blocks import row_blocks, take_row_blocks
from foldkv.optimize.passes.transposes import fuse_transposes
from foldkv.runtime.chain import session_options
from foldkv.runtime.weight_forms import exact_bfloat16

#: wq_b, wo_b, w1 and w2 of a shared expert.
SHAPES = ((32768, 1024), (4096, 8192), (2048, 4096), (4096, 2048))
TOKENS = (1, 8, 128)
ROUNDS = 7
FORMS = ("as stored", "float32", "bfloat16, whole", "bfloat16, blocks")
_ROLE, _BLOCK = "w", 128
_VALUES = {
    "as stored": """
        unit = Constant <value_float = 1.0> ()
        elements = DequantizeLinear (w, unit)
        tiles_shape = Constant <value_ints = [{r}, 128, {c}, 128]> ()
        grid_shape = Constant <value_ints = [{r}, 1, {c}, 1]> ()
        shape = Constant <value_ints = [{rows}, {columns}]> ()
        tiles = Reshape (elements, tiles_shape)
        factors = Reshape (scale, grid_shape)
        scaled = Mul (tiles, factors)
        values = Reshape (scaled, shape)
    """,
    "float32": "values = Identity (w)",
    "bfloat16, whole": "values = Cast <to = 1> (w)",
    "bfloat16, blocks": "values = Cast <to = 1> (w)",
}
_TYPES = {"as stored": "float8e4m3fn", "float32": "float"}


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(output: Path) -> None:
    """Measure and write the results as JSON."""
    load, speed = os.getloadavg()[0], bandwidth()
    rows = [_row(tokens, speed) for tokens in TOKENS]
    content = {
        "what": f"products with four matrices of V4-Flash, forms in turns, medians of {ROUNDS} rounds; ns for a parameter",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")} | {"foldkv": foldkv.__version__},
        "load": [load, os.getloadavg()[0]],
        "bandwidth_gb_s": round(speed, 1),
        "shapes": SHAPES,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _row(tokens: int, speed: float) -> dict[str, Any]:
    products = [_Product(number, shape, tokens) for number, shape in enumerate(SHAPES)]
    parameters = sum(rows * columns for rows, columns in SHAPES)
    took: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form in FORMS:
            start = time.monotonic()
            for product in products:
                product.run(form)
            took[form].append(time.monotonic() - start)
    found: dict[str, Any] = {"tokens": tokens}
    for form, size in zip(FORMS, (1, 4, 2, 2), strict=True):
        seconds = sorted(took[form])[ROUNDS // 2]
        found[form] = {
            "ns": round(seconds / parameters * 1e9, 3),
            "bandwidth_share": round(size * parameters / seconds / 1e9 / speed, 3),
            "error": float(f"{max(product.error(form) for product in products):.1e}"),
        }
    click.echo(json.dumps(found))
    return found


class _Product:
    """One matrix in all forms."""

    def __init__(self, seed: int, shape: tuple[int, int], tokens: int) -> None:
        rng, (rows, columns) = np.random.default_rng(seed), shape
        codes = rng.integers(0, 256, shape, dtype=np.uint8)
        codes[(codes & 127) == 127] = 0
        scales = rng.integers(110, 116, (rows // _BLOCK, columns // _BLOCK), dtype=np.uint8)
        narrow = exact_bfloat16(codes, scales, (_BLOCK, _BLOCK))
        wide = (narrow.astype(np.uint32) << 16).view(np.float32)
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        self._expected = x.astype(np.float64) @ wide.astype(np.float64).T
        self._out = {form: np.zeros((tokens, rows), np.float32) for form in FORMS}
        self._runs = {}
        factors = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        blocks = row_blocks(rows, columns, 1)
        for form in FORMS:
            model = _model(form, tokens, rows, columns)
            weights: dict[str, tuple[np.ndarray, int]] = {_ROLE: (narrow, TensorProto.BFLOAT16)}
            if form == "as stored":
                weights = {_ROLE: (codes, TensorProto.FLOAT8E4M3FN), "scale": (factors, TensorProto.FLOAT)}
            elif form == "float32":
                weights = {_ROLE: (wide, TensorProto.FLOAT)}
            elif form == "bfloat16, blocks":
                take_row_blocks(model, _ROLE, blocks, ir.DataType.BFLOAT16)
                weights = {
                    block_name(_ROLE, number): (narrow[start:end], TensorProto.BFLOAT16)
                    for number, (start, end) in enumerate(blocks.spans(rows))
                }
            fuse_transposes(model)
            options = session_options(onnxruntime, len(os.sched_getaffinity(0)), decode=tokens == 1)
            session = onnxruntime.InferenceSession(
                ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            binding = session.io_binding()
            for name, (array, kind) in (weights | {"x": (x, TensorProto.FLOAT)}).items():
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind))
            out = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(self._out[form], TensorProto.FLOAT)
            binding.bind_ortvalue_output("y", out)
            self._runs[form] = (session, binding, weights, x)

    def run(self, form: str) -> None:
        session, binding, *_ = self._runs[form]
        session.run_with_iobinding(binding)

    def error(self, form: str) -> float:
        return float(np.abs(self._out[form] - self._expected).max() / np.abs(self._expected).max())


def _model(form: str, tokens: int, rows: int, columns: int) -> ir.Model:
    r, c = rows // _BLOCK, columns // _BLOCK
    scale = f", float[{r}, {c}] scale" if form == "as stored" else ""
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    product (float[{tokens}, {columns}] x, {_TYPES.get(form, "bfloat16")}[{rows}, {columns}] w{scale})
        => (float[{tokens}, {rows}] y) {{
        {_VALUES[form].format(r=r, c=c, rows=rows, columns=columns)}
        transposed = Transpose <perm = [1, 0]> (values)
        y = MatMul (x, transposed)
    }}"""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    model = ir.serde.deserialize_model(proto)
    for node in model.graph:
        if node.outputs[0].name == "values":
            node.outputs[0].name = f"{_ROLE}.value"
    return model


if __name__ == "__main__":
    main()
