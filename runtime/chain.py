"""A chain of segments in ONNX Runtime: one session per kind of layer, one set of bound buffers per call.

The graphs hold no weights. Every call binds its own: ranges of mapped files. State buffers are bound as ``past.X`` and as
``present.X``, so caches are updated in place. The streams go back and forth between two buffers. What all layers share
(positions, angles, masks) is made once per step by the segment ``step``, in buffers that every layer has bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import ONNX_RUNTIME
from ..errors import ArtifactError, FoldkvError, listing
from ..export.contract.chain import CHAIN, STEP, Bound, Call, ChainTable
from ..export.contract.lock import LOCK, WeightsLock
from ..export.contract.state import STATE_TYPES
from ..export.locate import find_weights
from ..inputs import OpenedFiles
from ..packages import installed, lacks
from .backend import FloatArray, IntArray, default_threads
from .buffers import StateBuffers
from .bundle import Bundle
from .weight_files import TYPES, WeightFiles, check_indices

#: Models with smaller weights are computed with one thread, unless the caller says otherwise.
SMALL_BYTES = 64 << 20
_STREAMS, _AFTER, _PAST, _PRESENT = "streams", "after", "past.", "present."
_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
_SIZE = re.compile(r"(batch|chunk|kept)(?: ([+*]) (\d+))?")
#: Called with a layer or None, the streams [B, S, N, C] after it, and other outputs by name.
Observer = Callable[[int | None, FloatArray, Mapping[str, npt.NDArray[Any]]], None]


class ChainModel:
    """The segments of a bundle, loaded, and its weights, mapped. Any number of executors share it, also on several threads."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        spin: bool = True,
        weights_from: Path | None = None,
        instead: Mapping[str, bytes] | None = None,
    ) -> None:
        """Find and map the weights, and load the segments.

        Args:
            bundle: the checked bundle.
            threads: threads per operator.
            spin: let idle threads wait actively.
            weights_from: where the checkpoint's weight files are.
            instead: graphs of segments to load instead of the bundle's, with more outputs, for tools that look inside.

        Raises:
            ArtifactError: a segment cannot be loaded, or is not the one that the table describes.
            InputError: weights are missing or are others.
            MissingDependencyError: onnxruntime is not installed.
        """
        if not installed(ONNX_RUNTIME.module):
            raise lacks("a bundle for the target 'cpu'", [ONNX_RUNTIME.module])
        import onnxruntime

        self.ort: Any = onnxruntime
        self.bundle = bundle
        self.table = ChainTable.read(bundle.folder / CHAIN)
        self.files = WeightFiles()
        lock = WeightsLock.read(bundle.folder / LOCK)
        self._refuse_unlisted()
        paths = find_weights(
            bundle.folder, lock, bundle.manifest.inputs.checkpoint, weights_from, wanted=self.table.files
        )
        self.opened = OpenedFiles(paths.values())
        for name, path in paths.items():
            self.files.open(name, path, lock.files[name])
        for name in {b.file for roles in self.table.weights.values() for b in roles.values() if b.placed}:
            self.files.open(name, bundle.folder / name)
        options = session_options(onnxruntime, threads or threads_for(self.table), spin)
        self.sessions = {
            name: _load(onnxruntime, bundle.folder / file, options, (instead or {}).get(name))
            for name, file in self.table.segments.items()
        }
        self.inputs = {name: {v.name: v for v in session.get_inputs()} for name, session in self.sessions.items()}
        self.outputs = {name: {v.name: v for v in session.get_outputs()} for name, session in self.sessions.items()}
        self._check()
        self.weights: dict[str, dict[str, Any]] = {
            call.owner: {
                role: self._value(call.owner, role, bound) for role, bound in self.table.weights[call.owner].items()
            }
            for call in self.table.calls
        }

    def executor(self, context: int, batch: int) -> tuple[StateBuffers, ChainExecutor]:
        """State for a batch of sequences, and an executor over it."""
        buffers = StateBuffers(self.bundle.state, context, batch)
        return buffers, ChainExecutor(self, buffers, batch=batch)

    def close(self) -> None:
        """Drop the segments and the mapped files; executors keep what they use."""
        self.sessions, self.weights = {}, {}

    def _value(self, owner: str, role: str, bound: Bound) -> Any:
        array = self.files.view(bound)
        if role.endswith("tid2eid"):
            gate = self.table.weights[owner].get("ffn.gate.weight")
            if gate is not None:  # [E, C]: a row for each expert
                check_indices(array, gate.shape[0], f"{owner}.{role}", bound.file)
        return self.ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, TYPES[bound.dtype][1])

    def _refuse_unlisted(self) -> None:
        """What the table names in the bundle must be files that the manifest lists, with their digests."""
        placed = {b.file for roles in self.table.weights.values() for b in roles.values() if b.placed}
        others = sorted({*self.table.segments.values(), *placed} - self.bundle.manifest.files.keys())
        others += [file for file in self.table.segments.values() if not file.endswith(".onnx")]
        if others:
            title = f"{self.bundle.folder / CHAIN} names files that the manifest does not list as what they should be"
            raise ArtifactError(listing(title, others, "Make the bundle again."))

    def changes(self) -> tuple[str, ...]:
        """What happened to the weight files since they were opened; empty if nothing did."""
        return self.opened.changes()

    def _check(self) -> None:
        """Compare every segment's inputs with what its calls bind, and the state with the manifest."""
        findings: list[str] = []
        shared = {*self.inputs[STEP], *self.outputs[STEP]}
        for call in self.table.calls:
            inputs, outputs = self.inputs[call.segment], self.outputs[call.segment]
            weights = self.table.weights.get(call.owner, {})
            tensors = {t.group: t for t in self.bundle.state.tensors if t.layer == call.layer}
            state = {_PAST + group: tensor for group, tensor in tensors.items()}
            known = {*shared, *weights, *state, _STREAMS, *self.bundle.io.inputs}
            findings += [
                f"{call.owner}: the segment {call.segment} takes {name!r}, which nothing gives"
                for name in inputs
                if name not in known
            ]
            findings += [
                f"{call.owner}: the segment {call.segment} has no input {name!r}"
                for name in (*weights, *state)
                if name not in inputs
            ]
            for name, tensor in state.items():
                if name not in inputs:
                    continue
                found, wanted = inputs[name], STATE_TYPES[tensor.dtype].onnx_name
                if found.type != wanted or found.shape[-1] != tensor.width:
                    findings.append(
                        f"{call.owner}: the segment's {name!r} is {found.type} of width {found.shape[-1]}; the manifest says "
                        f"{wanted} of width {tensor.width}"
                    )
            findings += [
                f"{call.owner}: the segment {call.segment} has no output {name!r}"
                for name in (_PRESENT + group for group in tensors)
                if name not in outputs
            ]
            logits = outputs.get(self.bundle.io.logits)
            if logits is not None and logits.shape[-1] != self.bundle.model.vocab_size:
                findings.append(
                    f"{call.owner}: the logits have width {logits.shape[-1]}; the manifest says {self.bundle.model.vocab_size}"
                )
        if findings:
            title = f"{self.bundle.folder} is not the chain that its manifest describes"
            raise ArtifactError(listing(title, findings, "Make the bundle again."))


