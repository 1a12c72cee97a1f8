"""The tokenizer of a package against ``AutoTokenizer`` on the checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from foldkv.config import PipelineConfig
from foldkv.export.checkpoint.reader import Checkpoint
from foldkv.export.checkpoint.texts import ENCODING, tokenizer_json
from foldkv.export.checkpoint.texts import TEMPLATE as TEMPLATE_FILE
from foldkv.manifests import GraphManifest, read
from foldkv.pipeline import export_changes
from foldkv.runtime.tokenizer import Tokenizer as Ours

TEXTS = ["", "a", "Once upon a time", "  two  spaces ", "é 中文 😀", "a<eos>b<bos>", "<pad> <new>x"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 256)])
BOTH = processors.TemplateProcessing(
    single="<bos> $A <eos>", pair="<bos> $A $B <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
)
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}


def byte_level(change: Callable[[Any], object] = lambda _: None) -> Any:
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    change(tokenizer)
    return tokenizer


def with_(processor: Any) -> Any:
    return byte_level(lambda tokenizer: setattr(tokenizer, "post_processor", processor))


def cut_and_filled(tokenizer: Any) -> None:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12, pad_id=256, pad_token="<bos>")


def metaspace() -> Any:
    words = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeOnucpontim"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(dict.fromkeys(words))}, merges=[], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


CASES: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "no other file": (byte_level(), None),
    "begins with a token": (with_(TEMPLATE), SPECIAL),
    "begins and ends with one, no other file": (with_(BOTH), None),
    "the config asks for one, the file has no rule": (byte_level(), SPECIAL | {"add_bos_token": True}),
    "the config asks for none, the file has a rule": (with_(BOTH), SPECIAL | {"add_bos_token": False}),
    "both in the config": (with_(processors.ByteLevel(trim_offsets=False)), SPECIAL | {"add_eos_token": True}),
    "a token that the file lacks": (with_(TEMPLATE), SPECIAL | {"pad_token": "<pad>", "extra_special_tokens": ["<new>"]}),
    "cut and filled up in the file": (byte_level(cut_and_filled), SPECIAL),
    "as Llama's": (metaspace(), SPECIAL | {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "as Llama's, of no class": (metaspace(), None),
}  # fmt: skip


def checkpoint(folder: Path, tokenizer: Any, config: dict[str, Any] | None, source: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(source / "config.json", folder)
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_auto_tokenizer(
    case: str, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(tmp_path, *CASES[case], tiny_checkpoint)
    theirs = AutoTokenizer.from_pretrained(folder)
    content = tokenizer_json(folder)
    assert content is not None and not [r for r in caplog.records if r.name.startswith("foldkv")]
    (tmp_path / "made.json").write_text(content, encoding="utf-8")
    ours = Ours(tmp_path / "made.json")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("processor", "prefix"), [(None, ()), (TEMPLATE, (256,)), (BOTH, (256,)), (processors.ByteLevel(), ())]
)
def test_the_prefix_is_what_stands_before_every_text(processor: Any, prefix: tuple[int, ...], tmp_path: Path) -> None:
    (with_(processor) if processor else byte_level()).save(str(tmp_path / "tokenizer.json"))
    assert Ours(tmp_path / "tokenizer.json").prefix == prefix


def test_what_transformers_does_beside_the_file_is_warned_of(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint(tmp_path, byte_level(), SPECIAL | {"split_special_tokens": True}, tiny_checkpoint)
    assert tokenizer_json(folder) is not None
    assert "encodes '<bos><eos>' differently from AutoTokenizer" in caplog.text


def test_a_tokenizer_with_code_of_its_own_is_copied_with_a_warning(
    tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No code of a checkpoint runs."""
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    folder = checkpoint(tmp_path, with_(TEMPLATE), config, tiny_checkpoint)
    caplog.set_level(logging.WARNING)
    assert tokenizer_json(folder) == (folder / "tokenizer.json").read_text()
    assert "transformers cannot load the tokenizer of" in caplog.text


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert tokenizer_json(tmp_path) is None


def test_a_pipeline_exports_again_when_the_tokenizer_or_what_ends_a_text_has_changed(
    tiny_graph: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny_checkpoint / name, tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tiny_checkpoint / "model.safetensors")  # a copy is another file
    config = PipelineConfig.model_validate({"version": 1, "checkpoint": str(tmp_path), "output": "out"})
    manifest = read(GraphManifest, tiny_graph)
    assert not export_changes(config, Checkpoint(tmp_path), tiny_graph, manifest)
    (tmp_path / "encoding").mkdir()
    for name in ("tokenizer_config.json", "generation_config.json", TEMPLATE_FILE, ENCODING):
        (tmp_path / name).write_text("{}")
        assert "the tokenizer, the chat encoding or the generation_config.json" in export_changes(
            config, Checkpoint(tmp_path), tiny_graph, manifest
        )
        (tmp_path / name).unlink()
    assert not export_changes(config, Checkpoint(tmp_path), tiny_graph, manifest)
