"""The chat encoding of a checkpoint, from its files."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from foldkv.errors import CheckpointError
from foldkv.export.checkpoint.chat import chat_file
from foldkv.export.checkpoint.texts import ENCODING
from foldkv.export.contract.chat import CHAT, DEEPSEEK, JINJA, V4, V4_0731, ChatFile
from foldkv.export.package import export_checkpoint
from foldkv.optimize.build import build_bundles
from foldkv.runtime.bundle import load_bundle
from foldkv.runtime.chat import chat_format

OWN = {
    "added_tokens": [
        {"id": i, "content": text} for i, text in enumerate(["｜DSML｜", "<｜latest_reminder｜>", "<think>"])
    ]
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], ChatFile | None]] = {
    "nothing": ({}, {}, None),
    "another tokenizer": ({"tokenizer.json": {"added_tokens": OWN["added_tokens"][:1]}, "tokenizer_config.json": {}}, {}, None),
    "the first revision, by its encoding": ({ENCODING: "'Absolute maximum'"}, {"dspark_block_size": 5}, ChatFile(DEEPSEEK, V4)),
    "a later one, by its encoding": ({ENCODING: '"Reasoning Effort: Beyond maximum — x"'}, {}, ChatFile(DEEPSEEK, V4_0731)),
    "the first, by its tokens": ({"tokenizer.json": OWN}, {"vocab_size": 1}, ChatFile(DEEPSEEK, V4)),
    "a later one, by its tokens": ({"tokenizer.json": OWN}, {"dspark_block_size": 5}, ChatFile(DEEPSEEK, V4_0731)),
    "a template file": (
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "old", "bos_token": "<s>"}},
        {}, ChatFile(JINJA, template=TEMPLATE, tokens={"bos_token": "<s>"}),
    ),
    "a template in the config": (
        {"tokenizer_config.json": {"chat_template": TEMPLATE, "eos_token": {"content": "</s>"}, "add_bos_token": True}},
        {}, ChatFile(JINJA, template=TEMPLATE, tokens={"eos_token": "</s>"}),
    ),
    "templates by name": (
        {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}},
        {}, ChatFile(JINJA, template="d"),
    ),
    "a template for the tokens of DeepSeek's": (
        {"tokenizer.json": OWN, "chat_template.jinja": TEMPLATE}, {}, ChatFile(JINJA, template=TEMPLATE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_files_tell_the_encoding(case: str, tmp_path: Path) -> None:
    files, config, expected = CASES[case]
    write(tmp_path, files)
    assert chat_file(tmp_path, config) == expected


def test_an_encoding_and_a_template_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {ENCODING: "raise SystemExit('ran')", "chat_template.jinja": TEMPLATE})
    caplog.set_level(logging.WARNING)
    assert chat_file(tmp_path, {}) == ChatFile(DEEPSEEK, V4)
    assert "has its own chat encoding and a chat template" in caplog.text


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer_config.json": "{"}, "is not JSON"), ({"tokenizer_config.json": []}, "expected a table"),
        ({"tokenizer_config.json": {"chat_template": 7}}, "chat_template is 7"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(files: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    with pytest.raises(CheckpointError, match=says):
        chat_file(tmp_path, {})


@pytest.mark.slow
def test_it_goes_from_the_checkpoint_into_the_bundle(
    quick_checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "checkpoint"
    shutil.copytree(quick_checkpoint, source)
    shutil.copy(tiny_checkpoint / "tokenizer.json", source)
    template = "{{ bos_token }}" + TEMPLATE
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "chat_template": template}
    write(source, {"tokenizer_config.json": config})
    package = export_checkpoint(source, tmp_path / "graph")
    report = build_bundles(package, tmp_path / "bundles", ["cpu"])
    bundle = load_bundle(report.results[0].folder)
    assert CHAT in bundle.manifest.files
    messages = [{"role": "user", "content": "Hi"}]
    theirs = AutoTokenizer.from_pretrained(source).apply_chat_template(messages, tokenize=False)
    assert chat_format(bundle).encode(messages) == theirs == "<bos>Hi"
