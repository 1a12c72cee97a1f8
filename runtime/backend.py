"""Executors: run one chunk of a graph over state that stays in place.

The ONNX Runtime executor binds one buffer per state tensor as ``past.X`` and as ``present.X``, so the caches
are updated in place and never copied. The small inputs and the logits also have fixed buffers, which are
rebound only when the shape of a chunk changes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, FoldkvError, listing
from ..export.contract.state import STATE_TYPES
from ..packages import installed, lacks
from .buffers import StateBuffers
from .bundle import Bundle, external_files

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


class Executor(Protocol):
    """What a session needs from a backend."""

    def run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        *,
        trim: bool = False,
    ) -> FloatArray:
        """Feed one chunk and update the state in place.

        Args:
            input_ids: [B, S]; tokens after ``num_tokens`` are padding.
            positions: [B] tokens that are in the state.
            num_tokens: [B] valid tokens of the chunk, 0 to S.
            active_context: an upper bound of ``positions + num_tokens``.
            logit_indices: [B, L] offsets in the chunk that get logits.
            trim: return memory that only this chunk needed to the system.

        Returns:
            Logits [B, L, V] float32, IN A BUFFER THAT THE NEXT RUN OVERWRITES.
        """

    def forget(self) -> None:
        """Clear the last chunk from the buffers of inputs and logits."""

    def close(self) -> None:
        """Free what the executor holds."""


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRuntimeExecutor:
    """Runs a bundle's ``model.onnx`` on the CPU."""

    def __init__(
        self, bundle: Bundle, buffers: StateBuffers, *, batch: int, threads: int | None = None, spin: bool = True
    ) -> None:
        """Load the model and bind the state.

        Raises:
            ArtifactError: the model cannot be loaded or is not the one that the manifest describes.
            MissingDependencyError: onnxruntime is not installed.
        """
        if not installed(bundle.backend.module):
            raise lacks("a bundle for the target 'cpu'", [bundle.backend.module])
        import onnxruntime

        self._ort: Any = onnxruntime
        self._bundle, self._batch = bundle, batch
        self._session = _load(onnxruntime, bundle, threads or default_threads(), spin)
        _check_io(self._session, bundle)
        self._binding = self._session.io_binding()
        for tensor in bundle.state.tensors:
            element = STATE_TYPES[tensor.dtype].onnx_type
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(buffers.arrays[tensor.name], element)
            self._binding.bind_ortvalue_input(tensor.input, value)
            self._binding.bind_ortvalue_output(tensor.output, value)
        self._positions = np.zeros(batch, np.int32)
        self._num_tokens = np.zeros(batch, np.int32)
        self._active_context = np.zeros(1, np.int64)
        names = bundle.io
        self._bind(names.positions, self._positions)
        self._bind(names.num_tokens, self._num_tokens)
        self._bind(names.active_context, self._active_context)
        self._input_ids = np.zeros((batch, 0), np.int64)
        self._logit_indices = np.zeros((batch, 0), np.int64)
        self._logits = np.zeros((batch, 0, bundle.model.vocab_size), np.float32)
        self._trim = onnxruntime.RunOptions()
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
    ) -> FloatArray:
        """See :meth:`Executor.run`.

        Raises:
            FoldkvError: ONNX Runtime failed; the state may be half updated.
        """
        self._fit(input_ids.shape[1], logit_indices.shape[1])
        self._input_ids[:] = input_ids
        self._logit_indices[:] = logit_indices
        self._positions[:] = positions
        self._num_tokens[:] = num_tokens
        self._active_context[0] = active_context
        try:
            self._session.run_with_iobinding(self._binding, self._trim if trim else None)
        except Exception as error:
            raise FoldkvError(
                f"ONNX Runtime failed on a chunk of {input_ids.shape[1]} tokens in a batch of {self._batch} with "
                f"{self._bundle.engine}: {_first_line(error)}. Reset the session or restore a snapshot; "
                "if memory ran out, use a smaller chunk."
            ) from error
        return self._logits

    def forget(self) -> None:
        """See :meth:`Executor.forget`."""
        for array in (self._input_ids, self._positions, self._num_tokens, self._logit_indices, self._logits):
            array.fill(0)

    def close(self) -> None:
        """Drop the model and the bindings."""
        self._binding = self._session = None

    def _fit(self, chunk: int, kept: int) -> None:
        """Make buffers for a chunk of this length and this many logits, unless the shape is the same as before."""
        names = self._bundle.io
        if self._input_ids.shape[1] != chunk:
            self._input_ids = np.zeros((self._batch, chunk), np.int64)
            self._bind(names.input_ids, self._input_ids)
        if self._logit_indices.shape[1] != kept:
            self._logit_indices = np.zeros((self._batch, kept), np.int64)
            self._logits = np.empty((self._batch, kept, self._bundle.model.vocab_size), np.float32)
            self._bind(names.logit_indices, self._logit_indices)
            self._binding.bind_ortvalue_output(names.logits, self._ort.OrtValue.ortvalue_from_numpy(self._logits))

    def _bind(self, name: str, array: npt.NDArray[Any]) -> None:
        self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))


