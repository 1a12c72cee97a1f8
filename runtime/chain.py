"""The segments of a bundle, loaded in ONNX Runtime, and its weights, mapped from their files or copied to a GPU.

The graphs hold no weights, so a kind of layer is loaded once for all layers of that kind (runtime/chain_executor.py binds
weights and state). It is loaded twice, though: for decode steps, whose tensors always have the same few sizes, ONNX Runtime
plans memory ahead, which makes a step an eighth faster; for chunks the plan of one would waste memory in the next.
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ..backends import Backend
from ..errors import ArtifactError, MissingDependencyError, listing
from ..export.contract.chain import CHAIN, STEP, Bound, ChainTable
from ..export.contract.engine_set import EngineTable
from ..export.contract.lock import LOCK, WeightsLock
from ..export.contract.stacks import ONNX_RUNTIME, reads_stacks
from ..export.contract.state import STATE_TYPES
from ..export.contract.step_time import STORED, step_seconds, warning
from ..export.contract.weights import EXPERTS
from ..export.locate import find_weights
from ..inputs import OpenedFiles
from ..packages import installed, lacks, overwritten, pip_line
from ..progress import Say, silent
from .backend import default_threads
from .bundle import Bundle
from .chain_memory import ChainMemory, DeviceMemory, HostMemory, Tensor
from .placement import on_processor, wanted_on_host
from .stacks import Stacks, stack_sources
from .weight_check import WeightCheck
from .weight_files import TYPES, WeightFiles, check_indices
from .wide import AUTO, BFLOAT16, FLOAT32, takes_float32, widen

#: Models with smaller weights are computed with one thread, unless the caller says otherwise.
SMALL_BYTES = 64 << 20
# TF32, which ONNX Runtime uses by default, rounds factors of float32 products to 10 bits. The arena takes what a step needs, and not
# twice as much.
_GPU_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
#: Names of a segment's inputs and outputs.
STREAMS, AFTER, PAST, PRESENT = "streams", "after", "past.", "present."


class ChainModel:
    """The segments of a bundle, loaded, and its weights, mapped. Any number of executors share it, also on several threads.

    Attributes:
        matrices: the type in which the matrices of a large model are read; empty where every step decodes them, or the build did.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        weights_from: Path | None = None,
        verify: bool = False,
        place: bool = True,
        matrices: str = AUTO,
        memory: ChainMemory | None = None,
        reserve: int = 0,
        progress: Say = silent,
    ) -> None:
        """Find and map the weights, and load the segments.

        Args:
            bundle: the checked bundle.
            threads: the most threads per operator; see :func:`threads_for`.
            weights_from: where the checkpoint's weight files are.
            verify: hash the weight files, and refuse others than the lock's.
            place: run the second form of segments (runtime/stacks.py) where the bundle has one; else with weights as the checkpoint has them.
            matrices: whether the third form is run instead (runtime/wide.py).
            memory: where tensors lie; the default is what the bundle's backend needs.
            reserve: bytes of memory that are to stay free, for state, when it is decided how matrices are read.
            progress: called while stacks are made; a :class:`~foldkv.progress.Progress` learns more.

        Raises:
            ArtifactError: a segment cannot be loaded, or is not the one that the table describes.
            InputError: weights are missing or are others, or do not fit into the GPU's memory; or stacks not onto the disk.
            MissingDependencyError: onnxruntime is not installed, or cannot use the GPU.
        """
        backend = bundle.backend
        if not installed(backend.module):
            raise lacks(f"a bundle for the target {bundle.target!r}", [backend.module])
        import onnxruntime

        self.ort: Any = onnxruntime
        self.bundle = bundle
        self.table = ChainTable.read(bundle.folder / CHAIN)
        self.files = WeightFiles()
        lock = WeightsLock.read(bundle.folder / LOCK)
        self._refuse_unlisted()
        wanted = self.table.files | (stack_sources(self.table, lock) if place else set())
        paths = find_weights(bundle.folder, lock, bundle.manifest.inputs.checkpoint, weights_from, wanted=wanted)
        self.opened = OpenedFiles(paths.values())
        for name, path in paths.items():
            self.files.open(name, path, lock.files[name])
        for name in {b.file for roles in self.table.weights.values() for b in roles.values() if b.placed}:
            self.files.open(name, bundle.folder / name)
        if verify:
            with WeightCheck(self.files, lock.files, paths, threads=default_threads()) as check:
                check.finish()
        self._stacks = OpenedFiles(())
        if place and self.table.stacked and not reads_stacks(onnxruntime.__version__):
            progress(
                f"ONNX Runtime {onnxruntime.__version__} cannot multiply with e2m1: every step decodes the weights. "
                f"Version {'.'.join(map(str, ONNX_RUNTIME))} is many times as fast"
            )
            place = False
        first = self.table
        self.matrices, self._form = "", "weights as stored"
        if place and self.table.stacked:
            takes_float32(self.table, matrices, reserve)  # an error comes before the copies, which can take long
            self._stacks = OpenedFiles(Stacks(self.table, lock, paths, self.files).open(progress))
            wide = takes_float32(self.table, matrices, reserve) and widen(
                self.table, self.files, progress, must=matrices == FLOAT32
            )
            self._form = "stacks"
            if self.table.matrices():
                self.matrices = FLOAT32 if wide else BFLOAT16
            self.table = self.table.in_stacks(wide=wide)
        if not backend.gpu and (slow := warning(_step_seconds(first, lock, self.table, self.matrices or STORED))):
            progress(f"expect {slow}")
        if not self.matrices and matrices != AUTO and threads_for(self.table) > 1:
            progress(f"{bundle.folder} has no forms to choose from: its matrices are read as they were built")
        self._instead: Mapping[str, bytes] = {}
        if backend.provider not in onnxruntime.get_available_providers():
            raise _no_provider(bundle, f"this ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}")
        if backend.gpu:
            preload(onnxruntime)
        self.memory: ChainMemory = memory or (DeviceMemory(onnxruntime) if backend.gpu else HostMemory(onnxruntime))
        usual = threads_for(self.table)
        # A decode step of a small model starts thousands of tiny nodes: more threads only wait for each other.
        self._threads = {False: threads or usual, True: min(threads or usual, usual)}
        self._lock = threading.Lock()
        self.sessions: dict[str, Any] = {}
        self._decode_sessions: dict[str, Any] = {}
        self.weights: dict[str, dict[str, Tensor]] = {}
        self._closed, self._owns = False, True
        self._open_whole()

    def with_graphs(self, graphs: Mapping[str, bytes]) -> ChainModel:
        """The same chain with other graphs of some segments, which have more outputs: for tools that look inside.

        Weights are shared, so this chain must stay open as long. What is returned has to be closed, too.

        Raises:
            ArtifactError: a graph cannot be loaded, or is not one of these segments.
        """
        other = copy.copy(self)
        other._lock, other._owns, other._instead = threading.Lock(), False, dict(graphs)
        other.sessions, other._decode_sessions, other.weights = {}, {}, {}
        other._open_whole()
        return other

    def _open_whole(self) -> None:
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Load the segments, compare them with the table, and put the weights where they are read."""
        self.sessions = self._load(decode=False)
        self.inputs = {name: {v.name: v for v in session.get_inputs()} for name, session in self.sessions.items()}
        self.outputs = {name: {v.name: v for v in session.get_outputs()} for name, session in self.sessions.items()}
        self.on_host = {
            name: wanted_on_host(session) if self.bundle.backend.gpu else frozenset()
            for name, session in self.sessions.items()
        }
        self._check()
        for call in self.table.calls:
            weights = self.weights[call.owner] = {}
            for role, bound in self.table.weights[call.owner].items():
                weights[role] = self._value(call.owner, role, bound)

    @property
    def way(self) -> str:
        """What the last bits of results depend on beside the bundle and the library: how weights are read, and threads."""
        read = f"{self._form}, matrices in {self.matrices}" if self.matrices else self._form
        return f"{read}, threads {self._threads[False]} and {self._threads[True]}"

    @property
    def decode_sessions(self) -> dict[str, Any]:
        """The segments as loaded for chunks of one token; loaded when they are first asked for."""
        with self._lock:
            if not self._decode_sessions:
                self._decode_sessions = self._load(decode=True)
            return self._decode_sessions

    def _load(self, *, decode: bool) -> dict[str, Any]:
        options = session_options(self.ort, self._threads[decode], decode=decode, gpu=self.bundle.backend.gpu)
        if self.bundle.backend.gpu:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return {
            name: self._session(self.bundle.folder / file, options, self._instead.get(name))
            for name, file in self.table.segments.items()
        }

    def _session(self, model: Path, options: Any, instead: bytes | None) -> Any:
        backend = self.bundle.backend
        session = _load(self.ort, model, options, instead, backend)
        if backend.provider not in session.get_providers():
            raise _no_provider(
                self.bundle, "it could not load the provider: its libraries of CUDA or cuDNN are missing"
            )
        if backend.gpu and (nodes := on_processor(session)):
            title = f"{model} has nodes that ONNX Runtime {self.ort.__version__} runs on the processor in every step"
            raise ArtifactError(
                listing(title, nodes, "Use the version of ONNX Runtime that README names, or report this.")
            )
        return session

    def close(self) -> None:
        """Drop the segments, the mapped files and matrices in memory; executors keep what they use. Weights on a GPU are freed."""
        for weights in self.weights.values():
            for tensor in weights.values():
                tensor.close()
        self.sessions, self._decode_sessions, self.weights = {}, {}, {}
        if not self._closed:
            self._closed = True
            if self._owns:
                self.memory.close()
                self.files.close()

    def _value(self, owner: str, role: str, bound: Bound) -> Tensor:
        array = self.files.view(bound)
        if role.endswith("tid2eid"):
            gate = self.table.weights[owner].get("ffn.gate.weight")
            if gate is not None:  # [E, C]: a row for each expert
                check_indices(array, gate.shape[0], f"{owner}.{role}", bound.file)
        return self.memory.tensor(array, TYPES[bound.dtype][1])

    def _refuse_unlisted(self) -> None:
        """What the table names in the bundle must be files that the manifest lists, with their digests."""
        placed = {b.file for roles in self.table.weights.values() for b in roles.values() if b.placed}
        forms = self.table.stacked.values()
        graphs = {*self.table.segments.values(), *(file for form in forms for file in (form.file, form.wide) if file)}
        others = sorted({*graphs, *placed} - self.bundle.manifest.files.keys())
        others += sorted(file for file in graphs if not file.endswith(".onnx"))
        if others:
            title = f"{self.bundle.folder / CHAIN} names files that the manifest does not list as what they should be"
            raise ArtifactError(listing(title, others, "Make the bundle again."))

    def changes(self) -> tuple[str, ...]:
        """What happened to the weight files since they were opened; empty if nothing did."""
        return self.opened.changes() + self._stacks.changes()

    def _check(self) -> None:
        """Compare every segment's inputs with what its calls bind, and the state with the manifest."""
        findings: list[str] = []
        shared = {*self.inputs[STEP], *self.outputs[STEP]}
        for call in self.table.calls:
            inputs, outputs = self.inputs[call.segment], self.outputs[call.segment]
            weights = self.table.weights.get(call.owner, {})
            tensors = {t.group: t for t in self.bundle.state.tensors if t.layer == call.layer}
            state = {PAST + group: tensor for group, tensor in tensors.items()}
            known = {*shared, *weights, *state, STREAMS, *self.bundle.io.inputs}
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
                for name in (PRESENT + group for group in tensors)
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


