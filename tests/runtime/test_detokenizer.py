"""Text piece by piece against the library's text of all tokens, for every kind of decoder that the library has."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from foldkv.errors import InputError
from foldkv.runtime import detokenizer
from foldkv.runtime.detokenizer import possible_start, token_bytes
from foldkv.runtime.tokenizer import Tokenizer

Make = Callable[[Any], Tokenizer]
#: What tokens of any vocabulary may look like, and what decoders treat apart.
STRANGE = ["a", "b", "▁", "▁a", "a▁b", "▁▁", " ", " a ", "", "##", "##a", "</w>", "a</w>", ".", " .", "n't", " '", "|", "<pad>",
           "é", "中", "😀", "\N{REPLACEMENT CHARACTER}", "xyx", "xy", "y", "<0x41>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>",
           "<0xE4>", "<0xB8>", "<0xAD>", "<0xff>", "<0x+5>", "<0x5>", "<0xGG>"]  # fmt: skip
BYTES = list(detokenizer._BYTE_OF)
WORDS = list(dict.fromkeys([*STRANGE, *BYTES, "ðŁ", "Ġa", "äº"]))
ADDED = [AddedToken("<eos>", special=True), AddedToken("two words", special=False), AddedToken("加", special=False)]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
DECODERS: dict[str, Any] = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "byte fallback, strip space": decoders.Sequence(LLAMA),
    "byte fallback": decoders.Sequence(LLAMA[:3]),
    "byte fallback alone": decoders.ByteFallback(),
    "metaspace": decoders.Metaspace(),
    "metaspace, never at the start": decoders.Metaspace(prepend_scheme="never"),
    "byte fallback, metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    "word pieces": decoders.WordPiece(),
    "word pieces, no clean-up": decoders.WordPiece(cleanup=False),
    "suffixes of words": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "replace a pattern": decoders.Replace(Regex("[ab]|^"), "*"),
    "fused, replace": decoders.Sequence([decoders.Fuse(), decoders.Replace("xyx", "Z")]),
    "fused, replace a pattern": decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+"), "A")]),
    "byte level, strip": decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 2, 0)]),
    "fused, strip at the end": decoders.Sequence([decoders.Replace("▁", " a"), decoders.Fuse(), decoders.Strip(" ", 0, 2)]),
    "fused twice": decoders.Sequence([decoders.Sequence([decoders.Fuse()]), decoders.Fuse(), decoders.WordPiece()]),
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tokenizer of ours from one of the library."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def write(library: Any) -> Tokenizer:
        path = folder / f"{len(list(folder.iterdir()))}.json"
        library.save(str(path))
        return Tokenizer(path)

    return write


@pytest.fixture(scope="module")
def tokenizers(make: Make) -> dict[str, Tokenizer]:
    """One vocabulary, every decoder."""
    found = {}
    for name, decoder in DECODERS.items():
        library = Library(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
        library.add_tokens(ADDED)
        if decoder is not None:
            library.decoder = decoder
        found[name] = make(library)
    return found


def pieces(tokenizer: Tokenizer, tokens: Sequence[int], **options: Any) -> str:
    stream = tokenizer.stream(**options)
    return "".join([*(stream.push(token) for token in tokens), stream.finish()])


ids = st.lists(st.integers(0, len(WORDS) + len(ADDED) + 2), max_size=30)


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=60)
@given(tokens=ids, skip=st.booleans(), at=st.integers(0, 30))
def test_pieces_are_the_text_of_all_tokens(
    tokenizers: dict[str, Tokenizer], name: str, tokens: list[int], skip: bool, at: int
) -> None:
    tokenizer = tokenizers[name]
    if name.endswith("at the end"):  # the library itself fails on a text shorter than what it strips
        tokens = [WORDS.index("b"), *tokens]
    whole = tokenizer.decode(tokens, skip_special_tokens=skip)
    assert pieces(tokenizer, tokens, skip_special_tokens=skip) == whole
    after = pieces(tokenizer, tokens[at:], skip_special_tokens=skip, prompt=tokens[:at])
    assert whole.endswith(after) and (at or after == whole)


@given(st.lists(st.sampled_from(BYTES), max_size=24))
@example(["ð"] * 20)
def test_bytes_that_are_no_text_are_replaced_as_the_library_replaces_them(
    tokenizers: dict[str, Tokenizer], tokens: list[str]
) -> None:
    numbers = [WORDS.index(token) for token in tokens]
    for name in ("byte level", "byte level, strip"):
        assert pieces(tokenizers[name], numbers) == tokenizers[name].decode(numbers)


def byte_fallback() -> Any:
    """As Llama 2's: a space is ▁, text starts with one, and what the vocabulary lacks is bytes."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "ab", "é"]
    library = Library(
        models.BPE(
            vocab={word: i for i, word in enumerate(vocabulary)}, merges=[("▁", "a"), ("a", "b")], byte_fallback=True,
            unk_token="<unk>", fuse_unk=True,
        )
    )  # fmt: skip
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(LLAMA)
    return library


