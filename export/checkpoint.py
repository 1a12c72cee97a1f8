"""Checkpoint: the tensors of a folder of safetensors, under the released checkpoints' names.

Three spellings of one checkpoint are read: the released names (``layers.0.attn.wq_a.weight``), the same
as saved by transformers (``model.layers.0.attn.wq_a.weight``) and transformers' module names
(``model.layers.0.self_attn.q_a_proj.weight``, experts stacked). Everything that is missing, unexpected or
of a wrong shape is listed in one error, from the headers alone, before any weight is read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foldkv.artifact import confined, sha256_file
from foldkv.errors import ArtifactError, CheckpointError, listing
from foldkv.export.model.decoder import Decoder, Layer
from foldkv.export.model.hadamard import hadamard_matrix
from foldkv.export.model.rope import inverse_frequencies
from foldkv.export.profiles import HF, SERVED
from foldkv.export.spec import CSA, ModelSpec, read_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_READABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}

# transformers' module names to released names; applied in order to names that use them.
_RENAMES = [
    (re.compile(pattern), target)
    for pattern, target in (
        (r"^lm_head\.", "head."),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.compressor\.indexer\.scorer\.weights_proj\.", ".attn.indexer.weights_proj."),
        (r"\.self_attn\.compressor\.indexer\.q_b_proj\.", ".attn.indexer.wq_b."),
        (r"\.self_attn\.compressor\.indexer\.", ".attn.indexer.compressor."),
        (r"(compressor)\.kv_norm\.", r"\1.norm."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),  # how transformers 5 writes the released name back
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.position_bias$", ".ape"),
        (r"\.q_a_proj\.", ".wq_a."),
        (r"\.q_b_proj\.", ".wq_b."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.gate_proj\.", ".wgate."),
        (r"\.o_a_proj\.", ".wo_a."),
        (r"\.o_b_proj\.", ".wo_b."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.experts\.gate_up_proj$", ".experts.w13"),
        (r"\.experts\.down_proj$", ".experts.w2"),
    )
]
_IGNORED = re.compile(r"^mtp\.")  # the draft head is no part of the decoder
_EXPERT = re.compile(r"^(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.weight$")


def released_name(name: str) -> str:
    """A tensor's name in the released spelling; released names are returned unchanged."""
    name = name.removeprefix("model.")
    for pattern, target in _RENAMES:
        name = pattern.sub(target, name)
    return name


class Checkpoint:
    """A checkpoint folder: config, tensor table from the headers, weights on demand.

    Raises:
        CheckpointError: config.json, the index or a safetensors file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; expected a checkpoint with config.json and *.safetensors."
            )
        self.config = read_config(self.folder / "config.json")
        self.spec = ModelSpec.from_config(self.config, source=str(self.folder / "config.json"))
        self.files = self._weight_files()
        self.headers = self._read_headers()

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.exists():
            single = self.folder / SINGLE
            if not single.is_file():
                raise CheckpointError(
                    f"{self.folder} has neither {SINGLE} nor {INDEX}. Only safetensors checkpoints are read: convert pickled weights first."
                )
            return [single]
        table = read_config(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{index} has no 'weight_map' from tensor to file. Download the index again.")
        files, problems = [], []
        for name in sorted(set(table.values())):
            try:
                path = confined(self.folder, name)
            except ArtifactError as error:
                problems.append(str(error))
                continue
            files.append(path)
            if not path.is_file():
                problems.append(f"shard {name} is missing")
        if problems:
            raise CheckpointError(
                listing(f"{index} names files that cannot be used", problems, "Download these files again.")
            )
        return files

    def _read_headers(self) -> dict[str, tuple[str, Path, tuple[int, ...], str]]:
        """Released name -> (name in the file, file, shape, safetensors dtype)."""
        headers: dict[str, tuple[str, Path, tuple[int, ...], str]] = {}
        problems: list[str] = []
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        part = file.get_slice(name)
                        released = released_name(name)
                        if released in headers:
                            problems.append(
                                f"tensor {released} is in {headers[released][1].name} and again in {path.name}"
                            )
                        headers[released] = (name, path, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                problems.append(f"{path.name} cannot be read: {error}")
        if problems:
            raise CheckpointError(
                listing(f"{self.folder} has damaged weights", problems, "Download these files again.")
            )
        return headers

    def digest(self) -> str:
        """sha256 over config.json and every weight file, by name."""
        total = hashlib.sha256()
        for path in [self.folder / "config.json", *self.files]:
            total.update(f"{path.name}:{sha256_file(path)}\n".encode())
        return total.hexdigest()

    def check(self) -> None:
        """Compare the tensor table with what the model needs.

        Raises:
            CheckpointError: missing, unexpected, wrongly shaped or unreadable tensors, all listed.
        """
        expected = self._expected()
        problems = [
            f"missing tensor {name} {list(shape)}" for name, shape in expected.items() if name not in self.headers
        ]
        for name, (_, path, shape, dtype) in self.headers.items():
            if _IGNORED.match(name):
                continue
            if name not in expected:
                problems.append(f"unexpected tensor {name} {list(shape)} in {path.name}")
            elif shape != expected[name]:
                problems.append(f"tensor {name} has shape {list(shape)}; expected {list(expected[name])}")
            elif dtype not in _READABLE:
                problems.append(f"tensor {name} has dtype {dtype}; expected one of {', '.join(_READABLE)}")
        if problems:
            raise CheckpointError(
                listing(
                    f"{self.folder} does not fit its config.json",
                    problems,
                    "Check that config.json belongs to these weights and that the download is complete.",
                )
            )

    def _expected(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            needed = {name: tuple(value.shape) for name, value in Decoder(self.spec).state_dict().items()}
        stacked = {name for name in needed if name.endswith((".experts.w13", ".experts.w2"))}
        if stacked & self.headers.keys():
            return needed
        inner, hidden = self.spec.moe_intermediate_size, self.spec.hidden_size
        for name in stacked:
            del needed[name]
            if name.endswith(".w2"):
                continue
            for expert in range(self.spec.num_experts):
                prefix = f"{name.removesuffix('.w13')}.{expert}"
                needed |= {
                    f"{prefix}.w1.weight": (inner, hidden),
                    f"{prefix}.w3.weight": (inner, hidden),
                    f"{prefix}.w2.weight": (hidden, inner),
                }
        return needed

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Released name and value of every tensor of the decoder, file by file."""
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    released = released_name(name)
                    if not _IGNORED.match(released):
                        yield released, file.get_tensor(name)


