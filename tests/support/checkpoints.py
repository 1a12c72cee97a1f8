"""Checkpoints in the released format: small ones with real values, full-size ones as sparse files.

``python tests/support/checkpoints.py sparse tests/data/deepseek-v4-flash.json OUT`` writes true headers, names, dtypes,
shapes and an index; the files have their full length and take no room. ``... small CHECKPOINT OUT`` quantises a checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from foldkv.export.checkpoint.config_reader import spec_from_config
from foldkv.export.checkpoint.names import scale_name
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.contract.geometry import ModelSpec
from foldkv.export.loading import weight_value
from foldkv.export.model.decoder import parameter_shapes
from foldkv.export.tensor_table import expert_parts

#: Tensors in e4m3; every other matrix is bfloat16 but those of the second pattern, which are float32.
_FP8 = re.compile(r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$|\.shared_experts\.w[123]\.weight$")
_FLOAT32 = re.compile(r"\.ape$|\.attn_sink$|\.gate\.bias$|hc_")
_EXPERT = re.compile(r"\.experts\.\d+\.w[123]\.weight$")
QUANTISATION = {
    "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}  # fmt: skip
_SIZES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F32": 4, "I64": 8}


def e8m0_scale(largest: Tensor, limit: float) -> Tensor:
    """The smallest power of two by which ``largest`` fits below ``limit``, as e8m0; 1 where all is zero."""
    exponent = torch.where(largest > 0, torch.ceil(torch.log2(largest / limit)), 0.0)
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def to_fp8(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """float32 [R, C] -> e4m3 [R, C], e8m0 [ceil(R / block), ceil(C / block)]."""
    rows, columns = weight.shape
    pad = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block))
    tiles = pad.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scale = e8m0_scale(tiles.abs().amax(dim=(1, 3)), 448)
    codes = tiles / scale.to(torch.float32)[:, None, :, None]
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn), scale


def to_fp4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """float32 [R, C] -> two e2m1 per byte, int8 [R, C / 2], e8m0 [R, C / group]."""
    groups = weight.unflatten(1, (-1, group))
    scale = e8m0_scale(groups.abs().amax(dim=2), 6)
    values = (groups / scale.to(torch.float32)[..., None]).flatten(1)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (values.abs()[..., None] - grid).abs().argmin(dim=-1) | (values < 0).long() << 3
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8), scale


def small_checkpoint(source: Path, out: Path, form: str = "instruct", *, shards: int | None = None) -> Path:
    """Write a checkpoint's weights in the released format: "instruct" has e2m1 experts, "base" is e4m3 throughout.

    There is a shard per layer and one for the rest, or as many of about equal length as asked for.
    """
    checkpoint = Checkpoint(source)
    tensors: dict[str, Tensor] = {}
    for name in parameter_shapes(checkpoint.spec):
        parts = expert_parts(name, checkpoint)
        for part in parts or {name: ()}:
            tensors |= _released(part, weight_value(checkpoint, part), form)
        if re.search(r"\.experts\.w(13|2)$", name) and not parts:
            tensors |= _unstacked(name, weight_value(checkpoint, name), form)
    out.mkdir(parents=True)
    names = list(tensors)
    if shards is None:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.split(".")[1] if name.startswith("layers.") else "", []).append(name)
        parts = list(groups.values())
    else:
        parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    table: dict[str, str] = {}
    for number, part_names in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part_names}, out / file)
        table |= dict.fromkeys(part_names, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": QUANTISATION}
    config |= {"expert_dtype": "fp4"} if form == "instruct" else {}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    if (source / "tokenizer.json").is_file():
        (out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return out


def _unstacked(name: str, value: Tensor, form: str) -> dict[str, Tensor]:
    prefix, kind = name.rsplit(".", 1)
    tensors: dict[str, Tensor] = {}
    for expert, weight in enumerate(value):
        rows = dict(zip(("w1", "w3"), weight.chunk(2), strict=True)) if kind == "w13" else {"w2": weight}
        for part, matrix in rows.items():
            tensors |= _released(f"{prefix}.{expert}.{part}.weight", matrix.contiguous(), form)
    return tensors


def _released(name: str, value: Tensor, form: str) -> dict[str, Tensor]:
    dtype = released_dtype(name, form)
    if dtype == "I64":
        return {name: value}
    if dtype in ("F8_E4M3", "I8"):
        weight, scale = (to_fp8 if dtype == "F8_E4M3" else to_fp4)(value.to(torch.float32))
        return {name: weight, scale_name(name): scale}
    return {name: value.to(torch.float32 if dtype == "F32" else torch.bfloat16)}


def released_dtype(name: str, form: str) -> str:
    """The dtype in which the released checkpoints keep a tensor, or that of the form "plain", which quantises none."""
    if name.endswith("tid2eid"):
        return "I64"
    if form == "plain" and (_EXPERT.search(name) or _FP8.search(name)):
        return "BF16"
    if _EXPERT.search(name):
        return "I8" if form == "instruct" else "F8_E4M3"
    if _FP8.search(name):
        return "F8_E4M3"
    return "F32" if _FLOAT32.search(name) else "BF16"


def sparse_checkpoint(config: Path, out: Path, form: str = "instruct") -> Path:
    """A full-size checkpoint without values: one shard per layer and one for the rest, every byte a hole.

    Tensors lie as safetensors writes them: wider dtypes first, then by name.
    """
    text = config.read_text()
    spec = spec_from_config(json.loads(text))
    shards: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, dtype, shape in _table(spec, form):
        layer = re.match(r"layers\.(\d+)\.", name)
        shards.setdefault(layer[1] if layer else "", {})[name] = (dtype, shape)
    out.mkdir(parents=True)
    table: dict[str, str] = {}
    for number, tensors in enumerate(shards.values(), start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_sparse(out / file, tensors)
        table |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (out / "config.json").write_text(text)
    return out


def random_checkpoint(config: dict[str, Any], out: Path, form: str = "instruct", seed: int = 0) -> Path:
    """A checkpoint with random weights of trained size: one shard per layer and one for the rest.

    Forms are those of :func:`small_checkpoint`, and "plain", which is bfloat16 and float32.
    """
    spec = spec_from_config(config)
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, str] = {}
    out.mkdir(parents=True)
    rows = list(_table(spec, form))
    layers = [re.match(r"layers\.(\d+)\.", name) for name, _, _ in rows]
    for number, layer in enumerate(dict.fromkeys(match[1] if match else "" for match in layers), start=1):
        tensors: dict[str, Tensor] = {}
        for (name, dtype, shape), match in zip(rows, layers, strict=True):
            if (match[1] if match else "") == layer:
                tensors[name] = _random(name, dtype, shape, spec, generator)
        file = f"model-{number:05}.safetensors"
        save_file(tensors, out / file)
        table |= dict.fromkeys(tensors, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    quantised = {} if form == "plain" else {"quantization_config": QUANTISATION}
    quantised |= {"expert_dtype": "fp4"} if form == "instruct" else {}
    (out / "config.json").write_text(json.dumps(config | quantised))
    return out


def _random(name: str, dtype: str, shape: tuple[int, ...], spec: ModelSpec, generator: torch.Generator) -> Tensor:
    if dtype == "I64":
        tokens = torch.rand(shape[0], spec.num_experts, generator=generator)
        return tokens.topk(shape[1], dim=1).indices
    if dtype == "I8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    if dtype == "F8_E8M0":  # codes have a spread of about 3 (e2m1) or 1 (e4m3): fan-in of the hidden size for all
        power = -round(math.log2(spec.hidden_size) / 2) - (
            2 if _EXPERT.search(name.replace(".scale", ".weight")) else 0
        )
        return torch.full(shape, 127 + power, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    value = torch.randn(shape, generator=generator)
    if dtype == "F8_E4M3":
        return value.to(torch.float8_e4m3fn)
    value = 1 + 0.1 * value if "norm" in name else value * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
    return value.to(torch.float32 if dtype == "F32" else torch.bfloat16)


def released_tensors(spec: ModelSpec, form: str = "instruct") -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor of a released checkpoint, the draft head left out."""
    for name, dtype, shape in _table(spec, form):
        yield name, prod(shape) * _SIZES[dtype]


