"""Triton kernels to cubins and PTX, per compute capability, with no GPU; checked for what Triton does not check."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import scratch_folder
from ..caches import cache_folder, keep
from ..errors import BuildError
from ..packages import lacks
from ..progress import Progress, Say, silent
from .plans import Kernel

#: Shared memory that one block may use, bytes (CUDA programming guide, technical specifications per capability).
SHARED_LIMITS = {
    80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376, 121: 101_376
}  # fmt: skip
#: PTX of CUDA 12.8, which drivers since r570 accept; Triton's own default may be newer. Some GPUs need that of CUDA 12.9.
PTX_VERSIONS = dict.fromkeys(SHARED_LIMITS, 87) | {103: 88, 121: 88}
_TENSOR_MEMORY = 512  # columns


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel and its resources.

    ``shared`` is in bytes, ``stack`` and ``spills`` in bytes per thread. A stack without spills is an array: the range
    reduction of sine and cosine has one.
    """

    kernel: Kernel
    sm: int
    entry: str
    ptx: str
    cubin: bytes
    shared: int
    registers: int
    stack: int
    spills: int
    tensor_memory: int
    threads: int

    def facts(self) -> dict[str, Any]:
        """What a launcher needs to know, and the resources, as JSON values."""
        fields = ("entry", "shared", "registers", "stack", "spills", "tensor_memory", "threads")
        return {
            "name": self.kernel.name, "sm": self.sm, "sha256": hashlib.sha256(self.cubin).hexdigest(),
            "bytes": len(self.cubin), **{name: getattr(self, name) for name in fields},
        }  # fmt: skip


def triton_version() -> str:
    """The installed Triton version.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise lacks("compiling plugins", ["triton"]) from None


def compiler_identity() -> str:
    """Triton's version and a digest of the kernels' sources. With a kernel and its target, they determine a cubin.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    return f"triton {triton_version()}, kernels {_sources_digest()[:16]}"


_KERNELS = Path(__file__).parent / "kernels"


def _sources_digest(module: str = "") -> str:
    """Digest of the sources of a kernel module and of those that it imports; without a name, of all kernel modules. This file,
    which settles how they are compiled, is one of the sources."""
    names = _imported(module) if module else {path.stem for path in _KERNELS.glob("*.py")}
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in sorted(names):
        digest.update((_KERNELS / f"{name}.py").read_bytes())
    return digest.hexdigest()


def _imported(module: str) -> set[str]:
    """A kernel module and those that it imports, directly or indirectly."""
    found, waiting = set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += re.findall(r"^from \.(\w+) import", (_KERNELS / f"{name}.py").read_text(), re.MULTILINE)
    return found


def compile_kernels(
    wanted: Sequence[tuple[Kernel, int]],
    *,
    jobs: int | None = None,
    cache: Path | None = None,
    progress: Say = silent,
) -> list[CompiledKernel]:
    """Compile kernels for compute capabilities, in child processes, because LLVM ends a process on some errors.

    Args:
        wanted: pairs of a kernel and a compute capability.
        jobs: number of parallel processes; the default is the number of processors.
        cache: folder that keeps results between runs; the default is FOLDKV_CACHE or ~/.cache/foldkv.
        progress: a :class:`~foldkv.progress.Progress` learns how many are compiled.

    Raises:
        BuildError: a kernel does not compile, or would not run on its target (too much shared memory, scratch memory).
        MissingDependencyError: Triton is not installed.
    """
    files = _cache_files(wanted, cache or cache_folder())
    found: dict[int, CompiledKernel] = {}
    missing = []
    for index, (kernel, sm) in enumerate(wanted):
        kept = _read_cached(files[index], kernel, sm)
        if kept is None:
            missing.append(index)
        else:
            found[index] = kept
    if missing:
        spawn = multiprocessing.get_context("spawn")
        # No limit of tasks per child: with one, Python 3.11's pool can wait forever (python/cpython issue 115634).
        workers = min(len(missing), jobs or len(os.sched_getaffinity(0)))
        report = Progress.of(progress)
        with (
            scratch_folder("triton") as scratch,  # here, because processes that are killed leave theirs
            concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=_leave_interrupts) as pool,
        ):
            futures = {pool.submit(_compile, *wanted[index], scratch): index for index in missing}
            for future in concurrent.futures.as_completed(futures):
                kernel, sm = wanted[futures[future]]
                try:
                    compiled = future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    raise BuildError(f"kernel {kernel.name} for sm{sm}: the compiler ended its process.") from None
                report.steps(len(found) + 1, len(wanted), "kernels")
                found[futures[future]] = compiled
                _write_cached(files[futures[future]], compiled)
    return [found[index] for index in range(len(wanted))]


def _leave_interrupts() -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the parent ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def store_kernels(compiled: Sequence[CompiledKernel], cache: Path) -> None:
    """Put compiled kernels into a cache folder for another machine, without their PTX, which is most of their size.

    :func:`compile_kernels` finds them there.
    """
    files = _cache_files([(one.kernel, one.sm) for one in compiled], cache)
    for path, one in zip(files, compiled, strict=True):
        _write_cached(path, dataclasses.replace(one, ptx=""))