class ChainExecutor:
    """Runs a chain over the state of one session."""

    def __init__(self, model: ChainModel, buffers: StateBuffers, *, batch: int) -> None:
        """Bind weights and state of every call."""
        self._model, self._batch = model, batch
        self._bundle, self._ort = model.bundle, model.ort
        names = self._bundle.io
        self._given: dict[str, npt.NDArray[Any]] = {
            names.input_ids: np.zeros((batch, 0), np.int64), names.positions: np.zeros(batch, np.int32),
            names.num_tokens: np.zeros(batch, np.int32), names.active_context: np.zeros(1, np.int64),
            names.logit_indices: np.zeros((batch, 0), np.int64),
        }  # fmt: skip
        self._logits: FloatArray = np.zeros((batch, 0, self._bundle.model.vocab_size), np.float32)
        self._shape: tuple[int, int] | None = None
        self._made: dict[str, npt.NDArray[Any]] = {}
        self._step = model.sessions[STEP].io_binding()
        self._calls: list[tuple[Call, Any, Any]] = []
        self._extra: dict[str, dict[str, int]] = {}
        for call in model.table.calls:
            session = model.sessions[call.segment]
            binding = session.io_binding()
            for role, value in model.weights[call.owner].items():
                binding.bind_ortvalue_input(role, value)
            for tensor in self._bundle.state.tensors:
                if tensor.layer == call.layer:
                    value = self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                        buffers.arrays[tensor.name], STATE_TYPES[tensor.dtype].onnx_type
                    )
                    binding.bind_ortvalue_input(_PAST + tensor.group, value)
                    binding.bind_ortvalue_output(_PRESENT + tensor.group, value)
            self._extra[call.owner] = self._bind_extra(binding, call)
            self._calls.append((call, session, binding))
        self._trim = self._ort.RunOptions()
        self._trim.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        *,
        trim: bool = False,
        observe: Observer | None = None,
    ) -> FloatArray:
        """See :meth:`foldkv.runtime.backend.Executor.run`.

        Args:
            observe: called after every segment with its layer (None for the ends), the streams, and its outputs that nothing
                else takes. The arrays are overwritten later.

        Raises:
            FoldkvError: ONNX Runtime failed; the state may be half updated.
        """
        self._fit(input_ids.shape[1], logit_indices.shape[1])
        names = self._bundle.io
        for name, value in (
            (names.input_ids, input_ids), (names.positions, positions), (names.num_tokens, num_tokens),
            (names.active_context, active_context), (names.logit_indices, logit_indices),
        ):  # fmt: skip
            self._given[name][...] = value
        options = self._trim if trim else None
        owner = STEP
        try:
            self._model.sessions[STEP].run_with_iobinding(self._step, options)
            for call, session, binding in self._calls:
                owner = call.owner
                session.run_with_iobinding(binding, options)
                if observe is not None:
                    self._show(call, binding, observe)
        except Exception as error:
            raise FoldkvError(
                f"ONNX Runtime failed in {owner} on a chunk of {input_ids.shape[1]} tokens in a batch of {self._batch} with "
                f"{self._bundle.folder}: {first_line(error)}. Reset the session or restore a snapshot; "
                "if memory ran out, use a smaller chunk."
            ) from error
        return self._logits

    def _show(self, call: Call, binding: Any, observe: Observer) -> None:
        values = binding.get_outputs()  # in the order in which they were first bound
        more = {name: values[at].numpy() for name, at in self._extra[call.owner].items()}
        number = next(number for number, (other, _, _) in enumerate(self._calls) if other == call)
        observe(call.layer, self._made[f"{_STREAMS}.{number % 2}"], more)

    def forget(self) -> None:
        """See :meth:`foldkv.runtime.backend.Executor.forget`."""
        for array in (*self._given.values(), *self._made.values(), self._logits):
            array.fill(0)

    def close(self) -> None:
        """Drop the bindings."""
        self._calls = []
        self._step = None

    def _bind_extra(self, binding: Any, call: Call) -> dict[str, int]:
        """Let ONNX Runtime allocate outputs that nothing takes; returns their numbers among the bound outputs."""
        names = list(self._model.outputs[call.segment])
        state = [name for name in names if name.startswith(_PRESENT)]
        extra = [name for name in names if name not in (*state, _STREAMS, _AFTER, self._bundle.io.logits)]
        for name in extra:
            binding.bind_output(name, "cpu")
        return {name: len(state) + number for number, name in enumerate(extra)}

    def _fit(self, chunk: int, kept: int) -> None:
        """Make and bind buffers for a chunk of this length and this many logits, unless the shape is the same as before."""
        if self._shape == (chunk, kept):
            return
        names, model = self._bundle.io, self._model
        sizes = {"batch": self._batch, "chunk": chunk, "kept": kept}
        self._given[names.input_ids] = np.zeros((self._batch, chunk), np.int64)
        self._given[names.logit_indices] = np.zeros((self._batch, kept), np.int64)
        self._logits = np.empty((self._batch, kept, self._bundle.model.vocab_size), np.float32)
        self._made = {name: _buffer(value, sizes) for name, value in model.outputs[STEP].items()}
        first = model.outputs[model.table.calls[0].segment][_STREAMS]
        self._made |= {f"{_STREAMS}.{half}": _buffer(first, sizes) for half in (0, 1)}
        values = {
            name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in (self._given | self._made).items()
        }
        logits = self._ort.OrtValue.ortvalue_from_numpy(self._logits)
        for name in model.inputs[STEP]:
            self._step.bind_ortvalue_input(name, values[name])
        for name in model.outputs[STEP]:
            self._step.bind_ortvalue_output(name, values[name])
        for number, (call, _, binding) in enumerate(self._calls):
            here, after = values[f"{_STREAMS}.{(number + 1) % 2}"], values[f"{_STREAMS}.{number % 2}"]
            for name in model.inputs[call.segment]:
                if name == _STREAMS:
                    binding.bind_ortvalue_input(name, here)
                elif name in values:
                    binding.bind_ortvalue_input(name, values[name])
            for name in model.outputs[call.segment]:
                if name in (_STREAMS, _AFTER):
                    binding.bind_ortvalue_output(name, after)
                elif name == names.logits:
                    binding.bind_ortvalue_output(name, logits)
        self._shape = (chunk, kept)


