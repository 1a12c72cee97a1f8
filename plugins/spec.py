"""PluginSpec: what a compiled plugin for one operator can take, so that a graph can be given it or not."""

from __future__ import annotations

from dataclasses import dataclass

#: The namespace that TensorRT's registry knows foldkv's plugins by. A node that carries it is taken by the
#: registered creator even where a function body of the same name exists.
NAMESPACE = "foldkv"


@dataclass(frozen=True)
class PluginSpec:
    """A plugin for one operator.

    Attributes:
        operator: ONNX name of the operator it computes.
        version: of the plugin, as the registry has it.
        sms: compute capabilities that it holds kernels for.
        dtypes: precisions of its activations ("bfloat16", "float16", "float32").
        layouts: row formats of the state it reads ("dense", ...).
        widths: sizes of the last axis of its first input that it was compiled for; empty for any.
    """

    operator: str
    version: str
    sms: frozenset[int]
    dtypes: frozenset[str]
    layouts: frozenset[str] = frozenset({"dense"})
    widths: frozenset[int] = frozenset()

    def refusals(self, *, sm: int, dtype: str, layout: str, width: int | None) -> list[str]:
        """Why it cannot take a node: every rule that does not hold, or nothing.

        Args:
            sm: compute capability of the target.
            dtype: precision that the target computes in.
            layout: row format of the graph's state.
            width: size of the last axis of the node's first input, if the graph knows it.
        """
        reasons = []
        if sm not in self.sms:
            reasons.append(f"no kernel for sm{sm}; there are sm{', sm'.join(map(str, sorted(self.sms)))}")
        if dtype not in self.dtypes:
            reasons.append(f"no kernel in {dtype}; there are {', '.join(sorted(self.dtypes))}")
        if layout not in self.layouts:
            reasons.append(f"does not read rows in {layout}; it reads {', '.join(sorted(self.layouts))}")
        if self.widths and width not in self.widths:
            reasons.append(f"not compiled for width {width}; there are {', '.join(map(str, sorted(self.widths)))}")
        return reasons


def available_plugins() -> tuple[PluginSpec, ...]:
    """The plugins of this version: none yet, every operator runs as its function body."""
    return ()
