"""Some calls of a bundle in a row on one GPU: their engines, their kernels, and their weights in that GPU's memory.

A plan holds no weight, so a kind of layer is loaded once for all layers of that kind. The engines' plugins launch the bundle's
kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..artifact import confined
from ..errors import ArtifactError, InputError, listing
from ..export.contract.call_weights import aligned
from ..export.contract.chain import STEP, Call
from ..export.contract.engine_set import EngineTable
from ..export.contract.lock import WeightsLock
from ..plugins.cuda import Device, KernelImage
from ..plugins.tensorrt import provide_kernels, register_plugins, release_kernels
from .bundle import Bundle
from .chain import AFTER, PAST, PRESENT, STREAMS
from .runtime_cache import RuntimeCaches
from .weight_files import WeightFiles, check_indices
from .weight_forms import load_weight
from .weight_upload import WeightUpload


class EnginePart:
    """Engines and weights of some calls on one GPU. Any number of executors share it.

    Attributes:
        device: the GPU.
        calls: what it computes, in order.
        engines: by segment, those of the calls and the step.
        inputs: names of every engine's inputs, by segment.
        outputs: likewise.
        weights: where every weight is, by owner and role.
        caches: kernels that were compiled for this kind of GPU, if the library compiles them while it runs.
    """

    def __init__(
        self, bundle: Bundle, table: EngineTable, trt: Any, logger: Any, device: Device, calls: Sequence[Call],
        images: Iterable[KernelImage],
    ) -> None:  # fmt: skip
        """Load kernels and engines.

        Raises:
            ArtifactError: an engine cannot be deserialised, or is not the one that the table describes.
            FoldkvError: the driver refuses a kernel.
        """
        self.bundle, self.table, self.trt, self.logger = bundle, table, trt, logger
        self.device, self.calls = device, tuple(calls)
        self.engines: dict[str, Any] = {}
        self.inputs: dict[str, tuple[str, ...]] = {}
        self.outputs: dict[str, tuple[str, ...]] = {}
        self.weights: dict[str, dict[str, int]] = {}
        self._blocks: list[int] = []
        with contextlib.ExitStack() as opened, device.current():
            kernels = bundle.manifest.kernels
            if kernels is not None:
                provide_kernels(kernels.library, images, driver=device.driver)
                opened.callback(self._in_context, lambda: release_kernels(kernels.library))
                register_plugins(trt)
            #: What TensorRT-RTX compiles while contexts run; TensorRT compiles nothing then.
            self.caches = RuntimeCaches(f"sm{bundle.manifest.target.sm}") if compiles_while_running(trt) else None
            opened.callback(self._in_context, self._drop_engines)
            self._runtime = trt.Runtime(logger)
            logger.forget()  # errors of earlier engines
            for name in dict.fromkeys((STEP, *(call.segment for call in calls))):
                self._load_engine(name)
            self._check_engines()
            opened.callback(self._in_context, self._free)
            self._opened = opened.pop_all()

    def digest(self, segment: str) -> str:
        """The sha256 of a segment's plan."""
        return self.bundle.manifest.files[self.table.plans[segment]].sha256

    @property
    def weight_bytes(self) -> int:
        """Bytes that its weights take on the GPU, with what lies between them."""
        return sum(part_bytes(self.table, call) for call in self.calls)

    def close(self) -> None:
        """Free engines and weights; closing twice is fine."""
        self._opened.close()

    def load(self, lock: WeightsLock, files: WeightFiles, say: Callable[[int, int, float], None]) -> None:
        """Copy the weights to the GPU, each to an aligned address.

        Args:
            lock: where they lie.
            files: the mapped files.
            say: called with the bytes copied, all bytes, and bytes per second.

        Raises:
            ArtifactError: bytes cannot be taken as the table says.
            InputError: the GPU cannot hold them, or an index points nowhere.
        """
        with self.device.current():
            places = [(call, self._allocate(call)) for call in self.calls]
            upload = WeightUpload(self.device, self.weight_bytes, say)
            try:
                for call, address in places:
                    self.weights[call.owner] = self._copy(call, address, lock, files, upload)
                upload.finish()
            finally:
                upload.close()

    def _in_context(self, work: Callable[[], object]) -> None:
        with self.device.current():
            work()

    def _load_engine(self, name: str) -> None:
        path, trt = confined(self.bundle.folder, self.table.plans[name]), self.trt
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ArtifactError(f"{path} cannot be deserialised here: {self.logger.reasons()}. Make the bundle again.")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        given = [engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT for one in names]
        self.engines[name] = engine
        self.inputs[name] = tuple(one for one, inside in zip(names, given, strict=True) if inside)
        self.outputs[name] = tuple(one for one, inside in zip(names, given, strict=True) if not inside)

    def _check_engines(self) -> None:
        """Everything that an engine takes must be given, and what it gives must be what comes next."""
        findings = []
        shared = {*self.bundle.io.inputs, *self.outputs[STEP]}
        for call in self.calls:
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

    def _allocate(self, call: Call) -> int:
        """Memory for the weights of a call."""
        size = part_bytes(self.table, call)
        if not size:
            return 0
        status, address = self.device.driver.cuMemAlloc(size)
        if int(status) != 0:
            need = self.weight_bytes
            raise InputError(
                f"the weights of {self.bundle.folder} need {need} bytes ({need / 2**30:.2f} GiB) on GPU {self.device.ordinal}, which it "
                "cannot allocate. Give the model more GPUs: `foldkv plan` shows how many hold it."
            )
        self._blocks.append(int(address))
        return int(address)

    def _copy(
        self, call: Call, address: int, lock: WeightsLock, files: WeightFiles, upload: WeightUpload
    ) -> dict[str, int]:
        """Copy the weights of a call one after the other; returns their addresses."""
        taken, stored, found = self.table.weights[call.segment], lock.weights[call.owner], dict[str, int]()
        for role, one in taken.items():
            array = load_weight(one, stored[role], files, stored.get(one.scale))
            if role.endswith("tid2eid"):
                gate = stored["ffn.gate.weight"]  # [E, C]: a row for each expert
                check_indices(array, gate.shape[0], f"{call.owner}.{role}", stored[role].parts[0].file)
            upload.copy(address, array)
            found[role] = address
            address += aligned(one.bytes)
        return found

    def _free(self) -> None:
        for address in self._blocks:
            self.device.driver.cuMemFree(address)  # unchecked: the others must go too
        self._blocks, self.weights = [], {}

    def _drop_engines(self) -> None:
        if self.caches is not None:
            self.caches.close()
        self.engines, self._runtime = {}, None


def compiles_while_running(trt: Any) -> bool:
    """Whether the library compiles kernels for the shapes that it meets, as TensorRT-RTX does."""
    return hasattr(trt, "DynamicShapesKernelSpecializationStrategy")


def part_bytes(table: EngineTable, call: Call) -> int:
    """Bytes that the weights of a call take on a GPU, each at an aligned address."""
    return sum(aligned(taken.bytes) for taken in table.weights[call.segment].values())
