"""Calls of the routed experts in every form: drawn weights as stored, and what their definition gives in float64.

The last expert is never chosen; its weights are NaN where its format has that. Rows of packed weights lie in an order of
their own, and one token names an expert twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from foldkv.export.checkpoint.formats import FP4, FP4_GROUP, FP8, FP8_BLOCK, Format
from foldkv.export.checkpoint.values import dequantised
from foldkv.export.contract.operators import PACKED_EXPERTS, ROUTED_EXPERTS
from foldkv.export.contract.weights import E2M1, EXPONENT

_HALF_BFLOAT16, _HALF_SINGLE = 2.0**-8, 2.0**-24  # relative half unit in the last place
_SILU_SLOPE = 1.1  # the largest derivative of silu is 1.0998


class Drawing(Protocol):
    """Random values, see ``cases.Draw``."""

    def normal(self, *shape: int) -> Tensor: ...
    def uniform(self, *shape: int) -> Tensor: ...
    def bytes(self, *shape: int) -> Tensor: ...
    def permutation(self, count: int) -> Tensor: ...


@dataclass(frozen=True)
class ExpertSizes:
    """Channels of a token and of an expert, experts, and how many a token chooses."""

    hidden: int
    inner: int
    count: int
    chosen: int


@dataclass(frozen=True)
class ExpertCall:
    """Inputs and attributes of a call; ``expected`` gives y [T, C] float64 and a bound for each of its values."""

    inputs: list[Tensor]
    attributes: dict[str, Any]
    expected: Callable[[], tuple[Tensor, Tensor]]


def expert_call(
    operator: str, draw: Drawing, of: ExpertSizes, tokens: int, *, limit: float = 1.0, gap: int = 0,
    chosen: Tensor | None = None,
) -> ExpertCall:  # fmt: skip
    """A call of the form ``operator``.

    Args:
        operator: ONNX name.
        draw: gives weights and activations.
        of: the sizes.
        tokens: T.
        limit: of the clamped SwiGLU; it bites at 1.
        gap: unused elements before the matrices in a row of packed codes and of scales.
        chosen: [T, K] int64; the default is drawn.
    """
    if chosen is None:
        chosen = torch.stack([draw.permutation(max(of.count - 1, 1))[: of.chosen] for _ in range(tokens)])
        chosen[tokens // 2] = chosen[tokens // 2, 0]
    x, weights = draw.normal(tokens, of.hidden), draw.normal(tokens, of.chosen)
    shapes = {"w1": (of.inner, of.hidden), "w2": (of.hidden, of.inner), "w3": (of.inner, of.hidden)}
    if operator == ROUTED_EXPERTS:
        parts = {part: (draw.normal(of.count, *shape) / 8).bfloat16() for part, shape in shapes.items()}
        for stack in parts.values():
            stack[-1] = torch.nan
        stored, attributes = [torch.cat((parts["w1"], parts["w3"]), dim=1), parts["w2"]], {"limit": limit}

        def read(expert: int) -> dict[str, Tensor]:
            return {part: stack[expert].double() for part, stack in parts.items()}

    else:
        packed = _Packed.drawn(operator, draw, of.count, shapes, gap)
        slots = draw.permutation(of.count)
        stored = [packed.codes[slots.argsort()], packed.scales[slots.argsort()], slots]
        attributes, read = {"limit": limit, **packed.places}, packed.read
    inputs = [x, chosen, weights, *stored]
    return ExpertCall(inputs, attributes, lambda: _defined(x, chosen, weights, read, limit))


@dataclass(frozen=True)
class _Packed:
    """Rows of codes and scales in the order of the experts, and where the matrices are in a row."""

    format: Format
    shapes: dict[str, tuple[int, int]]
    codes: Tensor
    scales: Tensor
    places: dict[str, tuple[int, ...]]

    @classmethod
    def drawn(cls, operator: str, draw: Drawing, count: int, shapes: dict[str, tuple[int, int]], gap: int) -> _Packed:
        """Random codes, without those of NaN, and scales that let gate and up reach the limit."""
        [(weight, scale)] = [formats for formats, name in PACKED_EXPERTS.items() if name == operator]
        kind = Format(FP4, (1, FP4_GROUP)) if weight == E2M1 else Format(FP8, FP8_BLOCK)
        codes, scales = [draw.bytes(count, gap)], [_scales(draw, weight, scale, count, gap)]
        places: dict[str, list[int]] = {"codes_at": [], "scales_at": [], "shapes": [], "grids": []}
        for shape in shapes.values():
            places["codes_at"].append(sum(one.shape[1] for one in codes))
            places["scales_at"].append(sum(one.shape[1] for one in scales))
            rows, columns = kind.stored_shape(shape)
            grid = kind.scale_shape(shape)
            places["shapes"] += shape
            places["grids"] += grid
            code = draw.bytes(count, rows * columns)
            # Half of the exponents: subnormal values and those up to 1.9, no NaN.
            codes.append(code if weight == E2M1 else code & 0xBF)
            scales.append(_scales(draw, weight, scale, count, grid[0] * grid[1]))
        scales[-1][-1] = torch.nan if scale != EXPONENT else 255
        return cls(
            kind, shapes, torch.cat(codes, dim=1).view(torch.int8),
            torch.cat(scales, dim=1) if scale != EXPONENT else torch.cat(scales, dim=1).view(torch.int8),
            {name: tuple(values) for name, values in places.items()},
        )  # fmt: skip

    def read(self, expert: int) -> dict[str, Tensor]:
        """The matrices of an expert in float64."""
        found = {}
        for i, (part, shape) in enumerate(self.shapes.items()):
            stored, grid = self.format.stored_shape(shape), self.places["grids"][2 * i : 2 * i + 2]
            at, scale_at = self.places["codes_at"][i], self.places["scales_at"][i]
            codes = self.codes[expert, at : at + stored[0] * stored[1]].reshape(stored)
            scale = self.scales[expert, scale_at : scale_at + grid[0] * grid[1]].reshape(grid)
            codes = codes if self.format.name == FP4 else codes.view(torch.float8_e4m3fn)
            scale = scale.view(torch.uint8) if scale.dtype == torch.int8 else scale
            found[part] = dequantised(codes, scale, self.format).double()
        return found


def _scales(draw: Drawing, weight: str, format_: str, *shape: int) -> Tensor:
    """From 2^-6 to 2^-3 for e2m1, which has larger elements, and 16 times as much for e4m3: bytes of exponents, or float32."""
    least = -6 if weight == E2M1 else -2
    if format_ == EXPONENT:
        return 127 + least + (draw.bytes(*shape) & 3)
    return (draw.uniform(*shape) * 7 + 1) * 2.0**least


def _defined(
    x: Tensor, chosen: Tensor, weights: Tensor, read: Callable[[int], dict[str, Tensor]], limit: float
) -> tuple[Tensor, Tensor]:
    """The definition (export/operators/experts.py) expert by expert, and how far rounding can carry a kernel from it.

    Kernels round x and the hidden values to bfloat16; products, sums and what is between them are float32. The error of each
    value is bounded by the same products of magnitudes.
    """
    total = torch.zeros(x.shape, dtype=torch.float64)
    bound, size = torch.zeros_like(total), torch.zeros_like(total)
    for expert in chosen.unique().tolist():
        matrices = read(expert)
        token, place = (chosen == expert).nonzero(as_tuple=True)
        given, share = x[token].double(), weights[token, place].double()[:, None]
        unit = _HALF_BFLOAT16 + (x.shape[1] + 2) * _HALF_SINGLE
        gate, up = (given @ matrices[part].T for part in ("w1", "w3"))
        gate_off, up_off = (unit * (given.abs() @ matrices[part].abs().T) for part in ("w1", "w3"))
        silu, bounded = torch.nn.functional.silu(gate.clamp(max=limit)), up.clamp(-limit, limit)
        hidden = silu * bounded
        off = _SILU_SLOPE * gate_off * (bounded.abs() + up_off) + silu.abs() * up_off
        off += (_HALF_BFLOAT16 + 8 * _HALF_SINGLE) * (hidden.abs() + off)
        row, reach = hidden @ matrices["w2"].T, matrices["w2"].abs().T
        row_off = off @ reach + (hidden.shape[1] + 2) * _HALF_SINGLE * ((hidden.abs() + off) @ reach)
        total.index_add_(0, token, share * row)
        bound.index_add_(0, token, share.abs() * row_off)
        size.index_add_(0, token, share.abs() * (row.abs() + row_off))
    return total, bound + (chosen.shape[1] + 1) * _HALF_SINGLE * size