def _table(spec: ModelSpec, form: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a released checkpoint, the draft head left out."""
    for name, shape in parameter_shapes(spec).items():
        names = {name: shape}
        if name.endswith((".experts.w13", ".experts.w2")):
            prefix, kind = name.rsplit(".", 1)
            rows = {"w1": shape[1] // 2, "w3": shape[1] // 2} if kind == "w13" else {"w2": shape[1]}
            names = {f"{prefix}.{e}.{p}.weight": (r, shape[2]) for e in range(shape[0]) for p, r in rows.items()}
        for part, size in names.items():
            dtype = released_dtype(part, form)
            yield part, dtype, (size[0], size[1] // 2) if dtype == "I8" else size
            if dtype == "I8":
                yield scale_name(part), "F8_E8M0", (size[0], size[1] // 32)
            elif dtype == "F8_E4M3":
                yield scale_name(part), "F8_E8M0", (-(-size[0] // 128), -(-size[1] // 128))


def _write_sparse(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(tensors, key=lambda name: (-_SIZES[tensors[name][0]], tensors[name][0], name)):
        dtype, shape = tensors[name]
        size = prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        handle.truncate(8 + len(text) + at)


@click.command()
@click.argument("kind", type=click.Choice(["small", "sparse"]))
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--form", type=click.Choice(["instruct", "base"]), default="instruct", show_default=True)
def main(kind: str, source: Path, out: Path, form: str) -> None:
    """Write a checkpoint in the released format."""
    (small_checkpoint if kind == "small" else sparse_checkpoint)(source, out, form)


if __name__ == "__main__":
    main()
