"""Bundles of engines whose plans are the lowered, injected graphs themselves, for the stand-in that executes them (executing.py).

Everything else is what `foldkv build` writes: table, lock, manifest, plugins. Kernels are not compiled: a cubin is a kernel's name.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoints import random_checkpoint
from engine import library
from gpus import HostDriver

from foldkv.export.contract.operators import STATE
from foldkv.optimize import build, bundled_kernels
from foldkv.optimize.recipe import Shapes
from foldkv.plugins import cuda
from foldkv.plugins.compile import CompiledKernel
from foldkv.plugins.declarations import PLUGINS
from foldkv.plugins.plans import Kernel
from foldkv.runtime import bundle as bundle_module
from foldkv.runtime import engine_model, engine_part

SHAPES = Shapes(batch=(1, 1, 4), chunk=(1, 1, 16), context=(64, 64, 256))
#: Bytes of shared memory of every kernel: more than it may use without asking.
SHARED = 64 << 10


def executable_bundle(package: Path, out: Path, *, layout: str = "dense") -> tuple[Path, dict[str | bytes, Kernel]]:
    """A bundle for a100, and its kernels by the bytes of their cubins."""
    kernels: dict[str | bytes, Kernel] = {}

    def compiled(wanted: Sequence[tuple[Kernel, int]], **options: Any) -> list[CompiledKernel]:
        found = []
        for kernel, sm in wanted:
            kernels[kernel.name.encode()] = kernel
            found.append(
                CompiledKernel(
                    kernel, sm, "entry", "", kernel.name.encode(), SHARED, 32, 0, 0, 0, 32 * kernel.num_warps
                )
            )
        return found

    def plan(graph: Path, plan: Path, *, sm: int, plugins: int, **options: Any) -> dict[str, Any]:
        kept = out / "graphs" / plan.stem
        shutil.copytree(graph.parent, kept)
        plan.write_text(str((kept / graph.name).resolve()))
        header = {"version": "stand-in", "bytes": plan.stat().st_size, "sm": [sm]}
        return {
            "layers": 1, "plugin_layers": plugins, "kernels": [], "peak_rss_bytes": 1, "warnings": [], "header": header,
        }  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundled_kernels, "compile_kernels", compiled)
        patch.setattr(build, "build_plan", plan)
        [built] = build.build_bundles(
            package, out / "bundles", ["a100"], layout=layout, shapes=SHAPES, cache=out / "cache"
        ).results
    assert built.reason == ""
    return built.folder, kernels


def use(patch: pytest.MonkeyPatch, driver: HostDriver) -> None:
    """Let the runtime open engines over the stand-ins."""
    patch.setattr(cuda, "cuda_driver", lambda: driver)
    patch.setattr(engine_model, "_library", lambda bundle: library(driver, rtx=True))
    patch.setattr(bundle_module, "device_capability", lambda: 80)
    register = engine_part.register_plugins  # the plugins are those of the real library
    patch.setattr(engine_part, "register_plugins", lambda trt: register(importlib.import_module("tensorrt_rtx")))


#: examples/tiny-v4 with one layer of each kind, narrow, for the interpreter.
_MICRO = {
    "num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "moe", "moe"], "sliding_window": 16, "hidden_size": 64,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "moe_intermediate_size": 64, "num_attention_heads": 2, "n_routed_experts": 4, "index_n_heads": 4, "index_topk": 8,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
}  # fmt: skip
#: What reads weights and no state: the interpreter takes seconds for it, and tests/plugins runs its kernels.
STATELESS = frozenset(spec.operator for spec in PLUGINS.values() if not any(t.dtype == STATE for t in spec.inputs))


def micro_config(tiny_checkpoint: Path) -> dict[str, Any]:
    """The config of a model that the stand-in executes in seconds."""
    config: dict[str, Any] = json.loads((tiny_checkpoint / "config.json").read_text()) | _MICRO
    return config


def write_micro_checkpoint(tiny_checkpoint: Path, out: Path, form: str = "plain") -> Path:
    """A checkpoint of that model with random weights."""
    checkpoint = random_checkpoint(micro_config(tiny_checkpoint), out, form)
    shutil.copyfile(tiny_checkpoint / "tokenizer.json", checkpoint / "tokenizer.json")
    return checkpoint
