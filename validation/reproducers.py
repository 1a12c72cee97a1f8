"""One layer of a bundle as an ONNX model with its weights, inputs and what the reference makes of them, for Polygraphy.

So a layer that computes something else can be run alone, in ONNX Runtime or as a TensorRT engine, without foldkv and without the
checkpoint. https://github.com/NVIDIA/TensorRT/tree/main/tools/Polygraphy
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..export.contract.chain import STEP, Bound, Call
from ..runtime.buffers import StateBuffers
from ..runtime.chain import AFTER, PAST, STREAMS, ChainModel
from ..runtime.model import Model
from ..runtime.weight_files import TYPES, WeightFiles
from ..units import size_text
from .divergence import DIVERGED, Streams

#: The folder in a report, and the files of a case.
FOLDER = "reproducers"
SEGMENT, WEIGHTS, INPUTS, OUTPUTS, README = "segment.onnx", "weights.bin", "inputs.json", "outputs.json", "README.md"
#: Bytes of the largest weights that are copied.
LARGEST = 1 << 30
_ALIGNMENT = 64
_ENGINES = "a bundle with engines holds no graph; validate the cpu bundle of the same checkpoint for it"


@dataclass(frozen=True)
class Reproducer:
    """A case.

    Attributes:
        name: of its folder in the report's ``reproducers/``.
        why: what it shows.
        layer: the layer's number.
        tokens: of the text before and in the chunk; all go through the layer at once, from an empty state.
        reference: what computed the outputs.
        atol: how far a value may be away: DIVERGED times the root mean square of the outputs.
        bytes: of the weights.
        not_saved: why there is no folder; None if there is one.
        commands: to run in the folder.
    """

    name: str
    why: str
    layer: int
    tokens: int
    reference: str
    atol: float
    bytes: int
    not_saved: str | None
    commands: tuple[str, ...]


class Reproducers:
    """The cases of one report."""

    def __init__(self, folder: Path, model: Model, *, largest: int = LARGEST) -> None:
        """Args: folder: of the report; model: the subject, opened; largest: bytes of weights that may be copied."""
        self._folder, self._largest = folder / FOLDER, largest
        self._bundle = model.bundle
        self._chain = model.chain
        self.rows: list[Reproducer] = []

    @property
    def possible(self) -> bool:
        """Whether the bundle has graphs to save."""
        return self._chain is not None

    def save(
        self, name: str, why: str, *, layer: int, tokens: Sequence[int], before: Streams, expected: Streams, reference: str
    ) -> None:  # fmt: skip
        """Save a case, or note why it is not saved.

        Args:
            name: of the folder.
            why: what the case shows.
            layer: the layer.
            tokens: [n] from the beginning of a text.
            before: [n, N, C] the subject's streams before the layer.
            expected: [n, N, C] what the reference makes of them.
            reference: its name.

        Raises:
            OSError: the folder cannot be written.
        """
        atol = DIVERGED * float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
        size, missing = 0, _ENGINES
        if self._chain is not None:
            [call] = [one for one in self._chain.table.calls if one.layer == layer]
            size = sum(bound.bytes for bound in self._chain.table.weights[call.owner].values())
            missing = (
                f"its weights take {size_text(size)}, more than {size_text(self._largest)}"
                if size > self._largest
                else ""
            )
        row = Reproducer(
            name, why, layer, len(tokens), reference, atol, size, missing or None, () if missing else _commands(atol)
        )
        if self._chain is not None and not missing:
            self._write(self._chain, call, row, tokens, before, expected)
        self.rows.append(row)

    def _write(
        self, chain: ChainModel, call: Call, row: Reproducer, tokens: Sequence[int], before: Streams, expected: Streams
    ) -> None:  # fmt: skip
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER

        folder = self._folder / row.name
        folder.mkdir(parents=True)
        weights = chain.table.weights[call.owner]
        model = onnx.load(self._bundle.folder / chain.table.segments[call.segment])
        kept = [value for value in model.graph.input if value.name not in weights]
        [after] = [value for value in model.graph.output if value.name in (AFTER, STREAMS)]
        del model.graph.input[:], model.graph.output[:]
        model.graph.input.extend(kept)
        model.graph.output.append(after)
        model.graph.initializer.extend(_externals(chain.files, weights, folder / WEIGHTS))
        onnx.save(model, folder / SEGMENT)
        given = self._inputs(chain, call, tokens, before)
        results = RunResults()
        results.add([{after.name: np.ascontiguousarray(expected[None])}], runner_name=row.reference)
        with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it says what it saves, also on stdout
            save_json([given], str(folder / INPUTS))
            results.save(str(folder / OUTPUTS))
        (folder / README).write_text(_readme(row), encoding="utf-8")

    def _inputs(
        self, chain: ChainModel, call: Call, tokens: Sequence[int], before: Streams
    ) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
        """What the segment takes besides weights: the streams, what the step makes of the tokens, and an empty state."""
        names, count = self._bundle.io, len(tokens)
        values: dict[str, npt.NDArray[Any]] = {
            names.input_ids: np.array([tokens], np.int64), names.positions: np.zeros(1, np.int32),
            names.num_tokens: np.full(1, count, np.int32), names.active_context: np.full(1, count, np.int64),
            names.logit_indices: np.zeros((1, 1), np.int64), STREAMS: np.ascontiguousarray(before[None]),
        }  # fmt: skip
        step = chain.sessions[STEP]
        made = step.run(None, {name: values[name] for name in chain.inputs[STEP]})
        values |= dict(zip(chain.outputs[STEP], made, strict=True))
        state = StateBuffers(self._bundle.state, count, 1)
        values |= {PAST + t.group: state.arrays[t.name] for t in self._bundle.state.tensors if t.layer == call.layer}
        weights = chain.table.weights[call.owner]
        return {name: values[name] for name in chain.inputs[call.segment] if name not in weights}


def _externals(files: WeightFiles, weights: dict[str, Bound], path: Path) -> list[onnx.TensorProto]:
    """Write weights into one file, as they are stored, and return the initializers that read it."""
    found = []
    with path.open("wb") as file:
        for role, bound in weights.items():
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            tensor = onnx.TensorProto(
                name=role, data_type=TYPES[bound.dtype][1], dims=bound.shape, data_location=onnx.TensorProto.EXTERNAL
            )
            facts = {"location": path.name, "offset": str(file.tell()), "length": str(bound.bytes)}
            tensor.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=value) for key, value in facts.items()
            )
            file.write(files.range(bound.file, bound.offset, bound.bytes).data)
            found.append(tensor)
    return found


def _commands(atol: float) -> tuple[str, ...]:
    run = ["polygraphy", "run", SEGMENT, "--onnxrt", "--load-inputs", INPUTS, "--load-outputs", OUTPUTS]
    return (
        shlex.join([*run, "--atol", f"{atol:.4g}", "--rtol", "0"]),
        shlex.join(["polygraphy", "inspect", "model", SEGMENT, "--show", "layers"]),
    )


def _readme(row: Reproducer) -> str:
    lines = "\n".join(row.commands)
    return f"""# Layer {row.layer} alone: {row.why}

- `{SEGMENT}`: the segment that the bundle ran, with its weights in `{WEIGHTS}`
- `{INPUTS}`: the streams of {row.tokens} tokens before the layer, as the bundle computed them, and an empty state; all tokens go through at once
- `{OUTPUTS}`: what {row.reference} makes of them

```sh
{lines}
```

The first command fails if a value is more than {row.atol:.4g} away: {DIVERGED:g} times the root mean square of the outputs.
"""
