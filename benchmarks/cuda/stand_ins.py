"""Stand-ins for NVIDIA's libraries, so that ONNX Runtime's CUDA provider can be asked without a GPU what it would do.

The provider is a library that needs CUDA's to be loaded. Which kernels it has, and which nodes of a graph it takes, it decides
without a GPU. So these libraries have every symbol that it needs: memory is the host's, and everything else succeeds and does
nothing. **No kernel runs, so values cannot be computed with them.** Needs gcc and nm.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path

_SET = "LD_LIBRARY_PATH"
_MARK = "FOLDKV_CUDA_STAND_INS"
#: Libraries that are loaded although the providers name no versioned symbol of theirs.
_ALWAYS = ("libcuda.so.1", "libcurand.so.10", "libnvinfer.so.10", "libnvonnxparser.so.10")
_UNVERSIONED = {"cu": "libcuda.so.1", "createInfer": "libnvinfer.so.10", "createNv": "libnvonnxparser.so.10"}
_OTHERS = ("getInferLibVersion", "getPluginRegistry")
_HANDLE = "int {name}(void **handle) {{ *handle = malloc(64); return 0; }}"
_HANDLES = ("cudaEventCreate", "cublasCreate_v2", "cublasLtCreate", "cudnnCreate", "cudaStreamCreate")
_HANDLES_WITH_FLAGS = ("cudaEventCreateWithFlags", "cudaStreamCreateWithFlags")
#: Functions whose result matters. The properties are those of a GPU of compute capability 9.0, as CUDA 13 lays them out.
_BODIES = {
    "cudaMalloc": "int cudaMalloc(void **p, size_t n) { *p = aligned_alloc(256, (n + 255) / 256 * 256); return 0; }",
    "cudaMallocHost": "int cudaMallocHost(void **p, size_t n) { *p = malloc(n); return 0; }",
    "cudaHostAlloc": "int cudaHostAlloc(void **p, size_t n, unsigned f) { *p = malloc(n); return 0; }",
    "cudaFree": "int cudaFree(void *p) { free(p); return 0; }",
    "cudaFreeHost": "int cudaFreeHost(void *p) { free(p); return 0; }",
    "cudaMemcpy": "int cudaMemcpy(void *to, const void *from, size_t n, int k) { memcpy(to, from, n); return 0; }",
    "cudaMemcpyAsync": "int cudaMemcpyAsync(void *to, const void *from, size_t n, int k, void *s) { memcpy(to, from, n); return 0; }",
    "cudaMemset": "int cudaMemset(void *to, int v, size_t n) { memset(to, v, n); return 0; }",
    "cudaMemsetAsync": "int cudaMemsetAsync(void *to, int v, size_t n, void *s) { memset(to, v, n); return 0; }",
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *n) { *n = 0; return 0; }",
    "cudaMemGetInfo": "int cudaMemGetInfo(size_t *f, size_t *t) { *f = *t = 80ull << 30; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaGetErrorName": 'const char *cudaGetErrorName(int e) { return "stand-in"; }',
    "cudaGetErrorString": 'const char *cudaGetErrorString(int e) { return "stand-in"; }',
    "cudaDeviceGetAttribute": "int cudaDeviceGetAttribute(int *v, int a, int d) "
    "{ *v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : a == 10 ? 32 : 1; return 0; }",
    "cudaGetDeviceProperties": """
struct head { char name[256], uuid[16], luid[8]; unsigned mask; size_t total, shared; int registers, warp; size_t pitch;
    int threads, block[3], grid[3]; size_t constant; int major, minor; };
int cudaGetDeviceProperties(struct head *p, int d) { memset(p, 0, 1008); p->total = 80ull << 30; p->shared = 49152;
    p->registers = 65536; p->warp = 32; p->threads = 1024; p->major = 9; return 0; }""",
    "cudaPointerGetAttributes": "int cudaPointerGetAttributes(void *a, const void *p) { memset(a, 0, 32); return 0; }",
    "__cudaRegisterFatBinary": "void **__cudaRegisterFatBinary(void *p) { static void *x[8]; return x; }",
}


def restart_with_stand_ins() -> None:
    """Run this script again with stand-ins for what the installed providers need, unless it has them already; it does not return.

    Where the providers find NVIDIA's own libraries and a GPU, do not call this.
    """
    if _MARK in os.environ:
        return
    capi = Path(str(metadata.distribution("onnxruntime-gpu").locate_file("onnxruntime/capi")))
    with tempfile.TemporaryDirectory() as folder:
        make_stand_ins(sorted(capi.glob("libonnxruntime_providers_*.so")), Path(folder))
        environment = os.environ | {_SET: f"{folder}:{os.environ.get(_SET, '')}", _MARK: "1"}
        done = subprocess.run([sys.executable, *sys.argv], env=environment, check=False)
    sys.exit(done.returncode)


def make_stand_ins(providers: list[Path], folder: Path) -> None:
    """Compile a library for each of NVIDIA's that the providers need, with their symbols and versions."""
    symbols: dict[str, set[str]] = defaultdict(set, {name: set() for name in _ALWAYS})
    for provider in providers:
        listed = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
        for name in (line.split()[-1] for line in listed.stdout.splitlines()):
            if versioned := re.fullmatch(r"(\w+)@(lib(?:cu)\w+\.so\.\d+)", name):
                symbols[versioned[2]].add(versioned[1])
            elif home := next((home for start, home in _UNVERSIONED.items() if name.startswith(start)), ""):
                symbols[home].add(name)
    symbols["libnvinfer.so.10"].update(_OTHERS)
    for library, names in symbols.items():
        _compile(folder, library, names)


def _compile(folder: Path, library: str, names: set[str]) -> None:
    lines = ["#include <stdlib.h>", "#include <string.h>", *(_body(name) for name in sorted(names))]
    source, versions = folder / f"{library}.c", folder / f"{library}.map"
    source.write_text("\n".join(lines) + "\n")
    versions.write_text(f"{library} {{ global: *; }};\n")
    command = ["gcc", "-w", "-shared", "-fPIC", "-o", str(folder / library), str(source), f"-Wl,-soname,{library}"]
    if library not in _ALWAYS:
        command.append(f"-Wl,--version-script={versions}")
    subprocess.run(command, check=True)


def _body(name: str) -> str:
    if name in _BODIES:
        return _BODIES[name]
    if name in _HANDLES:
        return _HANDLE.format(name=name)
    if name in _HANDLES_WITH_FLAGS:
        return _HANDLE.format(name=name).replace("handle)", "handle, unsigned flags)", 1)
    return f"long {name}() {{ return 0; }}"