def threads_for(table: ChainTable | EngineTable) -> int:
    """One for a small model, else the processors that this process may use.

    Operators of a small model take microseconds, and handing a part of one to another thread takes longer than the part.
    """
    return 1 if table.weight_bytes < SMALL_BYTES else default_threads()


def session_options(onnxruntime: Any, threads: int, *, decode: bool, gpu: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # `foldkv build` has optimised the graphs. Further fusions make no step of examples/tiny-v4 faster (7.1 ms before, 7.0 ms after)
    # and opening it a half slower (0.40 s instead of 0.25 s).
    if not gpu:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.enable_mem_pattern = decode
    options.enable_cpu_mem_arena = True
    # ONNX Runtime 1.32 moves a DequantizeLinear of an e4m3 input past a Reshape as if it were uint8: other values come out.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Each session has its own threads, and only one session runs at a time. Threads that wait actively after their run take the
    # processors from the next one: a step of examples/tiny-v4 with two threads took five times as long on a busy machine. One
    # pool for all sessions is no way out: ONNX Runtime then refuses every other session of the process that has threads of its own.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def preload(onnxruntime: Any) -> None:
    """Load CUDA's and cuDNN's libraries from packages, if there are such; else the system's are found. It reports failures on stdout."""
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def _no_provider(bundle: Bundle, found: str) -> MissingDependencyError:
    backend = bundle.backend
    package = backend.package or backend.module
    broken = overwritten().get(backend.module)
    return MissingDependencyError(
        f"the bundle {bundle.folder} needs ONNX Runtime's {backend.provider}; {found}. "
        + (broken or f"Run `{pip_line([package])}`, or use the bundle of the target 'cpu'."),
        packages=[package], install=pip_line([package]),
    )  # fmt: skip


def _load(onnxruntime: Any, model: Path, options: Any, instead: bytes | None, backend: Backend) -> Any:
    try:
        provider = (backend.provider, _GPU_OPTIONS) if backend.gpu else backend.provider
        return onnxruntime.InferenceSession(instead or str(model), options, providers=[provider])
    except Exception as error:
        raise ArtifactError(
            f"{model} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: {first_line(error)}. "
            "Make the bundle again, or use another version of ONNX Runtime."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error of ONNX Runtime, without its last full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:400].rstrip(".")


def _step_seconds(first: ChainTable, lock: WeightsLock, run: ChainTable, matrices: str) -> float:
    """About how long the products of a large model take in a step, in the form that is run; 0 for a small model.

    Args:
        first: the table of the first form, which says what has others.
        lock: has the shapes as stored.
        run: the table of the form that is run.
        matrices: how these are read; see :mod:`~foldkv.export.contract.step_time`.
    """
    forms = {call.owner: first.stacked[call.segment] for call in first.calls if call.segment in first.stacked}
    products = sum(prod(lock.weights[owner][role].shape) for owner, form in forms.items() for role in form.blocks)
    decoding = sum(f"{EXPERTS}.codes" in roles for roles in run.weights.values())
    return step_seconds(products, first.chosen * decoding, matrices=matrices)
