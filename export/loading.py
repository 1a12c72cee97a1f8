"""The decoder with the weights of a checkpoint, in float32: for parity, for reports and for tracing small models whole."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError, listing
from .checkpoint.formats import PLAIN
from .checkpoint.names import scale_name
from .checkpoint.reader import Checkpoint
from .checkpoint.values import dequantised, read_tensor, scale_values
from .contract.profiles import HF
from .model.decoder import Decoder, parameter_shapes
from .tensor_table import check_tensors, expert_parts


def decoder_from_checkpoint(checkpoint: Checkpoint, profile: str = HF) -> Decoder:
    """The model with its weights in float32, ready to run or to trace.

    Quantised weights are dequantised one tensor at a time, experts directly into their stack. So memory never has more than
    the model and one tensor.

    Raises:
        CheckpointError: the tensors do not fit the config (see :func:`~foldkv.export.tensor_table.check_tensors`), or a value or a scale is NaN
            or infinite.
    """
    check_tensors(checkpoint)
    with torch.device("meta"):
        model = Decoder(checkpoint.spec, profile)
    problems: list[str] = []
    values: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(checkpoint.spec).items():
        parts = expert_parts(name, checkpoint)
        target = torch.empty(shape) if parts else None
        for part, place in (parts or {name: ()}).items():
            try:
                value = weight_value(checkpoint, part)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
            problems += _unusable(part, value, checkpoint.spec.num_experts)
            if target is None:
                values[name] = value
            else:
                target[place] = value
                values[name] = target
    if problems:
        raise CheckpointError(
            listing(f"{checkpoint.folder} has unusable weights", problems, "Download the weights again.")
        )
    model.load_state_dict(values, assign=True)
    return model.eval().requires_grad_(False)


def weight_value(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the decoder by its released name: dequantised to float32 if it is quantised, otherwise as stored.

    Raises:
        CheckpointError: it cannot be read, or its scale is NaN, infinite or not above zero.
    """
    stored = read_tensor(checkpoint.headers[name])
    found = checkpoint.format(name)
    if found is None or found.name == PLAIN:
        return stored
    scale = read_tensor(checkpoint.headers[scale_name(name)])
    values = scale_values(scale)
    if not bool((values.isfinite() & (values > 0)).all()):
        raise CheckpointError(f"scale {scale_name(name)} contains NaN, infinite or non-positive values")
    return dequantised(stored, scale, found)


def _unusable(name: str, value: Tensor, experts: int) -> list[str]:
    if value.is_floating_point():
        return [] if bool(value.isfinite().all()) else [f"tensor {name} contains NaN or infinite values"]
    if name.endswith("tid2eid") and bool((value < 0).any() or (value >= experts).any()):
        return [f"tensor {name} names experts outside 0..{experts - 1}"]
    return []
