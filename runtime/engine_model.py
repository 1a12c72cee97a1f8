"""The engines of a bundle, loaded on the first GPU, and its weights in that GPU's memory. Needs neither torch nor Triton.

A plan holds no weight, so a kind of layer is loaded once for all layers of that kind (runtime/engine.py binds weights and
state). The engines' plugins launch the bundle's kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import confined
from ..errors import ArtifactError, InputError, MissingDependencyError, listing
from ..export.contract.chain import STEP, Call
from ..export.contract.engine_set import ENGINES, EngineTable
from ..export.contract.lock import LOCK, Weight, WeightsLock
from ..export.locate import find_weights
from ..inputs import OpenedFiles
from ..plugins.cuda import Device, check
from ..plugins.tensorrt import provide_kernels, register_plugins
from .bundle import Bundle
from .chain import AFTER, PAST, PRESENT, STREAMS
from .plugin_check import bundle_kernels
from .weight_files import WeightFiles, check_indices
from .weight_forms import load_weight

#: Gets every message of the library, at the same level.
log = logging.getLogger("foldkv.engine")
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO,
           "VERBOSE": logging.DEBUG}  # fmt: skip


@functools.cache
def library_logger(trt: Any) -> Any:
    """The logger for ``tensorrt`` or ``tensorrt_rtx``. There is one per process, because the library keeps the first one.

    Messages go to the logger ``foldkv.engine``; ``reasons()`` returns the last errors as one text, and clears them.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, text: str) -> None:
            level = _LEVELS.get(str(severity).rsplit(".", 1)[-1], logging.WARNING)
            log.log(level, "%s", text)
            if level >= logging.ERROR:
                self.errors.append(" ".join(text.split())[:400])

        def reasons(self) -> str:
            text = "; ".join(self.errors) or "the library gave no reason"
            self.errors.clear()
            return text

    return Messages()


#: TensorRT takes addresses that are multiples of this.
ALIGNMENT = 256


