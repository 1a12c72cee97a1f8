"""A graph package as one model with its weights, for plain ONNX Runtime: what tests compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from foldkv.artifact import staged
from foldkv.export.package import read_package
from foldkv.export.stitch import bind_weights, flat_model


def whole_model(graph: Path, out: Path) -> Path:
    """Write ``out/model.onnx``, flat, with the weights of the package beside it, unless it is there; returns its path."""
    if not out.exists():
        package = read_package(graph)
        model = bind_weights(ir.from_proto(flat_model(package)), package.lock, package.find_weights())
        for value in model.graph.initializers.values():  # onnx_ir itself reads no file that has a second name
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.Tensor(read_external(value.const_value), dtype=value.dtype, name=value.name)
        with staged(out, kind="test") as folder:
            ir.save(model, folder / "model.onnx", external_data="weights.bin")
    return out / "model.onnx"


def read_external(tensor: ir.ExternalTensor) -> np.ndarray:
    """The values of a tensor in a file."""
    with (Path(tensor.base_dir) / str(tensor.location)).open("rb") as file:
        file.seek(tensor.offset or 0)
        return np.frombuffer(file.read(tensor.nbytes), tensor.dtype.numpy()).reshape([int(n) for n in tensor.shape])


def first_chunk(graph: Path, ids: np.ndarray, context: int) -> dict[str, np.ndarray]:
    """Inputs of a whole model for one chunk [1, n] from the start; caches hold nothing yet, so they are NaN."""
    count = ids.shape[1]
    feeds = {
        "input_ids": ids, "positions": np.zeros(1, np.int32), "num_tokens": np.full(1, count, np.int32),
        "active_context": np.array([count]), "logit_indices": np.arange(count)[None],
    }  # fmt: skip
    for row in read_package(graph).state:
        feeds[row.input] = np.full((1, row.capacity(context), row.width), np.nan, np.float32)
    return feeds


def logits(model: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [1, n, V] of a whole model."""
    result: np.ndarray = opened(model).run(["logits"], feeds)[0]
    return result


def opened(model: Path) -> onnxruntime.InferenceSession:
    """A model in ONNX Runtime, on one thread: tests run beside each other, and threads that wait take their time."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
