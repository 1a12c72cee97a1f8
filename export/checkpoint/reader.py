"""Checkpoint: the tensors of a folder of safetensors, under the released checkpoints' names.

A checkpoint can use three spellings: the released names (``layers.0.attn.wq_a.weight``), the same names as saved by
transformers (``model.layers.0.attn.wq_a.weight``), and transformers' module names
(``model.layers.0.self_attn.q_a_proj.weight``). With module names, experts are stacked, or single as in other models of
Hugging Face (``model.layers.0.mlp.experts.3.gate_proj.weight``). A quantised weight (export/checkpoint/formats.py) has its scale
beside it: ``layers.0.attn.wq_a.scale``, or ``…weight_scale_inv`` as saved by transformers.

One error lists everything that is missing, unexpected or of a wrong shape. It comes from the headers, before any weight is
read. The draft head is not part of the decoder: its tensors can be absent, and so can files with nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...artifact import confined, sha256_file, sha256_json
from ...errors import ArtifactError, CheckpointError, listing
from ...inputs import file_identity, refuse_unreadable_name
from ...manifests import ModelFacts
from ..contract.geometry import CSA, ModelSpec
from ..contract.profiles import HF, SERVED
from ..model.decoder import Decoder, Layer
from ..model.hadamard import hadamard_matrix
from ..model.rope import inverse_frequencies
from .config_reader import read_config, read_model, read_object
from .formats import FP8_BLOCK, PLAIN, SCALE_DTYPES, Format, dequantised, format_of, scale_values
from .shards import Shard, Stored, read_shard
from .storage import refuse_unread_weights, unread_tensors
from .texts import TEXT_FILES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_READABLE = ("F32", "BF16", "F16", "I64", "I32")

# transformers' module names to released names, applied in order.
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
        (r"\.attn\.norm\.", ".attn.kv_norm."),  # transformers 5 writes the released name like this
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
        (r"\.experts\.gate_up_proj", ".experts.w13"),
        (r"\.experts\.down_proj", ".experts.w2"),
        (r"\.weight_scale(_inv)?$", ".scale"),  # of single weights, and of stacked experts, as transformers writes them
        (r"\.experts\.(w13|w2)_scale_inv$", r".experts.\1.scale"),
    )
]
_RELEASED_EXPERT = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.(weight|scale)$")
# Single experts, with the names that other models of Hugging Face and their tools use.
_NAMED_EXPERT = re.compile(
    r"(layers\.\d+)\.(?:mlp|ffn)\.(experts\.\d+)\.(gate|down|up)_proj\.(weight|scale|weight_scale(?:_inv)?)$"
)
_PARTS = {"gate": "w1", "down": "w2", "up": "w3"}
_IGNORED = re.compile(r"^mtp\.")  # the draft head is not part of the decoder
# Tensors that can be quantised: matrices of linear layers, and experts, single or stacked.
_MATRIX = re.compile(r"\.weight$|\.experts\.(w13|w2)$")


def released_name(name: str) -> str:
    """A tensor's name in the released spelling; released names are returned unchanged."""
    name = name.removeprefix("model.")
    if _RELEASED_EXPERT.match(name):  # nearly all names of a large checkpoint
        return name
    if expert := _NAMED_EXPERT.match(name):
        layer, which, part, kind = expert.groups()
        return f"{layer}.ffn.{which}.{_PARTS[part]}.{'weight' if kind == 'weight' else 'scale'}"
    for pattern, target in _RENAMES:
        name = pattern.sub(target, name)
    return name


def _ignored(name: str) -> bool:
    """Whether a tensor, by its name in a file, does not belong to the decoder."""
    return bool(_IGNORED.match(name.removeprefix("model.")))


def _block(config: dict[str, Any]) -> tuple[int, int]:
    """The block of e4m3 weights that config.json names, or the usual one."""
    quantisation = config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if block is None:
        return FP8_BLOCK
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(
            f"quantization_config.weight_block_size is {block!r}; expected two sizes, like [128, 128]."
        )
    return block[0], block[1]