class EngineModel:
    """Engines and weights on one GPU. Any number of executors share it."""

    def __init__(self, bundle: Bundle, *, weights_from: Path | None = None) -> None:
        """Find the weights, load kernels and engines, and copy the weights to the GPU.

        Args:
            bundle: the checked bundle.
            weights_from: where the checkpoint's weight files are.

        Raises:
            ArtifactError: an engine cannot be deserialised, or is not the one that the table describes.
            InputError: weights are missing or are others, or the GPU cannot hold them.
            MissingDependencyError: the library is of another version than the engines.
        """
        self.bundle = bundle
        self.table = EngineTable.read(bundle.folder / ENGINES)
        self._lock = WeightsLock.read(bundle.folder / LOCK)
        self._check_table()
        wanted = {
            part.file for call in self.table.calls for weight in self._stored(call).values() for part in weight.parts
        }
        paths = find_weights(bundle.folder, self._lock, bundle.manifest.inputs.checkpoint, weights_from, wanted=wanted)
        self.opened = OpenedFiles(paths.values())
        files = WeightFiles()
        for name, path in paths.items():
            files.open(name, path, self._lock.files[name])
        self.trt = _library(bundle)
        self.device = Device()
        #: Where every weight is, by owner and role.
        self.weights: dict[str, dict[str, int]] = {}
        self._blocks: list[int] = []
        with contextlib.ExitStack() as opened:
            opened.callback(self.device.close)
            with self.device.current():
                self._load_engines(opened)
                opened.callback(self._free)
                for call in self.table.calls:
                    self.weights[call.owner] = self._load(call, files)
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Free engines and weights; closing twice is fine. The kernels stay loaded for other models of the process."""
        self._opened.close()

    def changes(self) -> tuple[str, ...]:
        """What happened to the weight files since they were opened; empty if nothing did."""
        return self.opened.changes()

    def _stored(self, call: Call) -> dict[str, Weight]:
        """The weights of a call, as stored, by role; with scales that the engine does not take."""
        return self._lock.weights[call.owner]

    def _check_table(self) -> None:
        """The plans are files that the manifest lists, and the lock has every weight that a call takes."""
        findings = [
            f"{file} is not a file of the manifest"
            for file in self.table.plans.values()
            if file not in self.bundle.manifest.files
        ]
        for call in self.table.calls:
            known = self._lock.weights.get(call.owner, {})
            roles = {role for role, taken in self.table.weights[call.segment].items()}
            roles |= {taken.scale for taken in self.table.weights[call.segment].values() if taken.scale}
            findings += [f"{call.owner}: the lock has no {role}" for role in sorted(roles - known.keys())]
        if findings:
            title = f"{self.bundle.folder / ENGINES} does not fit the bundle"
            raise ArtifactError(listing(title, findings, "Make the bundle again."))

    def _load_engines(self, opened: contextlib.ExitStack) -> None:
        bundle, trt = self.bundle, self.trt
        kernels = bundle.manifest.kernels
        if kernels is not None:
            provide_kernels(kernels.library, bundle_kernels(bundle.folder, kernels), driver=self.device.driver)
            register_plugins(trt)
        self.logger = library_logger(trt)
        opened.callback(self._drop_engines)
        self._runtime = trt.Runtime(self.logger)
        self.logger.reasons()  # forget errors of earlier engines
        #: By segment: the engine, and the names of its inputs and outputs.
        self.engines: dict[str, Any] = {}
        self.inputs: dict[str, tuple[str, ...]] = {}
        self.outputs: dict[str, tuple[str, ...]] = {}
        for name, file in self.table.plans.items():
            path = confined(bundle.folder, file)
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise ArtifactError(
                    f"{path} cannot be deserialised here: {self.logger.reasons()}. Make the bundle again."
                )
            names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
            given = [engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT for one in names]
            self.engines[name] = engine
            self.inputs[name] = tuple(one for one, inside in zip(names, given, strict=True) if inside)
            self.outputs[name] = tuple(one for one, inside in zip(names, given, strict=True) if not inside)
        self._check_engines()

    def _check_engines(self) -> None:
        """Everything that an engine takes must be given, and what it gives must be what comes next."""
        findings = []
        shared = {*self.bundle.io.inputs, *self.outputs[STEP]}
        for call in self.table.calls:
            groups = {t.group for t in self.bundle.state.tensors if t.layer == call.layer}
            weights = self.table.weights[call.segment]
            known = {*shared, STREAMS, *weights, *(PAST + group for group in groups)}
            found = set(self.inputs[call.segment])
            findings += [
                f"{call.owner}: the engine takes {name!r}, which nothing gives" for name in sorted(found - known)
            ]
            needed = {*weights, *(PAST + group for group in groups)}
            findings += [f"{call.owner}: the engine has no input {name!r}" for name in sorted(needed - found)]
            gives = {PRESENT + group for group in groups}
            gives |= {self.bundle.io.logits} if call.owner == "head" else set()
            outputs = set(self.outputs[call.segment])
            findings += [f"{call.owner}: the engine has no output {name!r}" for name in sorted(gives - outputs)]
            if call.owner != "head" and not outputs & {STREAMS, AFTER}:
                findings.append(f"{call.owner}: the engine gives no streams")
        if findings:
            title = f"{self.bundle.folder} does not have the engines that its table describes"
            raise ArtifactError(listing(title, findings, "Make the bundle again."))

    def _load(self, call: Call, files: WeightFiles) -> dict[str, int]:
        """Copy the weights of a call to the GPU, each to an aligned address; returns the addresses."""
        taken, stored, driver = self.table.weights[call.segment], self._stored(call), self.device.driver
        total = sum(-(-one.bytes // ALIGNMENT) * ALIGNMENT for one in taken.values())
        if not total:
            return {}
        status, address = driver.cuMemAlloc(total)
        if int(status) != 0:
            need = self.table.weight_bytes
            raise InputError(
                f"the weights of {self.bundle.folder} need {need} bytes ({need / 2**30:.2f} GiB), which the GPU cannot "
                "allocate. `foldkv plan` shows the GPUs that hold them."
            )
        self._blocks.append(int(address))
        at, found = int(address), {}
        for role, one in taken.items():
            array = load_weight(one, stored[role], files, stored.get(one.scale))
            if role.endswith("tid2eid"):
                gate = stored["ffn.gate.weight"]  # [E, C]: a row for each expert
                check_indices(array, gate.shape[0], f"{call.owner}.{role}", stored[role].parts[0].file)
            if array.nbytes:
                contiguous = np.ascontiguousarray(array)
                check(driver, driver.cuMemcpyHtoD(at, contiguous.ctypes.data, contiguous.nbytes))
            found[role] = at
            at += -(-one.bytes // ALIGNMENT) * ALIGNMENT
        return found

    def _free(self) -> None:
        with self.device.current():
            for address in self._blocks:
                check(self.device.driver, self.device.driver.cuMemFree(address))
        self._blocks, self.weights = [], {}

    def _drop_engines(self) -> None:
        with self.device.current():
            self.engines, self._runtime = {}, None


def _library(bundle: Bundle) -> Any:
    backend, module = bundle.backend.name, bundle.backend.module
    wanted, found = bundle.manifest.tool_versions.get(backend), importlib.metadata.version(module)
    if wanted != found:
        raise MissingDependencyError(
            f"the engine in {bundle.folder} was built by {backend} {wanted}; {found} is installed. "
            f"Run `pip install {module}=={wanted}`, or build the bundle again."
        )
    return importlib.import_module(module)
