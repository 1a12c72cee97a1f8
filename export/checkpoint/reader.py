"""Checkpoint: the tensors of a folder of safetensors by their released names (names.py), from the headers of its files.

The draft head is not part of the decoder: its tensors can be absent, and so can files with nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...artifact import confined, sha256_file, sha256_json
from ...errors import ArtifactError, CheckpointError, listing
from ...inputs import file_identity, refuse_unreadable_name
from ...manifests import ModelFacts
from .config_reader import read_config, read_model, read_object, refuse_artifact
from .formats import FP8_BLOCK, Format, format_of
from .names import released_name
from .shards import Shard, Stored, read_shard
from .storage import refuse_unread_weights
from .texts import TEXT_FILES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_IGNORED = re.compile(r"^mtp\.")  # the draft head is not part of the decoder
# Tensors that can be quantised: matrices of linear layers, and experts, single or stacked.
_MATRIX = re.compile(r"\.weight$|\.experts\.(w13|w2)$")


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
        names: path of each weight file -> its name within the folder.
        headers: released name -> where the tensor is stored; only tensors of the decoder.

    Raises:
        CheckpointError: config.json, the index or a safetensors file is missing or damaged.
    """

    def __init__(self, folder: Path, *, allow_unknown_keys: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        refuse_unreadable_name(self.folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder} is not a folder; expected a checkpoint with config.json and *.safetensors. Give its path on this "
                "machine: foldkv downloads nothing."
            )
        config = read_config(self.folder)
        refuse_unread_weights(self.folder, config)
        reading = read_model(config, source=str(self.folder / "config.json"), allow_unknown_keys=allow_unknown_keys)
        self.config, self.spec, self.allowed_keys = reading.config, reading.spec, reading.allowed
        self.block = _block(self.config)
        self._index: dict[str, str] | None = None
        self.shards: list[Shard] = []
        self.files = self._weight_files()
        self.names = {path: path.relative_to(self.folder).as_posix() for path in self.files}
        self.headers = self._read_headers()

    def _weight_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.exists():
            single = self.folder / SINGLE
            if not single.is_file():
                refuse_artifact(self.folder)
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
        held = {name: self.names[shard.file] for shard in self.shards for name in shard.tensors if not _ignored(name)}
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
        """sha256 over the files that define how texts begin, end and are read: tokenizer, chat, generation_config.json."""
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
            self.names[shard.file]: shard.identity.facts(links_change=links_change)
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

    def format(self, name: str) -> Format | None:
        """The format of a weight matrix; None for tensors that are not weight matrices, and for unknown dtypes."""
        return format_of(self.headers[name].dtype, self.block) if _MATRIX.search(name) else None


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
