"""Which tensors of a checkpoint are the model's: one error lists everything missing, unexpected or of a wrong shape.

It comes from the headers, before any weight is read.
"""

from __future__ import annotations

from ..errors import CheckpointError, listing
from .checkpoint.formats import PLAIN, SCALE_DTYPES
from .checkpoint.names import scale_name
from .checkpoint.reader import Checkpoint
from .checkpoint.storage import unread_tensors
from .model.decoder import parameter_shapes

_READABLE = ("F32", "BF16", "F16", "I64", "I32")


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compare the tensors of a checkpoint with what its model needs.

    Raises:
        CheckpointError: missing, unexpected, wrongly shaped or unreadable tensors, all listed.
    """
    expected = _expected(checkpoint)
    scales = {scale_name(name) for name in expected if _quantised(checkpoint, name)}
    problems = []
    for name, shape in expected.items():
        if name not in checkpoint.headers:
            problems.append(f"missing tensor {name} {list(shape)}")
        else:
            problems += _misfits(checkpoint, name, shape)
    problems += [
        f"unexpected tensor {name} {list(stored.shape)} in {stored.file.name}"
        for name, stored in checkpoint.headers.items()
        if name not in expected and name not in scales
    ]
    if problems and (found := unread_tensors(checkpoint.headers)):
        raise CheckpointError(found.message(checkpoint.folder))
    if problems:
        raise CheckpointError(
            listing(
                f"{checkpoint.folder} does not fit its config.json",
                problems,
                "Check that config.json belongs to these weights and that the download is complete.",
            )
        )


def _quantised(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.headers and (found := checkpoint.format(name)) is not None and found.name != PLAIN


def _misfits(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> list[str]:
    """Why a tensor, with its scale, is not a value of that shape."""
    stored = checkpoint.headers[name]
    found = checkpoint.format(name)
    if found is None or found.name == PLAIN:
        problems = (
            [] if stored.shape == shape else [f"tensor {name} has shape {list(stored.shape)}; expected {list(shape)}"]
        )
        if stored.dtype not in _READABLE:
            problems.append(f"tensor {name} has dtype {stored.dtype}; expected one of {', '.join(_READABLE)}")
        return problems
    problems = []
    wanted = found.stored_shape(shape)
    if stored.shape != wanted:
        problems.append(
            f"tensor {name} has shape {list(stored.shape)}; expected {list(wanted)} for {found.name} ({stored.dtype})"
        )
    scale = checkpoint.headers.get(scale_name(name))
    if scale is None:
        return [
            *problems,
            f"tensor {name} has dtype {stored.dtype} but no scale; missing tensor {scale_name(name)} {list(found.scale_shape(shape))}",
        ]
    if scale.shape != found.scale_shape(shape):
        problems.append(
            f"scale {scale_name(name)} has shape {list(scale.shape)}; expected {list(found.scale_shape(shape))}: "
            f"one per {found.block[0]} x {found.block[1]} of {list(shape)}"
        )
    if scale.dtype not in SCALE_DTYPES:
        problems.append(f"scale {scale_name(name)} has dtype {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}")
    return problems


def _expected(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    needed = parameter_shapes(checkpoint.spec)
    stacked = {name for name in needed if name.endswith((".experts.w13", ".experts.w2"))}
    if stacked & checkpoint.headers.keys():
        return needed
    inner, hidden = checkpoint.spec.moe_intermediate_size, checkpoint.spec.hidden_size
    for name in stacked:
        del needed[name]
        if name.endswith(".w2"):
            continue
        for expert in range(checkpoint.spec.num_experts):
            prefix = f"{name.removesuffix('.w13')}.{expert}"
            needed |= {
                f"{prefix}.w1.weight": (inner, hidden),
                f"{prefix}.w3.weight": (inner, hidden),
                f"{prefix}.w2.weight": (hidden, inner),
            }
    return needed


def expert_parts(name: str, checkpoint: Checkpoint) -> dict[str, tuple[int | slice, ...]]:
    """The single experts' tensors in a stacked one, with their places; none if the file has the stacked tensor itself."""
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts") or name in checkpoint.headers:
        return {}
    inner = checkpoint.spec.moe_intermediate_size
    rows = {"w1": slice(0, inner), "w3": slice(inner, 2 * inner)} if kind == "w13" else {"w2": slice(None)}
    return {
        f"{prefix}.{expert}.{part}.weight": (expert, place)
        for expert in range(checkpoint.spec.num_experts)
        for part, place in rows.items()
    }
