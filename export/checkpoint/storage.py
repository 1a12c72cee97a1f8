"""Formats of stored weights that foldkv does not read, by name: other quantisations, GGUF, pickles. Standard library only.

They are recognised from config.json, from a folder's files or from tensor names, before any check reports missing tensors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from .notices import warn_once

logger = logging.getLogger(__name__)

HF_QUANT_CONFIG = "hf_quant_config.json"
_READ = (
    "foldkv reads safetensors in float32, bfloat16 or float16, in e4m3 blocks of 128 x 128 and in packed e2m1 experts, as "
    "in the released checkpoints."
)
_METHODS = {
    "awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors",
    "modelopt": "a format of NVIDIA ModelOpt", "mxfp4": "MXFP4 as gpt-oss stores it", "mxfp8": "MXFP8", "nvfp4": "NVFP4",
    "fbgemm_fp8": "FBGEMM FP8", "quark": "AMD Quark", "auto-round": "AutoRound", "torchao": "torchao", "quanto": "Quanto",
    "hqq": "HQQ", "aqlm": "AQLM", "eetq": "EETQ", "gguf": "GGUF", "exl2": "EXL2", "exl3": "EXL3", "mlx": "MLX",
}  # fmt: skip
# Weights other than safetensors; the first kind that a folder has is reported.
_FOREIGN_FILES = (
    ("GGUF", ("*.gguf",)),
    ("pickled PyTorch weights", ("*.bin", "*.pt", "*.pth", "*.ckpt")),
    ("TensorFlow or Flax weights", ("*.h5", "*.msgpack")),
    ("NumPy archives", ("*.npz",)),
)
_FOREIGN_TENSORS = (
    ("NVFP4 of NVIDIA ModelOpt", re.compile(r"\.(weight_scale_2|weight_global_scale)$")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("compressed-tensors", re.compile(r"\.(weight_packed|weight_shape|weight_zero_point)$")),
    ("bitsandbytes", re.compile(r"\.weight\.(absmax|quant_map|quant_state\..*)$|\.(SCB|weight_format)$")),
    ("MXFP4 as gpt-oss stores it", re.compile(r"_(blocks|scales)$")),
    ("MLX", re.compile(r"\.(scales|biases)$")),
    ("EXL2 or EXL3", re.compile(r"\.(q_weight|trellis)$")),
)


@dataclass(frozen=True)
class Unread:
    """A format of stored weights that is not read: its name, and the sign that it was recognised by."""

    name: str
    sign: str

    def message(self, place: Path) -> str:
        """What was found where, what is read, and what to do next."""
        return (
            f"{place}: the weights are stored as {self.name}, which foldkv does not read ({self.sign}). {_READ} Use the released "
            "checkpoint, or convert this one to bfloat16 safetensors with the tool that made it."
        )


def unread_in_config(config: Mapping[str, Any]) -> Unread | None:
    """A quantisation in config.json that is not read."""
    for key in ("quantization", "quantization_config", "compression_config"):
        if isinstance(table := config.get(key), dict) and table and (found := _unread_quantisation(key, table)):
            return found
    return None


def _unread_quantisation(key: str, table: Mapping[str, Any]) -> Unread | None:
    for name in ("moe_quant_algo", "quant_algo"):  # ModelOpt, even with a quant_method of fp8
        if table.get(name):
            return Unread(f"{table[name]} of NVIDIA ModelOpt", f"{key}.{name} is {table[name]!r}")
    method = table.get("quant_method", {"compression_config": "compressed-tensors", "quantization": "mlx"}.get(key))
    if method is None:
        bits = [name for name in ("load_in_4bit", "load_in_8bit") if table.get(name)]
        if bits:
            return Unread("bitsandbytes", f"{key}.{bits[0]} is true")
        return (
            Unread(f"weights of {table['bits']} bits", f"{key}.bits is {table['bits']!r}") if "bits" in table else None
        )
    if method != "fp8":
        form = f" ({table['format']})" if isinstance(table.get("format"), str) else ""
        return Unread(f"{_METHODS.get(str(method), repr(method))}{form}", f"{key}.quant_method is {method!r}")
    if table.get("fmt", "e4m3") != "e4m3":
        return Unread(f"fp8 in the format {table['fmt']}", f"{key}.fmt is {table['fmt']!r}")
    if "weight_block_size" in table and table["weight_block_size"] is None:
        return Unread("fp8 with one scale for a whole matrix", f"{key}.weight_block_size is null")
    return None


def unread_in_folder(folder: Path) -> Unread | None:
    """What a folder's files show: a quantisation of ModelOpt, or weights of which none are safetensors."""
    if (file := folder / HF_QUANT_CONFIG).is_file() and (kind := _quantised_by_modelopt(file)):
        return Unread(kind, f"the folder has a {HF_QUANT_CONFIG}")
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if weights == ["adapter_model.safetensors"]:
        return Unread("an adapter (LoRA) without its model", f"the folder has {weights[0]} only")
    if weights:
        return None
    for kind, patterns in _FOREIGN_FILES:
        found = sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return Unread(kind, f"the folder has {found[0]}{more} and no safetensors")
    return None


def _quantised_by_modelopt(file: Path) -> str:
    """The weights' format in ModelOpt's file; empty if it quantised no weights (but, for example, the KV cache)."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))["quantization"]
        kind = table["quant_algo"]
    except (OSError, ValueError, TypeError, KeyError):
        return _METHODS["modelopt"]  # the file is there for a reason
    return f"{kind} of NVIDIA ModelOpt" if kind else ""


def unread_tensors(names: Iterable[str]) -> Unread | None:
    """A quantisation that is not read, from the names of tensors."""
    table = list(names)
    for kind, pattern in _FOREIGN_TENSORS:
        found = next((name for name in table if pattern.search(name)), None)
        if found:
            return Unread(kind, f"there is a tensor {found}")
    return None


def unread_file(path: Path) -> Unread | None:
    """The format of a weight file that was given instead of a checkpoint's folder."""
    for kind, patterns in _FOREIGN_FILES:
        if any(path.match(pattern) for pattern in patterns):
            return Unread(kind, "the path is a file of weights")
    return None


def refuse_unread_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are in a known format that is not read.

    Raises:
        CheckpointError: what was found where, what is read, and what to do next.
    """
    if found := unread_in_config(config) or unread_in_folder(folder):
        raise CheckpointError(found.message(folder))


def warn_of_unread_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Log once that the weights of a folder, or of a single config.json, are not read."""
    found = unread_in_config(config) or (unread_in_folder(path) if path.is_dir() else None)
    if found:
        warn_once(logger, f"{found.message(path)} Everything that needs no weights is still computed.")
