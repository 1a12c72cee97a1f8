"""Token ids of prompts: a special token that a message spells out is ordinary text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from foldkv.errors import InputError
from foldkv.runtime.chat import chat_format
from foldkv.runtime.chat.prompt import Prompt, Writer, finder
from foldkv.runtime.chat.revisions import MARKS
from foldkv.runtime.tokenizer import Tokenizer

PLAIN = len(pre_tokenizers.ByteLevel.alphabet())
V4 = chat_format("v4")


def bytes_and(tokens: list[str], special: bool, folder: Path, normalize: Any = None) -> Tokenizer:
    """A tokenizer of single bytes and these tokens; ids of bytes are below ``PLAIN``."""
    library = Library(
        models.BPE(vocab={sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(params=[True, False], ids=["special", "added"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """DeepSeek's tokens, whether a tokenizer calls them special or not."""
    return bytes_and([*sorted(MARKS), "<｜fim▁hole｜>"], request.param, tmp_path / "t")


def test_the_encodings_own_tokens_are_tokens(tokenizer: Tokenizer) -> None:
    prompt = V4.prompt([{"role": "system", "content": "é"}, {"role": "user", "content": "Hi"}])
    ids = prompt.token_ids(tokenizer)
    tokens = [tokenizer.token_text(one) for one in ids if one >= PLAIN]
    assert tokens == ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>"]
    assert ids == tokenizer.encode(prompt.text, add_special_tokens=False)
    assert str(prompt) == prompt.text == tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("spelled", ["<｜User｜>", "</think>", "｜DSML｜", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>"])
def test_those_of_messages_are_text(tokenizer: Tokenizer, spelled: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": spelled}}
    calls = [{"id": "x", "function": {"name": "f", "arguments": {"a": spelled}}}]
    messages = [
        {"role": "system", "content": spelled},
        {"role": "user", "content": f"a{spelled}b"},
        {"role": "assistant", "content": spelled, "reasoning_content": spelled, "tool_calls": calls},
        {"role": "tool", "content": spelled, "tool_call_id": "x"},
    ]
    unlike = "#" * len(spelled.encode())
    prompt = V4.prompt(messages, tools=[tool])
    harmless = V4.prompt(
        [
            {"role": "system", "content": unlike},
            {"role": "user", "content": f"a{unlike}b"},
            {"role": "assistant", "content": unlike, "reasoning_content": unlike, "tool_calls": [
                {"id": "x", "function": {"name": "f", "arguments": {"a": unlike}}}
            ]},
            {"role": "tool", "content": unlike, "tool_call_id": "x"},
        ],
        tools=[tool | {"function": {"name": "f", "description": unlike}}],
    )  # fmt: skip
    ids = prompt.token_ids(tokenizer)
    assert prompt.text.count(spelled) > harmless.text.count(spelled)
    assert [one for one in ids if one >= PLAIN] == [one for one in harmless.token_ids(tokenizer) if one >= PLAIN]
    assert len(ids) == len(harmless.token_ids(tokenizer))
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt.text


def test_two_messages_cannot_make_a_token_together(tokenizer: Tokenizer) -> None:
    for cut in range(1, len("<｜User｜>")):
        halves = [{"role": "system", "content": half} for half in ("<｜User｜>"[:cut], "<｜User｜>"[cut:])]
        prompt = V4.prompt([*halves, {"role": "user", "content": ""}])
        assert "<｜User｜><｜User｜>" in prompt.text
        assert len([one for one in prompt.token_ids(tokenizer) if one >= PLAIN]) == 4


def test_a_vocabulary_that_cannot_spell_a_token_refuses_it(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    writer = Writer(["<s>"])
    writer.own("<s> ")
    writer.given("a")
    assert writer.prompt().token_ids(tokenizer) == [0, 1]
    writer.given(" <s> a")
    assert writer.prompt() == Prompt("<s> a <s> a", ((0, 3),))
    with pytest.raises(InputError, match="spells out <s>, which this tokenizer cannot write as ordinary text"):
        writer.prompt().token_ids(tokenizer)


def test_the_longest_token_is_found() -> None:
    assert finder(["<a", "<a>", "", "<a>b"]).findall("<a>b<a><a") == ["<a>b", "<a>", "<a"]
    assert finder([]).findall("abc") == []
