"""Read weights from a package's files, and from nowhere else.

onnx and onnx_ir refuse files with a second name, and a package's hard-linked files have one. Those are as good as copies.
What must not be followed is a path or a symbolic link out of the package: it is refused here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..artifact import confined
from ..errors import ArtifactError


def read_values(tensor: ir.TensorProtocol) -> np.ndarray:
    """The values of a tensor. For a tensor in a file of a package (the folder ``base_dir``), only its own bytes are read.

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
    """Read weights in a package's files on demand, and release each after use; changes the model in place."""
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
