"""The engines of a bundle, dealt out over GPUs with their weights. Needs neither torch nor Triton."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, InputError, MissingDependencyError, listing
from ..export.contract.chain import Call
from ..export.contract.dealing import deal
from ..export.contract.engine_set import ENGINES, EngineTable
from ..export.contract.lock import LOCK, WeightsLock
from ..export.locate import find_weights
from ..inputs import OpenedFiles
from ..plugins.cuda import Device
from ..progress import BYTES, Progress, Say, silent
from .bundle import Bundle
from .engine_part import EnginePart, part_bytes
from .plugin_check import bundle_kernels
from .weight_check import WeightCheck
from .weight_files import WeightFiles

#: Gets every message of the library, at the same level.
log = logging.getLogger("foldkv.engine")
_LEVELS = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO,
           "VERBOSE": logging.DEBUG}  # fmt: skip


@functools.cache
def library_logger(trt: Any) -> Any:
    """The logger for ``tensorrt`` or ``tensorrt_rtx``. There is one per process, because the library keeps the first one.

    Messages go to the logger ``foldkv.engine``. ``reasons()`` returns as one text the last errors that the library reported in the
    calling thread since ``forget()``; what a thread of the library's own reported goes to whoever asks first.
    """

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._own = threading.local()  # errors of threads that ask
            self._others: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, text: str) -> None:
            level = _LEVELS.get(str(severity).rsplit(".", 1)[-1], logging.WARNING)
            log.log(level, "%s", text)
            if level >= logging.ERROR:
                getattr(self._own, "errors", self._others).append(" ".join(text.split())[:400])

        def forget(self) -> None:
            """Drop the calling thread's errors."""
            self._own.errors = deque(maxlen=3)

        def reasons(self) -> str:
            """The calling thread's errors, or else those of threads that never ask; and drop them."""
            found = getattr(self._own, "errors", None) or self._others
            text = "; ".join(found) or "the library gave no reason"
            found.clear()
            return text

    return Messages()


class EngineModel:
    """Engines and weights on one or more GPUs. Any number of executors share it.

    Attributes:
        parts: what each GPU has, in the order of the calls.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        weights_from: Path | None = None,
        devices: Sequence[int] = (0,),
        context: int | None = None,
        batch: int = 1,
        verify: bool = False,
        progress: Say = silent,
    ) -> None:
        """Find the weights, deal the segments out, load kernels and engines, and copy the weights to the GPUs.

        Args:
            bundle: the checked bundle.
            weights_from: where the checkpoint's weight files are.
            devices: numbers of the GPUs, in the order in which they get the segments.
            context: tokens of a sequence for which there must be room; the default is the engines' largest.
            batch: sequences for which there must be room.
            verify: hash the weight files while they are copied, and refuse others than the lock's.
            progress: called while weights are copied; a :class:`~foldkv.progress.Progress` learns more.

        Raises:
            ArtifactError: an engine cannot be deserialised, or is not the one that the table describes.
            InputError: weights are missing or are others, there is no such GPU, or the GPUs cannot hold the weights.
            MissingDependencyError: the library is of another version than the engines.
        """
        self.bundle = bundle
        self.table = EngineTable.read(bundle.folder / ENGINES)
        self._lock = WeightsLock.read(bundle.folder / LOCK)
        self._check_table()
        _check_devices(devices)
        wanted = {
            part.file
            for call in self.table.calls
            for weight in self._lock.weights[call.owner].values()
            for part in weight.parts
        }
        paths = find_weights(bundle.folder, self._lock, bundle.manifest.inputs.checkpoint, weights_from, wanted=wanted)
        self.opened = OpenedFiles(paths.values())
        files = WeightFiles()
        for name, path in paths.items():
            files.open(name, path, self._lock.files[name])
        self.trt = _library(bundle)
        self.logger = library_logger(self.trt)
        #: Whether decode steps can be captured in CUDA graphs.
        self.captures = all(one.capture for one in (bundle.manifest.engine.segments or {}).values()) and bool(
            bundle.manifest.engine.segments
        )
        kernels = bundle.manifest.kernels
        images = () if kernels is None else tuple(bundle_kernels(bundle.folder, kernels))
        report, total, done = Progress.of(progress), self.table.weight_bytes, 0
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as checking:
            check = checking.enter_context(WeightCheck(files, self._lock.files, paths)) if verify else None
            found = []
            for ordinal in devices:
                found.append(Device(ordinal=ordinal))
                opened.callback(found[-1].close)
            owners = deal(self.costs(context, batch), [device.memory_bytes() for device in found])
            parts = []
            for number, device in enumerate(found):
                calls = [call for call, owner in zip(self.table.calls, owners, strict=True) if owner == number]
                parts.append(EnginePart(bundle, self.table, self.trt, self.logger, device, calls, images))
                opened.callback(parts[-1].close)
            for part in parts:
                report(f"weights of {len(part.calls)} segments to GPU {part.device.ordinal}")
                part.load(self._lock, files, _following(report, done, total))
                done += sum(self.table.bytes_of(call) for call in part.calls)
            if check is not None:
                report("waiting for the sha256 of the weight files")
                check.finish()
            self.parts = tuple(parts)
            self._opened = opened.pop_all()

    def costs(self, context: int | None, batch: int) -> list[int]:
        """Bytes of every call on its GPU: weights, and the state of ``batch`` sequences of ``context`` tokens."""
        longest = self.bundle.model.max_position_embeddings
        tokens = context or min(longest, self.bundle.largest("context") or longest)
        return [part_bytes(self.table, call) + self._state_bytes(call, tokens, batch) for call in self.table.calls]

    def close(self) -> None:
        """Free engines and weights; closing twice is fine."""
        self._opened.close()

    def changes(self) -> tuple[str, ...]:
        """What happened to the weight files since they were opened; empty if nothing did."""
        return self.opened.changes()

    def _state_bytes(self, call: Call, context: int, batch: int) -> int:
        return sum(
            tensor.bytes(context, batch) * (1 if tensor.name in self.bundle.in_place else 2)
            for tensor in self.bundle.state.tensors
            if tensor.layer == call.layer
        )

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


def _following(report: Progress, before: int, total: int) -> Callable[[int, int, float], None]:
    """Reports the bytes of one GPU after those of the GPUs before it."""
    return lambda copied, _, rate: report.steps(before + copied, total, BYTES)


def _check_devices(devices: Sequence[int]) -> None:
    if not devices or any(type(one) is not int or one < 0 for one in devices) or len(set(devices)) < len(devices):
        raise InputError(f"devices are {list(devices)!r}; expected different numbers of GPUs, such as 0 or 0,1.")


def _library(bundle: Bundle) -> Any:
    backend, module = bundle.backend.name, bundle.backend.module
    wanted, found = bundle.manifest.tool_versions.get(backend), importlib.metadata.version(module)
    if wanted != found:
        raise MissingDependencyError(
            f"the engine in {bundle.folder} was built by {backend} {wanted}; {found} is installed. "
            f"Run `pip install {module}=={wanted}`, or build the bundle again."
        )
    return importlib.import_module(module)