def byte_level() -> Any:
    library = Library(models.BPE(vocab={char: i for i, char in enumerate(BYTES)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    return library


@pytest.mark.parametrize("kind", [byte_fallback, byte_level])
def test_random_text_comes_back_piece_by_piece(make: Make, kind: Callable[[], Any]) -> None:
    tokenizer = make(kind())

    @given(st.text(max_size=40))
    @example("😀")
    @example("a 😀 中文 ﷽\u200d é")
    def check(text: str) -> None:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text or kind is byte_fallback
        assert pieces(tokenizer, tokens) == tokenizer.decode(tokens)

    check()


def test_a_character_comes_with_its_last_token_and_a_word_at_once(make: Make) -> None:
    tokenizer = make(byte_level())
    stream = tokenizer.stream()
    assert [stream.push(token) for token in tokenizer.encode("a😀b")] == ["a", "", "", "", "😀", "b"]
    stream = tokenizer.stream()
    assert [stream.push(tokenizer.encode("é")[0]), stream.finish()] == ["", "\N{REPLACEMENT CHARACTER}"]
    fallback = make(byte_fallback())
    stream, tokens = fallback.stream(), fallback.encode("a😀ab")
    assert [stream.push(token) for token in tokens] == ["a", "", "", "", "", "😀ab"]
    # A byte more, and none of the run is text: the library decides over a run as a whole.
    assert pieces(fallback, [*tokens[:5], 1 + 0xFF]) == fallback.decode([*tokens[:5], 1 + 0xFF]) == "a" + "\ufffd" * 5


@pytest.mark.parametrize("kind", [byte_fallback, byte_level])
def test_the_bytes_of_tokens_are_together_those_of_the_text(make: Make, kind: Callable[[], Any]) -> None:
    tokenizer, text = make(kind()), "a😀éb"
    tokens = tokenizer.encode(text)
    assert len(tokens) > len(text) and b"".join(token_bytes(tokenizer, one) or b"?" for one in tokens) == text.encode()


def test_what_follows_a_prompt_keeps_its_leading_space(make: Make) -> None:
    tokenizer = make(byte_fallback())
    prompt, more = tokenizer.encode("ab"), tokenizer.encode("a ab")
    assert tokenizer.decode([*prompt, *more]) == "ab a ab" and tokenizer.decode(more) == "a ab"
    assert pieces(tokenizer, more, prompt=prompt) == " a ab"


@pytest.mark.parametrize("name", ["byte level", "byte fallback, strip space"])
def test_a_token_takes_the_same_time_after_any_number_of_others(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """Also where nothing but half characters comes; a window that only grows would take a hundred times as long."""
    tokenizer = tokenizers[name]
    token = WORDS.index("ð" if name == "byte level" else "<0xF0>")

    def seconds(count: int) -> float:
        stream, start = tokenizer.stream(), time.perf_counter()
        for _ in range(count):
            stream.push(token)
        stream.finish()
        return time.perf_counter() - start

    seconds(100)
    assert min(seconds(20_000) for _ in range(3)) < 60 * max(min(seconds(1_000) for _ in range(3)), 1e-4)


def test_of_a_long_prompt_only_the_end_is_read(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, read = make(byte_level()), list[int]()
    token_text = Tokenizer.token_text

    def noted(self: Tokenizer, token: int, **more: Any) -> str | None:
        read.append(token)
        return token_text(self, token, **more)

    monkeypatch.setattr(Tokenizer, "token_text", noted)
    half, rest = tokenizer.encode("😀")[:3], tokenizer.encode("😀")[3:]
    assert len(half) == 3 and pieces(tokenizer, rest, prompt=[*tokenizer.encode("a" * 500), *half]) == "😀"
    assert len(read) < 20


def test_every_decoder_of_the_library_has_a_step() -> None:
    kinds = {name for name in dir(decoders) if name[0].isupper()} - {"Decoder", "DecodeStream", "Sequence"}
    assert kinds == set(detokenizer._STEPS)


def test_text_of_a_decoder_that_is_not_known_comes_whole(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make(byte_level())
    monkeypatch.setattr(detokenizer, "_STEPS", {})
    tokens = tokenizer.encode("a😀b")
    stream = tokenizer.stream(prompt=tokens[:1])
    assert [stream.push(token) for token in tokens[1:]] == [""] * 5 and stream.finish() == "😀b"
    assert "decoder of the type ByteLevel" in caplog.text


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_possible_starts_are_those_that_more_text_can_complete(text: str, marks: list[str]) -> None:
    expected = max(
        (n for n in range(len(text) + 1) for mark in marks if n < len(mark) and text[len(text) - n :] == mark[:n]),
        default=0,
    )
    assert possible_start(text, marks) == expected


@pytest.mark.parametrize("tokens", [[-1], [True], ["a"], [1.5], [1 << 40], "a", None, 3])
def test_what_is_no_token_id_is_one_error(make: Make, tokens: Any) -> None:
    tokenizer = make(byte_level())
    with pytest.raises(InputError, match="token ids must be integers of 0 or more, got"):
        tokenizer.decode(tokens)


@pytest.mark.parametrize("text", [b"bytes", 5, None, ["a"], "\ud800"])
def test_what_is_no_text_is_one_error(make: Make, text: Any) -> None:
    tokenizer = make(byte_level())
    with pytest.raises(InputError, match="the text"):
        tokenizer.encode(text)
    with pytest.raises(InputError, match="add_special_tokens must be True or False, got 'no'"):
        tokenizer.encode("a", add_special_tokens="no")  # type: ignore[arg-type]


def test_random_tokens_of_the_small_model(tiny_checkpoint: Path) -> None:
    tokenizer, rng = Tokenizer(tiny_checkpoint / "tokenizer.json"), random.Random(0)
    for _ in range(50):
        tokens = [rng.randrange(260) for _ in range(40)]
        for skip in (True, False):
            assert pieces(tokenizer, tokens, skip_special_tokens=skip) == tokenizer.decode(
                tokens, skip_special_tokens=skip
            )
