"""One layer of a bundle as an ONNX model with its weights, inputs and what the reference makes of them, for Polygraphy.

So a layer that computes something else can be run alone, in ONNX Runtime or as a TensorRT engine, without foldkv and without the
checkpoint. https://github.com/NVIDIA/TensorRT/tree/main/tools/Polygraphy

The model has standard operators only and is for one text: what does not depend on the streams is constant, weights are decoded, and of the
routed experts there are those that the compared tokens chose.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from ..errors import FoldkvError
from ..export.checkpoint.reader import Checkpoint
from ..optimize.passes.standard import routed_of, use_standard_operators, write_experts_out
from ..runtime.backend import default_threads
from ..runtime.chain import AFTER, STREAMS
from ..runtime.model import Model
from ..units import size_text
from .divergence import DIVERGED, Streams, token_errors
from .fixed_inputs import Typed, as_constants, run_graph, widen_bytes, with_fixed_inputs
from .layer_graph import LayerGraph, LayerGraphs

#: The folder in a report, and the files of a case.
FOLDER = "reproducers"
SEGMENT, WEIGHTS, README, PLAN = "segment.onnx", "weights.bin", "README.md", "segment.plan"
#: The streams before the layer; those after it by the reference, and by the bundle.
INPUTS, OUTPUTS, BUNDLE = "inputs.json", "outputs.json", "bundle.json"
#: Bytes of the largest weights that are written.
LARGEST = 1 << 30
_LOOSE = "A bundle of this precision may be further away than that for single tokens, which take another expert or another entry."


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
        bytes: of the weights that were written.
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
    """The cases of one report. A context manager: files with weights that it opens are closed at the end."""

    def __init__(self, folder: Path, model: Model, checkpoint: Checkpoint, *, largest: int = LARGEST) -> None:
        """Args: folder: of the report; model: the subject, opened; checkpoint: of its bundle; largest: bytes of weights that may be
        written."""
        self._folder, self._largest = folder / FOLDER, largest
        self._model, self._graphs = model, LayerGraphs(model, checkpoint)
        self.rows: list[Reproducer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._graphs.close()

    def save(
        self, name: str, why: str, *, layer: int, tokens: Sequence[int], before: Streams, expected: Streams, actual: Streams,
        reference: str, limit: float = DIVERGED,
    ) -> None:  # fmt: skip
        """Save a case, or note why it is not saved.

        If the experts of all tokens take too much, the tokens with the largest errors are compared, as many as fit.

        Args:
            name: of the folder.
            why: what the case shows.
            layer: the layer.
            tokens: [n] from the beginning of a text.
            before: [n, N, C] the subject's streams before the layer.
            expected: [n, N, C] what the reference makes of them.
            actual: [n, N, C] what the subject makes of them.
            reference: its name.
            limit: the largest error of the layer in the bundle's precision, over the root mean square of the outputs.

        Raises:
            OSError: the folder cannot be written.
        """
        scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
        facts = (name, why, layer, len(tokens), reference, DIVERGED * scale)
        try:
            case = self._case(layer, tokens, before, token_errors(expected, actual))
        except FoldkvError as error:
            self.rows.append(Reproducer(*facts, 0, str(error).rstrip("."), ()))
            return
        loose = max(limit, DIVERGED) * scale
        commands = (_run(OUTPUTS, DIVERGED * scale), _run(BUNDLE, loose), _inspect(SEGMENT))
        folder = self._folder / name
        folder.mkdir(parents=True)
        with (folder / WEIGHTS).open("wb") as file:
            as_constants(case.model, case.constants, file, WEIGHTS, always=case.weights)
            size = file.tell()
        onnx.save(case.model, folder / SEGMENT)
        row = Reproducer(*facts, size, None, commands)
        rows = case.rows
        _write_arrays(folder, before, {OUTPUTS: (reference, expected[rows]), BUNDLE: ("the bundle", actual[rows])})
        engine = self._model.bundle.backend.engine
        (folder / README).write_text(_readme(row, case, loose, engine=engine), encoding="utf-8")
        self.rows.append(row)

    def _case(self, layer: int, tokens: Sequence[int], before: Streams, errors: npt.NDArray[np.float64]) -> _Case:
        found = self._graphs.layer(layer, tokens)
        streams, threads = np.ascontiguousarray(before[None]), default_threads()
        values = found.values | {STREAMS: Typed.of(streams)}
        routed = routed_of(found.model)
        assert routed.chosen.name is not None
        asked = run_graph(ir.to_proto(found.model), values, [routed.chosen.name], threads=threads)
        chosen = asked[routed.chosen.name].reshape(len(tokens), -1)
        rows = self._rows(found, chosen, errors)
        numbers = [int(one) for one in np.unique(chosen[rows])]
        inputs = write_experts_out(found.model, routed, len(numbers), found.experts.inner)
        use_standard_operators(found.model)
        experts: dict[str, npt.NDArray[Any]] = {"numbers": np.array(numbers, np.int64).reshape(-1, 1, 1)}
        experts |= found.experts.read(numbers)
        values |= {value.name: Typed.of(experts[part]) for part, value in inputs.items() if value.name is not None}
        model = ir.to_proto(found.model)
        _keep_streams(model, before.shape, rows)
        model, constants = with_fixed_inputs(model, values, {STREAMS: streams}, threads=threads)
        widen_bytes(model, constants)
        return _Case(model, constants, found.weights, rows, len(numbers))

    def _rows(self, found: LayerGraph, chosen: npt.NDArray[np.int64], errors: npt.NDArray[np.float64]) -> list[int]:
        """The tokens that are compared, those with the largest errors first if there is no room for the experts of all."""
        room = (self._largest - found.bytes) // found.experts.bytes
        kept: set[int] = set()
        rows = []
        for token in np.argsort(-errors, kind="stable"):
            together = kept | set(map(int, chosen[token]))
            if len(together) <= room:
                kept = together
                rows.append(int(token))
        if not rows:
            least = found.bytes + len(set(map(int, chosen[int(np.argmax(errors))]))) * found.experts.bytes
            raise FoldkvError(
                f"the weights that a single token takes are {size_text(least)}, more than {size_text(self._largest)}"
            )
        return sorted(rows)


@dataclass(frozen=True)
class _Case:
    """A model whose inputs are the streams and its constants, and what it compares.

    ``weights`` are names of constants that are written beside the model whatever their size; ``rows`` are the compared tokens;
    ``experts`` is the number of routed experts that are left.
    """

    model: onnx.ModelProto
    constants: dict[str, Typed]
    weights: tuple[str, ...]
    rows: list[int]
    experts: int


def _keep_streams(model: onnx.ModelProto, shape: tuple[int, ...], rows: Sequence[int]) -> None:
    """Let a segment give nothing but the streams [1, n, N, C] after some tokens, in place; what only the state takes is dropped later."""
    graph = model.graph
    [after] = [value.name for value in graph.output if value.name in (AFTER, STREAMS)]
    if len(rows) < shape[0]:
        inner = f"{after}.all"
        for node in graph.node:
            for at, name in enumerate(node.output):
                if name == after:
                    node.output[at] = inner
        graph.initializer.append(numpy_helper.from_array(np.array(rows, np.int64), f"{after}.rows"))
        graph.node.append(helper.make_node("Gather", [inner, f"{after}.rows"], [after], name=f"{after}.gather", axis=1))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(after, onnx.TensorProto.FLOAT, [1, len(rows), *shape[1:]]))


def _write_arrays(folder: Path, before: Streams, outputs: dict[str, tuple[str, Streams]]) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it says what it saves, also on stdout
        save_json([{STREAMS: np.ascontiguousarray(before[None])}], str(folder / INPUTS))
        for file, (name, streams) in outputs.items():
            results = RunResults()
            results.add([{AFTER: np.ascontiguousarray(streams[None])}], runner_name=name)
            results.save(str(folder / file))


def _run(outputs: str, atol: float, *runner: str) -> str:
    words = [
        "polygraphy",
        "run",
        SEGMENT,
        *(runner or ("--onnxrt",)),
        "--load-inputs",
        INPUTS,
        "--load-outputs",
        outputs,
    ]
    return shlex.join([*words, "--atol", f"{atol:.4g}", "--rtol", "0"])


def _inspect(file: str, *kind: str) -> str:
    return shlex.join(["polygraphy", "inspect", "model", file, *kind, "--show", "layers"])


def _readme(row: Reproducer, case: _Case, loose: float, *, engine: bool) -> str:
    run, same, inspect = row.commands
    graph = "the layer, traced from the checkpoint in float32" if engine else "the graph of the bundle"
    rows = "all" if len(case.rows) == row.tokens else "those at " + ", ".join(map(str, case.rows))
    build = _run(OUTPUTS, row.atol, "--trt", "--save-engine", PLAN)
    return f"""# Layer {row.layer} alone: {row.why}

- `{SEGMENT}`: {graph}, in standard ONNX operators, for this text alone; all of its {row.tokens} tokens go through at once, from an empty state
- `{WEIGHTS}`: its weights, decoded, with {case.experts} routed experts, which are those of the compared tokens
- `{INPUTS}`: the streams before the layer, as the bundle computed them
- `{OUTPUTS}`: what {row.reference} makes of them; `{BUNDLE}`: what the bundle made of them. Compared tokens: {rows}

```sh
{run}
{same}
{inspect}
```

The first line fails if a value is more than {row.atol:.4g} from the reference's: {DIVERGED:g} times the root mean square of the outputs. The second fails if
one is more than {loose:.4g} from the bundle's.{f" {_LOOSE}" if loose > row.atol else ""}

As an engine, on a machine with a GPU; with TensorRT-RTX, set `POLYGRAPHY_USE_TENSORRT_RTX=1`:

```sh
{build}
{_inspect(PLAN, "--model-type", "engine")}
```
"""
