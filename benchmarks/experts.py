"""One routed-experts layer at the width of V4-Flash with 8, 64 and 256 experts, six chosen, on the CPU, in both forms of a segment.

``python benchmarks/experts.py -o benchmarks/results/experts-cpu.json``. "stored" reads packed e2m1 as the checkpoint has it and decodes the
chosen experts in standard operators; "stacked" is QMoE on stacks, which the runtime makes from the same file; "stored, e4m3" are experts in
e4m3, which have the first form only. Codes are random, because
look-ups of equal bytes are several times as fast. Every count is a process of its own. In it the forms take turns, with the same tokens
and the same chosen experts; figures are medians over all rounds. Errors are against numpy in float64, which decodes the codes itself.
Memory is that of a process that ran one form only. ``benchmarks/moe.py`` measures models.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
from memory_speed import bandwidth

import foldkv
from foldkv.export.contract.chain import Bound, Call, ChainTable, Stacked
from foldkv.export.contract.lock import LockedFile, Part, Weight, WeightsLock
from foldkv.export.contract.weights import EXPERTS as _ROLE
from foldkv.export.operators.packed import EXPERTS, Matrix, routed_experts
from foldkv.export.operators.packed_words import geometry
from foldkv.export.operators.registry import DOMAIN, ONNX_OPSET
from foldkv.optimize.passes.stack_experts import stack_experts
from foldkv.runtime.chain import session_options
from foldkv.runtime.stacks import Stacks
from foldkv.runtime.weight_files import TYPES, WeightFiles

_HIDDEN, _INNER, _CHOSEN, _STEPS, _CHUNK, _LIMIT = 4096, 2048, 6, 12, 128, 10.0
_SHAPES = {"w1": (_INNER, _HIDDEN), "w2": (_HIDDEN, _INNER), "w3": (_INNER, _HIDDEN)}
_OWNER, _FILE = "layers.0", "weights.bin"
_FORMS = ("stored", "stacked")
_WIDER = "stored, e4m3"
#: Layers of V4-Flash, which a token goes through.
_LAYERS = 43
#: The values of e2m1 (OCP microscaling formats 1.0).
_GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Format:
    """How experts are stored: elements of a byte, and rows and columns that share a scale."""

    name: str
    packed: int
    block: tuple[int, int]

    def scales(self, rows: int, columns: int) -> int:
        """Of a matrix."""
        return rows // self.block[0] * (columns // self.block[1])


_FP4, _FP8 = Format("fp4", 2, (1, 32)), Format("fp8", 1, (128, 128))


def row(form: Format) -> tuple[dict[str, Matrix], int, int]:
    """Where the matrices of an expert are in its rows, and the bytes of a row of codes and of scales."""
    matrices, codes, scales = {}, 0, 0
    for part, (rows, columns) in _SHAPES.items():
        matrices[part] = Matrix(codes, scales, (rows, columns), (rows // form.block[0], columns // form.block[1]))
        codes, scales = codes + rows * columns // form.packed, scales + form.scales(rows, columns)
    return matrices, codes, scales


def layer(experts: int, form: Format) -> ir.Model:
    """A segment of one node."""
    matrices, codes, scales = row(form)

    def value(name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    x, y = (value(name, ir.DataType.FLOAT, ["tokens", _HIDDEN]) for name in ("x", "y"))
    chosen = value("chosen", ir.DataType.INT64, ["tokens", _CHOSEN])
    weights = value("weights", ir.DataType.FLOAT, ["tokens", _CHOSEN])
    given = [
        value(f"{_ROLE}.codes", ir.DataType.INT8, [experts, codes]),
        value(f"{_ROLE}.scales", ir.DataType.INT8, [experts, scales]),
    ]
    table = ir.tensor(np.arange(experts), name=f"{_ROLE}.slots")
    slots = ir.Value(name=table.name, type=ir.TensorType(table.dtype), shape=table.shape, const_value=table)
    places = [ir.AttrInt64s(key, values) for key, values in geometry(matrices).items()]
    node = ir.Node(
        DOMAIN, EXPERTS[form.name], [x, chosen, weights, *given, slots], [ir.AttrFloat32("limit", _LIMIT), *places], outputs=[y],
        name="experts",
    )  # fmt: skip
    graph = ir.Graph(
        [x, chosen, weights, *given], [y], nodes=[node], initializers=[slots], opset_imports={"": ONNX_OPSET, DOMAIN: 1},
        name="layer",
    )  # fmt: skip
    body = ir.serde.deserialize_function(routed_experts(form.name, matrices))
    return ir.Model(graph, ir_version=10, functions=[body])


class Weights:
    """Random experts in a file, and where they lie."""

    def __init__(self, folder: Path, experts: int, form: Format) -> None:
        self.file, self.form = f"{form.name}-{_FILE}", form
        self.path, (_, codes, scales) = folder / self.file, row(form)
        if not self.path.exists():
            random = np.random.default_rng(0)
            with self.path.open("wb") as file:
                for _ in range(experts):
                    drawn = random.integers(0, 256, codes, dtype=np.uint8)
                    if form is _FP8:
                        drawn[drawn & 127 == 127] = 0  # no NaN
                    file.write(drawn.tobytes())
                for _ in range(experts):
                    file.write(random.integers(112, 120, scales, dtype=np.uint8).tobytes())
        self.bounds = {
            f"{_ROLE}.codes": Bound(self.file, False, 0, "int8", (experts, codes)),
            f"{_ROLE}.scales": Bound(self.file, False, experts * codes, "int8", (experts, scales)),
        }
        roles = {}
        for kind in ("codes", "scales"):
            at, parts = self.bounds[f"{_ROLE}.{kind}"].offset, []
            for _ in range(experts):
                for rows, columns in _SHAPES.values():
                    size = rows * columns // form.packed if kind == "codes" else form.scales(rows, columns)
                    parts.append(Part(self.file, at, size))
                    at += size
            roles[f"{_ROLE}.{kind}"] = Weight("I8", self.bounds[f"{_ROLE}.{kind}"].shape, tuple(parts))
        locked = LockedFile(self.path.stat().st_size, 0, "")
        self.lock = WeightsLock({self.file: locked}, {_OWNER: roles})
        self.files = WeightFiles()
        self.files.open(self.file, self.path)


class Form:
    """One form of the segment in ONNX Runtime, with its weights bound over mapped files."""

    def __init__(self, name: str, weights: Weights, experts: int) -> None:
        model, bounds = layer(experts, weights.form), weights.bounds
        self.stacking = 0.0
        if name == "stacked":
            stacks = stack_experts(model, _ROLE)
            forms = {"moe": Stacked("", stacks, tuple(bounds))}
            table = ChainTable({"moe": ""}, (Call(_OWNER, "moe"),), {_OWNER: bounds}, forms)
            start = time.monotonic()
            made = Stacks(table, weights.lock, {weights.file: weights.path}, weights.files)
            self.made = bool(made.missing())
            made.open()
            self.stacking = time.monotonic() - start
            bounds = table.in_stacks().weights[_OWNER]
        content = ir.to_proto(model).SerializeToString()
        threads = len(os.sched_getaffinity(0))
        start = time.monotonic()
        self.sessions = {
            decode: onnxruntime.InferenceSession(content, session_options(onnxruntime, threads, decode=decode))
            for decode in (True, False)
        }
        self.opening = (time.monotonic() - start) / 2
        self.given = {
            role: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                weights.files.view(bound), TYPES[bound.dtype][1]
            )
            for role, bound in bounds.items()
        }

    def __call__(self, x: np.ndarray, chosen: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, float]:
        """The result, and the seconds that it took."""
        session = self.sessions[len(x) == 1]
        binding = session.io_binding()
        for name, array in (("x", x), ("chosen", chosen), ("weights", shares)):
            binding.bind_cpu_input(name, array)
        for role, value in self.given.items():
            binding.bind_ortvalue_input(role, value)
        found = np.empty_like(x)
        binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(found, 1))
        start = time.monotonic()
        session.run_with_iobinding(binding)
        return found, time.monotonic() - start


def tokens(random: np.random.Generator, count: int, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs of a step."""
    chosen = np.stack([random.permutation(experts)[:_CHOSEN] for _ in range(count)]).astype(np.int64)
    x = random.normal(size=(count, _HIDDEN)).astype(np.float32)
    return x, chosen, random.random((count, _CHOSEN)).astype(np.float32)