def threads_for(table: ChainTable) -> int:
    """One for a small model, else the processors that this process may use.

    Operators of a small model take microseconds, and handing a part of one to another thread takes longer than the part.
    """
    weights = sum(bound.bytes for roles in table.weights.values() for bound in roles.values())
    return 1 if weights < SMALL_BYTES else default_threads()


def _buffer(value: Any, sizes: Mapping[str, int]) -> npt.NDArray[Any]:
    """A buffer for an output whose sizes follow from batch, chunk and number of logits."""
    shape = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        match = _SIZE.fullmatch(str(size))
        if match is None:
            raise ArtifactError(f"the output {value.name!r} of a segment has the size {size!r}. Make the bundle again.")
        base, number = sizes[match[1]], int(match[3] or 0)
        shape.append(base if not match[2] else base + number if match[2] == "+" else base * number)
    return np.zeros(shape, _NUMPY[value.type])


def session_options(onnxruntime: Any, threads: int, spin: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Sizes depend on how much context is in use, so the pattern of one run does not fit the next.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = True
    # ONNX Runtime 1.32 moves a DequantizeLinear of an e4m3 input past a Reshape as if it were uint8: other values come out.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Each session has its own threads, and only one session runs at a time: threads that go on waiting actively after their run
    # would take the processors from the next one. (One pool for all would also bind every other session of the process.)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _load(onnxruntime: Any, model: Path, options: Any, instead: bytes | None) -> Any:
    try:
        return onnxruntime.InferenceSession(instead or str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(
            f"{model} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {first_line(error)}. "
            "Make the bundle again, or use another version of ONNX Runtime."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error of ONNX Runtime, without its last full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400].rstrip(".")