def _cache_files(wanted: Sequence[tuple[Kernel, int]], cache: Path) -> list[Path]:
    version = triton_version()
    # After a change of one kernel file, the results for the other files stay valid.
    sources = {module: _sources_digest(module) for module in {kernel.module for kernel, _ in wanted}}
    keys = [_cache_key(kernel, sm, version, sources[kernel.module]) for kernel, sm in wanted]
    return [cache / "kernels" / f"{key}.json" for key in keys]


def _cache_key(kernel: Kernel, sm: int, version: str, sources: str) -> str:
    fields = [kernel.name, sm, version, PTX_VERSIONS[sm], sources]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]


def _read_cached(path: Path, kernel: Kernel, sm: int) -> CompiledKernel | None:
    try:
        row = json.loads(path.read_text())
        return CompiledKernel(**{**row, "kernel": kernel, "sm": sm, "cubin": bytes.fromhex(row["cubin"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_cached(path: Path, compiled: CompiledKernel) -> None:
    """Best effort: a cache that cannot be written only costs time."""
    fields = {f.name: getattr(compiled, f.name) for f in dataclasses.fields(compiled) if f.name != "kernel"}
    keep(path, lambda part: part.write_text(json.dumps(fields | {"cubin": compiled.cubin.hex()})))


def _compile(kernel: Kernel, sm: int, scratch: Path) -> CompiledKernel:
    """Compile one kernel; runs in a child process. Files that are needed meanwhile lie in ``scratch``."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # smaller, and without paths of this machine
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    with tempfile.TemporaryDirectory(dir=scratch) as own:
        os.environ["TRITON_CACHE_DIR"] = own
        log = io.StringIO()
        with contextlib.redirect_stdout(log):  # also what Triton prints when ptxas refuses a listing
            return _compile_here(kernel, sm, log)


def _compile_here(kernel: Kernel, sm: int, log: io.StringIO) -> CompiledKernel:
    import triton
    import triton.runtime.cache
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Each process would hash all of Triton, two seconds of work, to name an entry of a cache that is a folder of this call's own.
    triton.runtime.cache.triton_key = triton_version
    module, name = kernel.function.split(".")
    function = getattr(importlib.import_module(f"foldkv.plugins.kernels.{module}"), name)
    order = [*(argument for argument, _ in kernel.arguments), *(constant for constant, _ in kernel.constants)]
    if order != function.arg_names:
        raise BuildError(f"kernel {kernel.function} takes {function.arg_names}; its launch declares {order}.")
    constants: dict[str, Any] = dict(kernel.constants)
    constants |= {argument: None for argument, type_ in kernel.arguments if type_ is None}
    signature = {argument: type_ or "constexpr" for argument, type_ in kernel.arguments}
    signature |= {constant: "constexpr" for constant, _ in kernel.constants}
    # TensorRT aligns every buffer to 256 bytes; unless Triton is told, it does not vectorize loads.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (_, type_) in enumerate(kernel.arguments)
        if (type_ or "").startswith("*")
    }
    try:
        built = triton.compile(
            ASTSource(function, signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", sm, 32),
            options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "ptx_version": PTX_VERSIONS[sm]},
        )
    except Exception as error:  # noqa: BLE001 - Triton's errors share no base, and must be picklable here
        raise BuildError(f"kernel {kernel.name} does not compile for sm{sm}: {str(error)[-400:]}") from None
    meta = built.metadata
    registers, stack, spills = _resources(log.getvalue())
    wrong = []
    if meta.shared > SHARED_LIMITS[sm]:
        wrong.append(f"{meta.shared} B of shared memory, sm{sm} has {SHARED_LIMITS[sm]}")
    if meta.tmem_size > _TENSOR_MEMORY:
        wrong.append(f"{meta.tmem_size} columns of tensor memory, there are {_TENSOR_MEMORY}")
    if meta.global_scratch_size or meta.profile_scratch_size:
        wrong.append("it needs scratch memory, which plugins do not get")
    if meta.num_ctas != 1 or meta.launch_cooperative_grid or meta.launch_pdl or meta.tensordesc_meta:
        wrong.append("it needs a cluster, a cooperative launch or descriptors, which TensorRT does not launch")
    if wrong:
        raise BuildError(f"kernel {kernel.name} cannot run on sm{sm}: {'; '.join(wrong)}.")
    return CompiledKernel(
        kernel, sm, meta.name, built.asm["ptx"], built.asm["cubin"], meta.shared, registers, stack, spills,
        meta.tmem_size, meta.num_warps * 32,
    )  # fmt: skip


def _resources(log: str) -> tuple[int, int, int]:
    """Registers, stack bytes and spilled bytes per thread, from the log of ptxas."""
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", log, re.DOTALL)
    if found is None:
        raise BuildError(f"ptxas reported no resources: {log[-200:]!r}")
    stack, spills, registers = map(int, found.groups())
    return registers, stack, spills


def ptx_parameters(ptx: str) -> list[str]:
    """Types of the kernel's parameters in order ("u64" for a pointer, "u32" for an int32)."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise BuildError("the PTX has no entry point")
    return re.findall(r"\.param\s+\.([us]\d+)", entry[1])
