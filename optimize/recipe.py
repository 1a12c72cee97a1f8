"""BuildSpec: everything that changes the result of a build, in one frozen value with a key."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..artifact import sha256_json
from ..errors import InputError
from ..export.contract.geometry import ModelSpec
from ..export.memory import check_sizes
from ..manifests import ShapeRanges


@dataclass(frozen=True)
class Shapes(ShapeRanges):
    """Sizes that an engine can be built for, each (smallest, typical, largest).

    Raises:
        InputError: no engine can have these sizes.
    """

    def __post_init__(self) -> None:
        for name, sizes in asdict(self).items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                raise InputError(
                    f"shapes.{name} is {list(sizes)}; expected smallest <= typical <= largest, each at least 1."
                )
        check_sizes(self.batch[2], self.chunk[2])
        if self.chunk[2] > self.context[0]:
            raise InputError(
                f"the largest chunk is {self.chunk[2]} and the smallest context {self.context[0]}; a chunk must fit into the context."
            )


def default_shapes(spec: ModelSpec) -> Shapes:
    """Sizes that suit most uses of a model: up to 64 sequences at once, chunks of up to 256 tokens, its full context."""
    most = spec.max_position_embeddings
    chunk = min(256, most)
    return Shapes(batch=(1, 1, 64), chunk=(1, 1, chunk), context=(chunk, min(4096, most), most))


@dataclass(frozen=True)
class BuildSpec:
    """What one engine is built from and for."""

    graph_sha256: str
    weights_sha256: str
    target: dict[str, Any]
    backend: str
    backend_version: str
    precision: str
    plugins: bool
    kernel_compiler: str = ""  # what the plugins' kernels were compiled with; empty without plugins
    layout: str = "dense"
    shapes: Shapes = field(default_factory=Shapes)
    place: bool = True  # whether the cpu bundle has weights converted; engines always do
    recipe: int = 13  # raised when this package's own way of building changes

    def cache_key(self) -> str:
        """A sha256 that changes with every field."""
        return sha256_json(asdict(self))