def expected(weights: Weights, x: np.ndarray, chosen: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The layer in float64."""
    form = weights.form
    matrices, _, _ = row(form)
    codes, scales = (weights.files.view(bound).view(np.uint8) for bound in weights.bounds.values())

    def value(part: str, expert: int) -> np.ndarray:
        one = matrices[part]
        rows, columns = one.shape
        stored = codes[expert, one.codes : one.codes + rows * columns // form.packed].reshape(rows, -1)
        exponents = scales[expert, one.scales : one.scales + form.scales(rows, columns)].reshape(one.grid)
        powers = np.repeat(np.repeat(2.0 ** (exponents.astype(np.float64) - 127), form.block[0], 0), form.block[1], 1)
        if form is _FP8:
            return stored.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * powers
        return _GRID[np.stack([stored & 15, stored >> 4], axis=-1)].reshape(rows, columns) * powers

    found = np.zeros(x.shape)
    for at, token in enumerate(x.astype(np.float64)):
        for expert, share in zip(chosen[at], shares[at], strict=True):
            gate = np.minimum(value("w1", expert) @ token, _LIMIT)
            up = np.clip(value("w3", expert) @ token, -_LIMIT, _LIMIT)
            found[at] += share * (value("w2", expert) @ (gate / (1 + np.exp(-gate)) * up))
    return found


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative to the size of the whole."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def measure(folder: Path, experts: int, names: list[str], chunks: int) -> dict[str, Any]:
    """All forms by turns in this process; of one alone also its memory."""
    kinds = {name: _FP8 if name == _WIDER else _FP4 for name in names}
    weights = {form: Weights(folder, experts, form) for form in dict.fromkeys(kinds.values())}
    forms = {name: Form(name, weights[form], experts) for name, form in kinds.items()}
    random = np.random.default_rng(1)
    steps: dict[str, list[float]] = {name: [] for name in names}
    longer: dict[str, list[float]] = {name: [] for name in names}
    for number in range(_STEPS + 2):
        given = tokens(random, 1, experts)
        for name, form in forms.items():
            _, seconds = form(*given)
            steps[name] += [seconds] if number >= 2 else []
    status = Path("/proc/self/status").read_text()
    kept = {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("RssAnon", "RssFile")}  # type: ignore[index]
    for number in range(chunks + 1):
        given = tokens(random, _CHUNK, experts)
        for name, form in forms.items():
            _, seconds = form(*given)
            longer[name] += [seconds] if number else []
    status = Path("/proc/self/status").read_text()
    chunk = {key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("RssAnon", "RssFile")}  # type: ignore[index]
    given = tokens(random, 3, experts)
    wanted = {form: expected(one, *given) for form, one in weights.items()}
    stacked = forms.get("stacked")
    return {
        "steps": steps, "chunks": longer, "after_steps": kept, "after_chunks": chunk,
        "open": {name: form.opening for name, form in forms.items()},
        "error": {name: error(form(*given)[0], wanted[kinds[name]]) for name, form in forms.items()},
        "stacking": stacked.stacking if stacked is not None and stacked.made else None,
    }  # fmt: skip


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--counts", default="8,64,256", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--one", help="FOLDER:COUNT:FORM+FORM:CHUNKS: measure these here and print it.")
def main(output: Path | None, counts: str, rounds: int, one: str | None) -> None:
    """Measure and write the results as JSON."""
    if one is not None:
        folder, count, names, chunks = one.rsplit(":", 3)
        click.echo(json.dumps(measure(Path(folder), int(count), names.split("+"), int(chunks))))
        return
    assert output is not None
    rows, wider = [], None
    for count in map(int, counts.split(",")):
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            if wider is None:
                wider = _wider([_child(folder, count, ("stored", _WIDER), 1) for _ in range(rounds)])
            runs = [_child(folder, count, _FORMS, 1) for _ in range(rounds)]
            alone = {name: _child(folder, count, (name,), 1) for name in _FORMS}
        rows.append(_row(count, runs, alone))
        click.echo(json.dumps(rows[-1]))
    for line in rows:
        line["step_over_fewest"] = {
            name: round(line["step_seconds"][name] / rows[0]["step_seconds"][name], 2) for name in _FORMS
        }
    content = {
        "what": f"one decode token, and a chunk of {_CHUNK}, through one layer of e2m1 experts at the width of V4-Flash, six chosen; both "
        "forms by turns, medians",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors, shared",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {"onnxruntime": version("onnxruntime"), "foldkv": foldkv.__version__},
        "rounds": rounds,
        "rows": rows,
        "e4m3": wider,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


def _row(count: int, runs: list[dict[str, Any]], alone: dict[str, dict[str, Any]]) -> dict[str, Any]:
    def median(key: str, name: str) -> float:
        return statistics.median(seconds for run in runs for seconds in run[key][name])

    size, stacking = count * 3 * _HIDDEN * _INNER * 17 // 32, runs[0]["stacking"]
    return {
        "experts": count,
        "weight_bytes": size,
        "step_seconds": {name: round(median("steps", name), 4) for name in _FORMS},
        "chunk_seconds": {name: round(median("chunks", name), 3) for name in _FORMS},
        "times_faster": {
            kind: round(median(key, "stored") / median(key, "stacked"), 1)
            for kind, key in (("step", "steps"), ("chunk", "chunks"))
        },
        "error": {name: max(run["error"][name] for run in runs) for name in _FORMS},
        "open_seconds": {name: round(statistics.median(run["open"][name] for run in runs), 3) for name in _FORMS},
        "after_steps": {name: alone[name]["after_steps"] for name in _FORMS},
        "after_chunks": {name: alone[name]["after_chunks"] for name in _FORMS},
        "stacking_gb_s": round(size / 1e9 / stacking, 2),
    }


def _wider(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Experts in e4m3, beside those in e2m1 that are decoded in the same way; with the fewest experts, because a step reads six."""

    def median(key: str, name: str) -> float:
        return statistics.median(seconds for run in runs for seconds in run[key][name])

    step, parameters = median("steps", _WIDER), _CHOSEN * 3 * _HIDDEN * _INNER
    return {
        "step_seconds": round(step, 4),
        "chunk_seconds": round(median("chunks", _WIDER), 3),
        "step_of_e2m1_stored": round(median("steps", "stored"), 4),
        "ns": round(step / parameters * 1e9, 2),
        "bandwidth_gb_s": round(bandwidth(), 1),
        "read_gb_s": round(parameters / step / 1e9, 2),
        "token_seconds_of_all_layers": round(_LAYERS * step, 1),
        "error": max(run["error"][_WIDER] for run in runs),
    }


def _child(folder: str, count: int, names: tuple[str, ...], chunks: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--one", f"{folder}:{count}:{'+'.join(names)}:{chunks}"]
    environment = os.environ | {"FOLDKV_CACHE": f"{folder}/cache"}
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise click.ClickException(f"{count} experts ended with {run.returncode}: {run.stderr.strip()}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
