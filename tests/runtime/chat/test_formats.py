"""Which chat format a bundle has, and the arguments of formats."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from foldkv.errors import ArtifactError, InputError
from foldkv.export.contract.chat import CHAT, DEEPSEEK, JINJA, V4, V4_0731, ChatFile
from foldkv.runtime.bundle import Bundle, load_bundle
from foldkv.runtime.chat import chat_format
from foldkv.runtime.chat.revisions import MARKS

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle, verify=False)


def with_chat(bundle: Bundle, folder: Path, file: ChatFile, tokens: list[str]) -> Bundle:
    """The bundle as if its checkpoint had this chat encoding, and these tokens."""
    assert bundle.tokenizer is not None
    tokenizer = Library.from_file(str(bundle.tokenizer))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    file.write(folder / CHAT)
    return dataclasses.replace(bundle, tokenizer=folder / "tokenizer.json", chat=folder / CHAT)


def test_a_bundle_without_one_says_so(bundle: Bundle) -> None:
    assert bundle.chat is None
    with pytest.raises(ArtifactError, match=rf"has no {CHAT}: .*chat_format\('v4'\)"):
        chat_format(bundle)


def test_a_bundle_of_deepseeks(bundle: Bundle, tmp_path: Path) -> None:
    form = chat_format(with_chat(bundle, tmp_path, ChatFile(DEEPSEEK, V4_0731), sorted(MARKS)))
    assert form.name == V4_0731 and form.efforts == ("low", "high", "max")
    assert form.encode(HI, effort="high") == chat_format(V4_0731).encode(HI, effort="high")


def test_its_tokenizer_must_have_the_tokens(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not have <think> as one token"):
        chat_format(with_chat(bundle, tmp_path, ChatFile(DEEPSEEK, V4), ["｜DSML｜"]))


def test_a_bundle_with_a_template(bundle: Bundle, tmp_path: Path) -> None:
    file = ChatFile(JINJA, template="{{ bos_token }}{{ messages[0].content }}", tokens={"bos_token": "<bos>"})
    form = chat_format(with_chat(bundle, tmp_path, file, []))
    assert form.name == JINJA and form.efforts == () and form.special == {"<bos>", "<eos>"}
    assert form.encode(HI) == "<bos>Hi"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"the chat format is 'v4-0713'; expected one of v4, v4-0731, v4.1. \(did you mean"
    ):
        chat_format("v4-0713")


@pytest.mark.parametrize("name", ["thinking", "add_generation_prompt", "drop_reasoning"])
def test_switches_are_true_or_false(name: str) -> None:
    options: dict[str, Any] = {name: "no"}
    with pytest.raises(InputError, match=f"{name} is 'no'; expected True or False"):
        chat_format(V4).encode(HI, **options)


@pytest.mark.parametrize(
    "file", [ChatFile(DEEPSEEK, V4), ChatFile(JINJA, template="é{{ x }}", tokens={"bos_token": "é"})]
)
def test_the_file_is_read_as_it_was_written(file: ChatFile, tmp_path: Path) -> None:
    file.write(tmp_path / CHAT)
    assert ChatFile.read(tmp_path / CHAT) == file


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "has version 2"), ({"tokens": []}, "values of other types"), ({"revision": "v5"}, "the revision 'v5'"),
        ({"encoding": "jinja", "template": ""}, "names the encoding 'jinja'"), ({"encoding": "x"}, "names the encoding 'x'"),
        ({"more": 1}, "cannot be read"), ({"encoding": None}, "values of other types"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    ChatFile(DEEPSEEK, V4).write(tmp_path / CHAT)
    content = json.loads((tmp_path / CHAT).read_text()) | change
    (tmp_path / CHAT).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=says):
        ChatFile.read(tmp_path / CHAT)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null"])
def test_so_is_what_is_no_such_file(content: str, tmp_path: Path) -> None:
    (tmp_path / CHAT).write_text(content)
    with pytest.raises(ArtifactError, match=r"cannot be read .* build the bundle again"):
        ChatFile.read(tmp_path / CHAT)
