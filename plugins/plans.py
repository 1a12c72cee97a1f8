"""What a call launches, as plain values: kernels with their constants, grids and arguments. Standard library only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile: a function of plugins/kernels, its argument types and its constants.

    Attributes:
        function: "module.function" below ``foldkv.plugins.kernels``.
        arguments: (name, Triton type) in order; None for an argument that this form does not use.
        constants: (name, value) in order.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    function: str
    arguments: tuple[tuple[str, str | None], ...]
    constants: tuple[tuple[str, int | float | str], ...]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def module(self) -> str:
        """The module of plugins/kernels with the function."""
        return self.function.split(".")[0]

    @property
    def name(self) -> str:
        """A name that changes with every field."""
        fields = [self.function, self.arguments, self.constants, self.num_warps, self.num_stages]
        return f"{self.function.split('.')[1]}-{hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Argument:
    """A kernel's argument: "input" or "output" and its index, "workspace" and its byte offset, or "int32"."""

    kind: str
    value: Any


@dataclass(frozen=True)
class Launch:
    """One kernel launch. ``grid`` has x, y and z."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, and the bytes of scratch memory that they share."""

    launches: tuple[Launch, ...]
    workspace: int = 0
