"""Weights that lie in a package's files, read from there and nowhere else.

onnx and onnx_ir read no file that has a second name, and the files of a checkpoint that a package links have one. A link into
the package is as good as a copy; what must not be followed is a path or a symbolic link out of it, which is refused here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from foldkv.artifact import confined
from foldkv.errors import ArtifactError


def read_values(tensor: ir.TensorProtocol) -> np.ndarray:
    """The values of a tensor; of one in a file of a package, whose folder is its ``base_dir``, no other byte is read.

    Raises:
        ArtifactError: its file leads out of the folder, or ends within the tensor.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    path, offset = confined(Path(tensor.base_dir), str(tensor.location)), tensor.offset or 0
    if tensor.length is not None and tensor.length != tensor.nbytes:
        raise ArtifactError(
            f"{path}: weight {tensor.name} has {tensor.nbytes} bytes; the graph says {tensor.length}. Export it again."
        )
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(tensor.nbytes)
    if len(content) < tensor.nbytes:
        raise ArtifactError(
            f"{path} ends within weight {tensor.name}, at byte {offset} of it. Export the checkpoint again."
        )
    return np.frombuffer(content, tensor.dtype.numpy()).reshape([int(size) for size in tensor.shape])


def read_lazily(model: ir.Model, folder: Path) -> ir.Model:
    """Let weights in files of a package be read when they are asked for, each then let go; changes the model in place."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder
            value.const_value = _lazy(tensor)
    return model


def _lazy(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        return ir.Tensor(read_values(tensor), name=tensor.name)

    return ir.LazyTensor(read, tensor.dtype, ir.Shape(tensor.shape), name=tensor.name)
