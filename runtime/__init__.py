"""Decoding from a bundle: sessions, sampling, text, state. Needs neither torch nor onnx.

Services import what they need from here. Each name loads its module on first use; ONNX Runtime, TensorRT and tokenizers are
loaded when something that needs them is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foldkv.runtime.bundle import Bundle as Bundle
    from foldkv.runtime.bundle import load_bundle as load_bundle
    from foldkv.runtime.detokenizer import TextStream as TextStream
    from foldkv.runtime.sampling import GREEDY as GREEDY
    from foldkv.runtime.sampling import Sampling as Sampling
    from foldkv.runtime.session import Session as Session
    from foldkv.runtime.session import Snapshot as Snapshot
    from foldkv.runtime.session import TokenStream as TokenStream
    from foldkv.runtime.state import plan_bytes as plan_bytes
    from foldkv.runtime.text import Completion as Completion
    from foldkv.runtime.text import generate_text as generate_text
    from foldkv.runtime.text import stream_text as stream_text
    from foldkv.runtime.tokenizer import Tokenizer as Tokenizer

#: From a public name to its module.
_HOMES = {
    "Bundle": "bundle", "Completion": "text", "GREEDY": "sampling", "Sampling": "sampling", "Session": "session",
    "Snapshot": "session", "TextStream": "detokenizer", "TokenStream": "session", "Tokenizer": "tokenizer",
    "generate_text": "text", "load_bundle": "bundle", "plan_bytes": "state", "stream_text": "text",
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