def decoder_from_checkpoint(checkpoint: Checkpoint, profile: str = HF) -> Decoder:
    """The model with its weights in float32, ready to run or to trace.

    Raises:
        CheckpointError: the tensors do not fit the config (see :meth:`Checkpoint.check`), or a value is NaN
            or infinite.
    """
    checkpoint.check()
    with torch.device("meta"):
        model = Decoder(checkpoint.spec, profile)
    values = _stacked(checkpoint)
    problems = [f"tensor {name} holds NaN or infinite values" for name, value in values.items() if not _finite(value)]
    table = [f"tensor {name} names experts outside 0..{checkpoint.spec.num_experts - 1}"
             for name, value in values.items() if name.endswith("tid2eid") and _outside(value, checkpoint.spec.num_experts)]  # fmt: skip
    if problems or table:
        raise CheckpointError(
            listing(f"{checkpoint.folder} has unusable weights", problems + table, "Download the weights again.")
        )
    model.load_state_dict(values, assign=True)
    # Frequencies and rotations are no part of a checkpoint, and the model was made without storage.
    for kind, block in zip(checkpoint.spec.layer_types, model.layers, strict=True):
        assert isinstance(block, Layer)
        block.attn.inv_freq = inverse_frequencies(checkpoint.spec, kind)
        if kind == CSA and profile == SERVED:
            block.attn.indexer.hadamard = hadamard_matrix(checkpoint.spec.index_head_dim)
    return model.eval().requires_grad_(False)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _outside(value: Tensor, count: int) -> bool:
    return bool((value < 0).any() or (value >= count).any())


def _stacked(checkpoint: Checkpoint) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, value in checkpoint.tensors():
        value = value.to(torch.int64) if not value.is_floating_point() else value.to(torch.float32)
        match = _EXPERT.match(name)
        if match:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = value
        else:
            values[name] = value
    for prefix, parts in experts.items():
        count = checkpoint.spec.num_experts
        values[f"{prefix}.w13"] = torch.stack([torch.cat((parts[e, "w1"], parts[e, "w3"])) for e in range(count)])
        values[f"{prefix}.w2"] = torch.stack([parts[e, "w2"] for e in range(count)])
    return values


def model_facts(spec: ModelSpec) -> dict[str, Any]:
    """What a service needs to know of the model, as manifest values."""
    return {
        "architecture": "deepseek_v4",
        "vocab_size": spec.vocab_size,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "layer_types": list(spec.layer_types),
        "sliding_window": spec.sliding_window,
        "index_topk": spec.index_topk,
        "max_position_embeddings": spec.max_position_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_ids": list(spec.eos_token_ids),
    }
