"""Decoding from a bundle: sessions, sampling, text, state. Needs neither torch nor onnx.

Services import what they need from here. Each name loads its module on first use; ONNX Runtime, TensorRT and tokenizers are
loaded when something that needs them is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buffers import plan_bytes as plan_bytes
    from .bundle import Bundle as Bundle
    from .bundle import load_bundle as load_bundle
    from .completion import Completion as Completion
    from .completion import Usage as Usage
    from .detokenizer import TextStream as TextStream
    from .model import Model as Model
    from .sampling import GREEDY as GREEDY
    from .sampling import Sampling as Sampling
    from .sampling import TokenLogprob as TokenLogprob
    from .session import Session as Session
    from .session import TokenStream as TokenStream
    from .snapshots import SlotSnapshot as SlotSnapshot
    from .snapshots import Snapshot as Snapshot
    from .text import generate_text as generate_text
    from .text import stream_text as stream_text
    from .tokenizer import Tokenizer as Tokenizer

#: From a public name to its module.
_HOMES = {
    "Bundle": "bundle", "Completion": "completion", "GREEDY": "sampling", "Model": "model", "Sampling": "sampling", "Session": "session",
    "SlotSnapshot": "snapshots", "Snapshot": "snapshots", "TextStream": "detokenizer", "TokenStream": "session", "Tokenizer": "tokenizer",
    "TokenLogprob": "sampling", "Usage": "completion", "generate_text": "text", "load_bundle": "bundle", "plan_bytes": "buffers", "stream_text": "text",
}  # fmt: skip
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the names of the table


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
