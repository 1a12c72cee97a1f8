"""The graph of one layer of a bundle, with what it takes for a text: weights, what the step gives, and an empty state.

A bundle for ONNX Runtime has the graph, and damage to it is in what comes out. A bundle of engines has none: there the layer is traced from
the checkpoint's headers as an export does it, and its weights are those that the bundle's lock names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ..export.checkpoint.formats import Format
from ..export.checkpoint.reader import Checkpoint
from ..export.checkpoint.values import dequantised
from ..export.contract.chain import CHAIN, STEP, ChainTable
from ..export.contract.lock import LOCK, Weight, WeightsLock
from ..export.contract.state import STATE_TYPES, state_tensors
from ..export.contract.weights import EXPERTS
from ..export.locate import find_weights
from ..export.operators.packed import PARTS, Matrix
from ..export.roles import DTYPE_NAMES, Packed, Plain, Sources, onnx_dtype, sources_of
from ..export.segments import TOKENS, trace_layer
from ..optimize.passes.cpu import optimize_for_cpu
from ..optimize.passes.place import take_float32
from ..runtime.buffers import StateBuffers, StateSpec
from ..runtime.chain import PAST
from ..runtime.model import Model
from ..runtime.weight_files import TYPES, WeightFiles
from .fixed_inputs import Typed

Array = npt.NDArray[Any]
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class LayerGraph:
    """A layer's graph, inlined and optimised for the cpu.

    Attributes:
        model: weights and state are inputs.
        values: of every input but the streams and the routed experts; bytes of weights are in their files.
        experts: reads the routed experts.
        weights: names of the inputs that are weights, those of the routed experts left out.
        bytes: of these weights once they are decoded.
    """

    model: ir.Model
    values: dict[str, Typed]
    experts: Experts
    weights: tuple[str, ...]
    bytes: int


class LayerGraphs:
    """Reads the layers of an open bundle; of one for engines it opens the files with weights, until it is closed."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        """Args: model: the subject; checkpoint: from which its bundle was made."""
        self._model, self._bundle, self._checkpoint = model, model.bundle, checkpoint
        self._lock = WeightsLock.read(model.bundle.folder / LOCK)
        self._files: WeightFiles | None = None
        self._sources: Sources | None = None

    def close(self) -> None:
        """Close the files that this opened."""
        if self._files is not None:
            self._files.close()
            self._files = None

    def layer(self, layer: int, tokens: Sequence[int]) -> LayerGraph:
        """The graph of a layer, and what it takes for these tokens from an empty state.

        Raises:
            InputError: weights are missing or are others.
        """
        owner, count = f"layers.{layer}", len(tokens)
        names = self._bundle.io
        given: dict[str, Array] = {
            names.input_ids: np.array([tokens], np.int64), names.positions: np.zeros(1, np.int32),
            names.num_tokens: np.full(1, count, np.int32), names.active_context: np.full(1, count, np.int64),
        }  # fmt: skip
        made = self._stored(owner, given) if self._model.chain is not None else self._traced(layer, given)
        model, weights, state = made
        buffers = StateBuffers(state, count, 1)
        values = {name: Typed.of(array) for name, array in given.items()}
        values |= {
            PAST + t.group: Typed.of(buffers.arrays[t.name], STATE_TYPES[t.dtype].onnx_type)
            for t in state.tensors
            if t.layer == layer
        }
        routed = {name for name in weights if name.startswith(f"{EXPERTS}.")}
        values |= {name: value for name, (value, _) in weights.items() if name not in routed}
        kept = tuple(name for name in weights if name not in routed)
        size = sum(weights[name][1] for name in kept)
        return LayerGraph(model, values, self._experts(owner), kept, size)

    def _stored(self, owner: str, given: dict[str, Array]) -> tuple[ir.Model, dict[str, tuple[Typed, int]], StateSpec]:
        """The first form of a segment of the bundle, which takes weights as they are stored."""
        chain, table = self._model.chain, ChainTable.read(self._bundle.folder / CHAIN)
        assert chain is not None
        [call] = [one for one in table.calls if one.owner == owner]
        step = chain.sessions[STEP]
        made = step.run(None, {name: given[name] for name in chain.inputs[STEP]})
        given |= dict(zip(chain.outputs[STEP], made, strict=True))
        weights = {
            role: (
                Typed.of(chain.files.view(bound), TYPES[bound.dtype][1]),
                prod(bound.shape) * (4 if bound.dtype == "float32" else 2),
            )
            for role, bound in table.weights[owner].items()
        }
        return ir.load(self._bundle.folder / table.segments[call.segment]), weights, self._bundle.state

    def _traced(self, layer: int, given: dict[str, Array]) -> tuple[ir.Model, dict[str, tuple[Typed, int]], StateSpec]:
        """The layer as an export traces it; its state is float32, whatever the engines keep."""
        owner, names = f"layers.{layer}", self._bundle.io
        segment = trace_layer(self._checkpoint.spec, layer, self._sources_of(), self._bundle.profile)
        weights = {}
        for role, weight in self._lock.weights[owner].items():
            if role.startswith(f"{EXPERTS}."):
                continue
            value = Typed.of(self._array(weight), int(onnx_dtype(weight)))
            if weight.dtype in _NARROW and len(weight.shape) == 1:  # a norm is one node only with a weight in float32
                take_float32(segment.model, role)
                value = Typed.of(torch.from_numpy(value.array).view(_NARROW[weight.dtype]).float().numpy())
            weights[role] = (value, prod(weight.shape) * (4 if weight.dtype == "F32" else 2))
        optimize_for_cpu(segment.model)
        given[TOKENS] = np.arange(given[names.input_ids].shape[1], dtype=np.int64)[None]
        rows = tuple(row for row in state_tensors(self._checkpoint.spec) if row.layer == layer)
        return segment.model, weights, StateSpec(rows)

    def _array(self, weight: Weight) -> Array:
        kind = np.dtype(TYPES[DTYPE_NAMES[onnx_dtype(weight)]][0])
        return read(self._weight_files(), weight, 0, weight.bytes).view(kind).reshape(weight.shape)

    def _experts(self, owner: str) -> Experts:
        return Experts(self._weight_files(), self._lock.weights[owner], self._sources_of()[owner])

    def _sources_of(self) -> Sources:
        if self._sources is None:
            self._sources = sources_of(self._checkpoint)
        return self._sources

    def _weight_files(self) -> WeightFiles:
        if self._model.chain is not None:
            return self._model.chain.files
        if self._files is None:
            self._files = WeightFiles()
            found = find_weights(self._bundle.folder, self._lock, self._bundle.manifest.inputs.checkpoint)
            for name, path in found.items():
                self._files.open(name, path, self._lock.files[name])
        return self._files


class Experts:
    """The routed experts of a layer in float32, as many as are asked for."""

    def __init__(self, files: WeightFiles, weights: dict[str, Weight], sources: dict[str, Any]) -> None:
        """Args: files: mapped; weights: of the layer, as the bundle's lock has them; sources: how they are stored."""
        self._files, self._weights = files, weights
        packed = sources.get(EXPERTS)
        self._packed: Packed | None = packed if isinstance(packed, Packed) else None
        if self._packed is not None:
            shapes = {part: matrix.shape for part, matrix in self._packed.matrices}
            self.inner, self.width = shapes["w1"]
            self._exact = self._packed.scales.dtype != "F32"
        else:
            plain = sources[f"{EXPERTS}.w13"]
            assert isinstance(plain, Plain)
            self.inner, self.width = plain.weight.shape[1] // 2, plain.weight.shape[2]
            self._exact = plain.weight.dtype == "BF16"

    @property
    def bytes(self) -> int:
        """Of an expert, once it is decoded."""
        return 3 * self.inner * self.width * (2 if self._exact else 4)

    def read(self, numbers: Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
        """w1 and w3 [E, C, I], and w2 [E, I, C], of some experts."""
        found = [self._expert(number) for number in numbers]
        return {part: np.stack([np.ascontiguousarray(one[part].T) for one in found]) for part in PARTS}

    def _expert(self, number: int) -> dict[str, npt.NDArray[np.float32]]:
        if self._packed is not None:
            return {part: self._decoded(number, matrix, self._packed.format) for part, matrix in self._packed.matrices}
        both, w2 = (self._plain(f"{EXPERTS}.{name}", number) for name in ("w13", "w2"))
        return {"w1": both[: self.inner], "w3": both[self.inner :], "w2": w2}

    def _plain(self, role: str, number: int) -> npt.NDArray[np.float32]:
        weight = self._weights[role]
        _, rows, columns = weight.shape
        size = weight.bytes // weight.shape[0]
        data = read(self._files, weight, number * size, size)
        kind = _NARROW.get(weight.dtype, torch.float32)
        return torch.from_numpy(data).view(kind).reshape(rows, columns).float().numpy()

    def _decoded(self, number: int, matrix: Matrix, format_: str) -> npt.NDArray[np.float32]:
        codes, scales = (self._weights[f"{EXPERTS}.{name}"] for name in ("codes", "scales"))
        form = Format(format_, (matrix.shape[0] // matrix.grid[0], matrix.shape[1] // matrix.grid[1]))
        stored, grid = form.stored_shape(matrix.shape), matrix.grid
        wide = 4 if scales.dtype == "F32" else 1
        row, scale_row = (one.bytes // one.shape[0] for one in (codes, scales))
        code = read(self._files, codes, number * row + matrix.codes, prod(stored))
        scale = read(self._files, scales, number * scale_row + wide * matrix.scales, wide * prod(grid))
        return dequantised(
            torch.from_numpy(code).view(torch.uint8 if form.stored_shape((1, 2)) == (1, 1) else torch.float8_e4m3fn).reshape(stored),
            torch.from_numpy(scale).view(torch.float32 if wide == 4 else torch.float8_e8m0fnu).reshape(tuple(grid)),
            form,
        ).numpy()  # fmt: skip


def read(files: WeightFiles, weight: Weight, start: int, size: int) -> npt.NDArray[np.uint8]:
    """A copy of some bytes of a weight, whose parts lie one after the other."""
    found, at = [], 0
    for part in weight.parts:
        low, high = max(start, at), min(start + size, at + part.bytes)
        if low < high:
            found.append(files.range(part.file, part.offset + low - at, high - low))
        at += part.bytes
    return np.concatenate(found)
