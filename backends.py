"""The backends: what builds bundles and runs them, one object each. Standard library only.

Whoever must know whether a backend needs a GPU, has engines, takes plugins, or keeps a layout or a weight format, asks its
object here: targets, plan, build, the table of packages, the runtime and validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import InputError, nearest
from .export.contract.layouts import BUILT, DENSE, LAYOUTS, CacheLayout
from .export.contract.operators import operator_specs
from .export.contract.profiles import SERVED

#: Formats of weights in bundles (optimize/kept_weights.py has their sizes), from wide to narrow.
FLOAT32, BF16, FP8, FP4 = "float32", "bf16", "fp8", "fp4"


def _holds_served_values(layout: CacheLayout) -> bool:
    """Whether every operator that rounds rounds to the values of the rows that it writes."""
    rounding = [spec for spec in operator_specs().values() if spec.rounds is not None]
    found = {(layout.format_of(group), spec.rounds) for spec in rounding for group in spec.writes}
    return all(format_ in (None, rounds) for format_, rounds in found)


#: Layouts of packed rows that function bodies read: a graph of the profile ``served`` computes their values.
PACKED = tuple(name for name in BUILT if _holds_served_values(LAYOUTS[name]))


@dataclass(frozen=True)
class Backend:
    """What foldkv knows about one backend.

    Attributes:
        name: in manifests, in targets and in `--json`.
        library: its name for people.
        module: the Python module; packages.py knows its package, extra and version.
        gpu: whether it runs on a GPU.
        capabilities: of the GPUs that it builds for; None is every one.
        engine: whether a bundle holds an engine, built for a range of sizes by one version of the library; else it holds an
            ONNX graph, which takes any sizes.
        takes_plugins: whether plugins can compute what touches compressed KV.
        packs_bodies: whether function bodies read packed rows, if the graph's profile computes their values.
        weights: the formats that its bundles keep, from wide to narrow.
        builds_without_gpu: whether it builds for a compute capability that it is told; if not, it builds for the GPU it finds.
        major: the oldest major version that is used; 0 if packages.py says enough.
        package: that runs its bundles, where another one has the same module and can only build them; "" if the module's does both.
        provider: of a graph: what ONNX Runtime calls the device that computes it.
        precision: of its matrices; "" where the target says it.
    """

    name: str
    library: str
    module: str
    gpu: bool
    capabilities: tuple[int, ...] | None
    engine: bool
    takes_plugins: bool
    packs_bodies: bool
    weights: tuple[str, ...]
    builds_without_gpu: bool
    major: int = 0
    package: str = ""
    provider: str = ""
    precision: str = ""

    def builds_for(self, sm: int | None) -> bool:
        """Whether it builds for GPUs of a compute capability; None is a machine without a GPU."""
        if not self.gpu or sm is None:
            return not self.gpu and sm is None
        return self.capabilities is None or sm in self.capabilities

    @property
    def one_gpu(self) -> bool:
        """Whether a bundle runs only on GPUs of the compute capability that it was built for."""
        return self.gpu and self.engine

    def build_feature(self, plugins: bool = False) -> str:
        """What a build is called in the table of packages."""
        if self.engine:
            return f"build {self.library} engines{' with plugins' if plugins else ''}"
        return f"build {self.library} bundles" if self.gpu else "build cpu"

    @property
    def run_feature(self) -> str:
        """What running a bundle is called in the table of packages."""
        if self.engine:
            return f"generate with {self.library} engines"
        return f"generate with {self.library}" if self.gpu else "generate"

    def refusals(
        self, layout: str, *, profile: str, plugins: bool, plugin_gaps: Callable[[], Sequence[str]]
    ) -> list[str]:
        """Why its bundles cannot keep cache rows in a layout; empty if they can.

        Args:
            layout: a name in ``LAYOUTS``.
            profile: of the graph.
            plugins: whether plugins are wanted where the backend takes them.
            plugin_gaps: says why plugins cannot read the layout; only asked where they would have to.
        """
        if plugins and self.takes_plugins:
            return [f"layout {layout} is not supported: {gap}" for gap in plugin_gaps()]
        if layout == DENSE or (self.packs_bodies and layout in PACKED and profile == SERVED):
            return []
        if self.takes_plugins:
            return [f"layout {layout} needs plugins: only they read packed rows on a GPU"]
        reason = (
            f"layout {layout} is not supported: without plugins only a graph of the profile {SERVED} can have packed rows "
            f"({', '.join(PACKED)}), because it computes their values. Export with --profile served, or choose the layout dense"
        )
        return [reason]


ONNX_RUNTIME = Backend(
    name="onnxruntime",
    library="ONNX Runtime",
    module="onnxruntime",
    gpu=False,
    capabilities=(),
    engine=False,
    takes_plugins=False,
    packs_bodies=True,
    weights=(FLOAT32, FP8, FP4),
    builds_without_gpu=True,
    provider="CPUExecutionProvider",
)
TENSORRT_RTX = Backend(
    name="tensorrt-rtx",
    library="TensorRT-RTX",
    module="tensorrt_rtx",
    gpu=True,
    capabilities=(80, 86, 89, 120, 121),
    engine=True,
    takes_plugins=True,
    packs_bodies=False,
    weights=(BF16, FP8, FP4),
    builds_without_gpu=True,
)
TENSORRT = Backend(
    name="tensorrt",
    library="TensorRT",
    module="tensorrt",
    gpu=True,
    capabilities=(80, 86, 89, 90, 100, 103, 120, 121),
    engine=True,
    takes_plugins=True,
    packs_bodies=False,
    weights=(BF16, FP8, FP4),
    builds_without_gpu=False,
    major=11,
)
ONNX_RUNTIME_CUDA = Backend(
    name="onnxruntime-cuda",
    library="ONNX Runtime CUDA",
    module="onnxruntime",
    gpu=True,
    capabilities=None,
    engine=False,
    takes_plugins=False,
    packs_bodies=True,
    weights=(FLOAT32, FP8, FP4),
    builds_without_gpu=True,
    package="onnxruntime-gpu",
    provider="CUDAExecutionProvider",
    precision=FLOAT32,
)
#: All backends by name. Of several that build for a target, the first one is preferred.
BACKENDS = {backend.name: backend for backend in (ONNX_RUNTIME, TENSORRT_RTX, TENSORRT, ONNX_RUNTIME_CUDA)}


def backend_named(name: str) -> Backend:
    """The backend with that name.

    Raises:
        InputError: there is none.
    """
    if name not in BACKENDS:
        raise InputError(
            f"backend {name!r} is not known{nearest(name, list(BACKENDS))}; expected one of {', '.join(BACKENDS)}."
        )
    return BACKENDS[name]