class Checkpoint:
    """A checkpoint folder: config, tensor table from the headers, weights on demand.

    Links are followed, because the cache of Hugging Face uses them. If there is an index, only files that it names and that
    have a tensor of the decoder are opened.

    Args:
        folder: with config.json and safetensors.
        allow_unknown_keys: unknown keys of config.json to ignore instead of refusing them.

    Attributes:
        config: config.json without the ignored keys.
        allowed_keys: the keys of ``allow_unknown_keys`` that the file has.
        headers: released name -> where the tensor is stored; only tensors of the decoder.

    Raises:
        CheckpointError: config.json, the index or a safetensors file is missing or damaged.
    """

    def __init__(self, folder: Path, *, allow_unknown_keys: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        refuse_unreadable_name(self.folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; expected a checkpoint with config.json and *.safetensors."
            )
        config = read_config(self.folder)
        refuse_unread_weights(self.folder, config)
        reading = read_model(config, source=str(self.folder / "config.json"), allow_unknown_keys=allow_unknown_keys)
        self.config, self.spec, self.allowed_keys = reading.config, reading.spec, reading.allowed
        self.block = _block(self.config)
        self._index: dict[str, str] | None = None
        self.shards: list[Shard] = []
        self.files = self._weight_files()
        self.headers = self._read_headers()

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.exists():
            single = self.folder / SINGLE
            if not single.is_file():
                raise CheckpointError(
                    f"{self.folder} has neither {SINGLE} nor {INDEX}. Download the checkpoint again, or convert its weights "
                    "to safetensors."
                )
            return [single]
        table = read_object(index).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{index} has no 'weight_map' from tensor to file. Download the index again.")
        self._index = {name: file for name, file in table.items() if not _ignored(name)}
        files, problems = [], []
        for name in sorted(set(self._index.values())):
            try:
                path = confined(self.folder, name)
            except ArtifactError as error:
                problems.append(str(error))
                continue
            files.append(path)
            if path.is_symlink() and not path.exists():
                problems.append(f"shard {name} is a link to {path.readlink()}, which is missing")
            elif not path.is_file():
                problems.append(f"shard {name} is missing")
        if problems:
            raise CheckpointError(
                listing(f"{index} names files that cannot be used", problems, "Download these files again.")
            )
        return files

    def _read_headers(self) -> dict[str, Stored]:
        """Released name -> where it is stored."""
        headers: dict[str, Stored] = {}
        problems: list[str] = []
        for path in self.files:
            shard, findings = read_shard(path)
            self.shards.append(shard)
            problems += findings
            for name, stored in shard.tensors.items():
                if _ignored(name):
                    continue
                released = released_name(name)
                if released in headers:
                    problems.append(f"tensor {released} is in {headers[released].file.name} and again in {path.name}")
                headers[released] = stored
        if problems:
            raise CheckpointError(
                listing(f"{self.folder} has damaged weights", problems, "Download these files again.")
            )
        self._compare_index()
        return headers

    def _compare_index(self) -> None:
        if self._index is None:
            return
        held = {
            name: shard.file.relative_to(self.folder).as_posix()
            for shard in self.shards
            for name in shard.tensors
            if not _ignored(name)
        }
        problems = [
            f"tensor {name} should be in {file}; it is in {held[name]}"
            if name in held
            else f"tensor {name} is not in {file}"
            for name, file in self._index.items()
            if held.get(name) != file
        ]
        problems += [
            f"tensor {name} in {file} is not in the index" for name, file in held.items() if name not in self._index
        ]
        if problems:
            raise CheckpointError(
                listing(
                    f"{self.folder / INDEX} and the shards disagree",
                    problems,
                    "Download the index and these files again.",
                )
            )

    def digest(self) -> str:
        """sha256 over config.json and every weight file, by name."""
        total = hashlib.sha256()
        for path in [self.folder / "config.json", *self.files]:
            total.update(f"{path.name}:{sha256_file(path)}\n".encode())
        return total.hexdigest()

    def texts_digest(self) -> str:
        """sha256 over the files that define how texts begin, end and are read: tokenizer and generation_config.json."""
        paths = [self.folder / name for name in TEXT_FILES]
        return sha256_json({path.name: sha256_file(path) for path in paths if path.is_file()})

    def identity(self) -> str:
        """sha256 over config.json and the name, size and header of every weight file, so without reading weights.

        A copy has the same one, and so have other weights of the same names, shapes and sizes.
        """
        rows = [[shard.file.name, shard.bytes, shard.header_sha256] for shard in self.shards]
        return sha256_json([sha256_file(self.folder / "config.json"), rows])

    def files_identity(self, *, links_change: bool = False) -> str:
        """sha256 over who the weight files were when their headers were read (inputs.py), without reading weights.

        Unlike :meth:`identity` it changes when weights are saved again under the same names, shapes and sizes, and it is
        another one for a copy. Files of the Hugging Face cache count by their names there, which stand for their content.

        Args:
            links_change: hard links to the files are made (``--weights reference``).
        """
        return sha256_json(self._files(links_change))

    def _files(self, links_change: bool) -> dict[str, dict[str, Any]]:
        return {
            shard.file.relative_to(self.folder).as_posix(): shard.identity.facts(links_change=links_change)
            for shard in self.shards
            if shard.identity is not None
        }

    def check_unchanged(self) -> None:
        """Check that no weight file was written or replaced since its header was read; call it after the weights were.

        Links that others make meanwhile do not count.

        Raises:
            CheckpointError: some were; all are named.
        """
        changed = []
        for name, facts in self._files(links_change=True).items():
            try:
                if file_identity(self.folder / name).facts(links_change=True) != facts:
                    changed.append(name)
            except OSError as error:
                changed.append(f"{name}: {error.strerror}")
        if changed:
            raise CheckpointError(
                listing(
                    f"{self.folder} was written while it was read",
                    changed,
                    "Wait until the checkpoint is complete, and export it again.",
                )
            )

    def check(self) -> None:
        """Compare the tensor table with what the model needs.

        Raises:
            CheckpointError: missing, unexpected, wrongly shaped or unreadable tensors, all listed.
        """
        expected = self._expected()
        scales = {scale_name(name) for name in expected if self._quantised(name)}
        problems = []
        for name, shape in expected.items():
            if name not in self.headers:
                problems.append(f"missing tensor {name} {list(shape)}")
            else:
                problems += self._misfits(name, shape)
        problems += [
            f"unexpected tensor {name} {list(stored.shape)} in {stored.file.name}"
            for name, stored in self.headers.items()
            if name not in expected and name not in scales
        ]
        if problems and (found := unread_tensors(self.headers)):
            raise CheckpointError(found.message(self.folder))
        if problems:
            raise CheckpointError(
                listing(
                    f"{self.folder} does not fit its config.json",
                    problems,
                    "Check that config.json belongs to these weights and that the download is complete.",
                )
            )

    def format(self, name: str) -> Format | None:
        """The format of a weight matrix; None for tensors that are not weight matrices, and for unknown dtypes."""
        return format_of(self.headers[name].dtype, self.block) if _MATRIX.search(name) else None

    def _quantised(self, name: str) -> bool:
        return name in self.headers and (found := self.format(name)) is not None and found.name != PLAIN

    def _misfits(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Why a tensor, with its scale, is not a value of that shape."""
        stored = self.headers[name]
        found = self.format(name)
        if found is None or found.name == PLAIN:
            problems = (
                []
                if stored.shape == shape
                else [f"tensor {name} has shape {list(stored.shape)}; expected {list(shape)}"]
            )
            if stored.dtype not in _READABLE:
                problems.append(f"tensor {name} has dtype {stored.dtype}; expected one of {', '.join(_READABLE)}")
            return problems
        problems = []
        wanted = found.stored_shape(shape)
        if stored.shape != wanted:
            problems.append(
                f"tensor {name} has shape {list(stored.shape)}; expected {list(wanted)} for {found.name} ({stored.dtype})"
            )
        scale = self.headers.get(scale_name(name))
        if scale is None:
            return [
                *problems,
                f"tensor {name} has dtype {stored.dtype} but no scale; missing tensor {scale_name(name)} {list(found.scale_shape(shape))}",
            ]
        if scale.shape != found.scale_shape(shape):
            problems.append(
                f"scale {scale_name(name)} has shape {list(scale.shape)}; expected {list(found.scale_shape(shape))}: "
                f"one per {found.block[0]} x {found.block[1]} of {list(shape)}"
            )
        if scale.dtype not in SCALE_DTYPES:
            problems.append(
                f"scale {scale_name(name)} has dtype {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}"
            )
        return problems

    def _expected(self) -> dict[str, tuple[int, ...]]:
        needed = parameter_shapes(self.spec)
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

    def value(self, name: str) -> Tensor:
        """A tensor of the decoder by its released name: dequantised to float32 if it is quantised, otherwise as stored.

        Raises:
            CheckpointError: it cannot be read, or its scale is NaN, infinite or not above zero.
        """
        stored = self.headers[name].read()
        found = self.format(name)
        if found is None or found.name == PLAIN:
            return stored
        scale = self.headers[scale_name(name)].read()
        values = scale_values(scale)
        if not bool((values.isfinite() & (values > 0)).all()):
            raise CheckpointError(f"scale {scale_name(name)} contains NaN, infinite or non-positive values")
        return dequantised(stored, scale, found)


def scale_name(name: str) -> str:
    """The released name of the scale of a weight."""
    return f"{name.removesuffix('.weight')}.scale"


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the decoder by its released name, experts stacked per layer."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Decoder(spec).state_dict().items()}


def decoder_from_checkpoint(checkpoint: Checkpoint, profile: str = HF) -> Decoder:
    """The model with its weights in float32, ready to run or to trace.

    Quantised weights are dequantised one tensor at a time, experts directly into their stack. So memory never has more than
    the model and one tensor.

    Raises:
        CheckpointError: the tensors do not fit the config (see :meth:`Checkpoint.check`), or a value or a scale is NaN
            or infinite.
    """
    checkpoint.check()
    with torch.device("meta"):
        model = Decoder(checkpoint.spec, profile)
    problems: list[str] = []
    values: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(checkpoint.spec).items():
        parts = expert_parts(name, checkpoint)
        target = torch.empty(shape) if parts else None
        for part, place in (parts or {name: ()}).items():
            try:
                value = checkpoint.value(part)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            value = value.to(torch.float32 if value.is_floating_point() else torch.int64)
            problems += _unusable(part, value, checkpoint.spec.num_experts)
            if target is None:
                values[name] = value
            else:
                target[place] = value
                values[name] = target
    if problems:
        raise CheckpointError(
            listing(f"{checkpoint.folder} has unusable weights", problems, "Download the weights again.")
        )
    model.load_state_dict(values, assign=True)
    # Frequencies and rotations are not in a checkpoint, and the model was made without storage.
    for kind, block in zip(checkpoint.spec.layer_types, model.layers, strict=True):
        assert isinstance(block, Layer)
        block.attn.inv_freq = inverse_frequencies(checkpoint.spec, kind)
        if kind == CSA and profile == SERVED:
            block.attn.indexer.hadamard = hadamard_matrix(checkpoint.spec.index_head_dim)
    return model.eval().requires_grad_(False)


def expert_parts(name: str, checkpoint: Checkpoint) -> dict[str, tuple[int | slice, ...]]:
    """The single experts' tensors in a stacked one, with their places; none if the file has the stacked tensor itself."""
    prefix, _, kind = name.rpartition(".")
    if not prefix.endswith(".experts") or name in checkpoint.headers:
        return {}
    inner = checkpoint.spec.moe_intermediate_size
    rows = {"w1": slice(0, inner), "w3": slice(inner, 2 * inner)} if kind == "w13" else {"w2": slice(None)}
    return {
        f"{prefix}.{expert}.{part}.weight": (expert, place)
        for expert in range(checkpoint.spec.num_experts)
        for part, place in rows.items()
    }


def _unusable(name: str, value: Tensor, experts: int) -> list[str]:
    if value.is_floating_point():
        return [] if bool(value.isfinite().all()) else [f"tensor {name} contains NaN or infinite values"]
    if name.endswith("tid2eid") and bool((value < 0).any() or (value >= experts).any()):
        return [f"tensor {name} names experts outside 0..{experts - 1}"]
    return []


def end_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The ids that end a text, from config.json and, if it exists, generation_config.json.

    Raises:
        CheckpointError: generation_config.json is damaged, or one of its ids is not a token of the model.
    """
    spec, path = checkpoint.spec, checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return spec.eos_token_ids
    value = read_object(path).get("eos_token_id")
    added = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and 0 <= token < spec.vocab_size for token in added):
        raise CheckpointError(
            f"{path}: eos_token_id is {value!r}; expected a token id below {spec.vocab_size}, a list of them or null. "
            "Correct it, or remove the key, which leaves config.json's ids."
        )
    return tuple(dict.fromkeys((*spec.eos_token_ids, *added)))


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """What a service needs to know about the model."""
    spec = checkpoint.spec
    return ModelFacts(
        architecture="deepseek_v4",
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        layer_types=tuple(spec.layer_types),
        sliding_window=spec.sliding_window,
        index_topk=spec.index_topk,
        max_position_embeddings=spec.max_position_embeddings,
        bos_token_id=spec.bos_token_id,
        eos_token_ids=end_tokens(checkpoint),
    )