def _load(onnxruntime: Any, bundle: Bundle, threads: int, spin: bool) -> Any:
    model = bundle.engine
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Sizes depend on how much context is in use, so the pattern of one run does not fit the next.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = True
    # It opens files in the model's folder and, where the model is a link, in the folder that the link leads to.
    weights = map_outside(options, bundle, (model.parent, model.resolve().parent))
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(
            f"{model} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {_first_line(error)}. "
            "Make the bundle again, or use another version of ONNX Runtime."
        ) from error
    finally:
        for mapped in weights:
            mapped.close()


def map_outside(options: Any, bundle: Bundle, homes: Sequence[Path]) -> list[mmap.mmap]:
    """Hand weight files to ONNX Runtime that it refuses to open: links to a place outside of ``homes``.

    It copies what it needs from them, so such a bundle takes more memory than one whose files are in its folder.

    Returns:
        The mapped files; close them once the session is made.
    """
    inside = [home.resolve() for home in homes]
    outside = {
        name: path for name, path in external_files(bundle).items()
        if not any(path.resolve().is_relative_to(home) for home in inside)
    }  # fmt: skip
    mapped = []
    for path in outside.values():
        with path.open("rb") as file:
            mapped.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if mapped:
        options.add_external_initializers_from_files_in_memory(list(outside), mapped, [len(part) for part in mapped])
    return mapped


def _check_io(session: Any, bundle: Bundle) -> None:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    integers = dict.fromkeys(bundle.io.inputs, "tensor(int64)")
    integers[bundle.io.positions] = integers[bundle.io.num_tokens] = "tensor(int32)"
    wanted_in = {**integers, **{t.input: STATE_TYPES[t.dtype].onnx_name for t in bundle.state.tensors}}
    wanted_out = {bundle.io.logits: "tensor(float)"}
    wanted_out |= {t.output: STATE_TYPES[t.dtype].onnx_name for t in bundle.state.tensors}
    findings = [
        f"the model's input {name!r} is not in the manifest" for name in sorted(inputs.keys() - wanted_in.keys())
    ]
    for label, found, wanted in (("input", inputs, wanted_in), ("output", outputs, wanted_out)):
        for name, kind in wanted.items():
            if name not in found:
                findings.append(f"the model has no {label} {name!r}")
            elif found[name].type != kind:
                findings.append(f"the model's {label} {name!r} is {found[name].type}; the manifest says {kind}")
    widths = {name: t.width for t in bundle.state.tensors for name in (t.input, t.output)}
    widths[bundle.io.logits] = bundle.model.vocab_size
    for name, width in widths.items():
        value = inputs.get(name) or outputs.get(name)
        # A dimension without a fixed size is a name or None: it cannot be compared.
        if value is not None and value.shape and isinstance(value.shape[-1], int) and value.shape[-1] != width:
            findings.append(f"the model's {name!r} has width {value.shape[-1]}; the manifest says {width}")
    if findings:
        title = f"{bundle.engine} is not the model that its manifest describes"
        raise ArtifactError(listing(title, findings, "Make the bundle again."))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400].rstrip(".")
