"""Text above a session: stop strings, reasons, special tokens, turns; against the session's own tokens and their text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

import foldkv.runtime
from foldkv.errors import CapacityError, InputError
from foldkv.runtime import Completion, Sampling, Session, Tokenizer, generate_text, load_bundle, stream_text
from foldkv.runtime.completion import Writer

PROMPTS = ["def scale(values, factor):\n    return", "Licensed under the Apache License, Version 2.0"]


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer.from_bundle(load_bundle(tiny_bundle, verify=False))


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with Session(tiny_bundle, context=256, batch=2) as session:
        yield session


@pytest.fixture(scope="module")
def whole(session: Session, tokenizer: Tokenizer) -> list[Completion]:
    """What greedy decoding writes after each prompt, without any stop."""
    return generate_text(session, tokenizer, PROMPTS, max_new_tokens=40, stop_tokens=[])


def test_text_is_that_of_the_tokens(session: Session, tokenizer: Tokenizer, whole: list[Completion]) -> None:
    tokens = session.generate([tokenizer.encode(text) for text in PROMPTS], max_new_tokens=40, stop_tokens=[])
    assert [list(one.token_ids) for one in whole] == tokens
    assert [one.text for one in whole] == [tokenizer.decode(one) for one in tokens]
    assert [(one.index, one.finish_reason, one.stop_reason) for one in whole] == [
        (0, "length", None),
        (1, "length", None),
    ]
    assert len(set(whole[0].text)) > 5


def test_a_text_ends_before_a_stop_string_of_many_tokens_and_the_others_go_on(
    session: Session, tokenizer: Tokenizer, whole: list[Completion]
) -> None:
    mark = whole[0].text[10:15]
    at = whole[0].text.index(mark)
    one, other = generate_text(session, tokenizer, PROMPTS, max_new_tokens=40, stop=[mark, "\0"], stop_tokens=[])
    assert (one.text, one.finish_reason, one.stop_reason) == (whole[0].text[:at], "stop", mark)
    assert one.token_ids == whole[0].token_ids[: at + len(mark)], "a token is a byte here"
    if mark not in whole[1].text:
        assert other == whole[1]
    assert session.positions[0] == len(PROMPTS[0]) + len(one.token_ids) - 1


def test_pieces_never_hold_a_part_of_a_stop_string(
    session: Session, tokenizer: Tokenizer, whole: list[Completion]
) -> None:
    text = whole[0].text
    mark, almost = text[5:9], text[:4] + "\0"
    pieces = list(stream_text(session, tokenizer, PROMPTS[0], max_new_tokens=40, stop=[mark, almost], stop_tokens=[]))
    assert "".join(piece.text for piece in pieces) == text[: text.index(mark)]
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert all(piece.text for piece in pieces[:-1])
    assert any(len(piece.text) >= 4 for piece in pieces), "what was no stop string after all comes at once"


def test_stop_tokens_give_their_id_and_the_end_of_sequence_none(
    session: Session, tokenizer: Tokenizer, whole: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = whole[0].token_ids[12]
    ends = whole[0].token_ids.index(stop)
    one = generate_text(session, tokenizer, PROMPTS[0], max_new_tokens=40, stop_tokens=[stop])[0]
    assert (one.token_ids, one.finish_reason, one.stop_reason) == (whole[0].token_ids[:ends], "stop", stop)
    monkeypatch.setattr(session, "_stops", lambda stop_tokens: frozenset([stop]))
    one = generate_text(session, tokenizer, PROMPTS[0], max_new_tokens=40)[0]
    assert (one.token_ids, one.finish_reason, one.stop_reason) == (whole[0].token_ids[:ends], "stop", None)


def test_a_conversation_of_texts_is_one_text(session: Session, tokenizer: Tokenizer) -> None:
    """Turn by turn with a stop string in between; the session holds every token that it gave out."""
    first = generate_text(session, tokenizer, PROMPTS, max_new_tokens=12, stop_tokens=[])
    second = generate_text(session, tokenizer, [" and", "\n"], max_new_tokens=12, stop_tokens=[], resume=True)
    at_once = [PROMPTS[0] + first[0].text + " and", PROMPTS[1] + first[1].text + "\n"]
    assert second == generate_text(session, tokenizer, at_once, max_new_tokens=12, stop_tokens=[])
    generate_text(session, tokenizer, PROMPTS[0], max_new_tokens=12, stop=first[0].text[4:7], stop_tokens=[])
    more = generate_text(session, tokenizer, [""], max_new_tokens=3, stop_tokens=[], resume=True)[0]
    assert first[0].text.startswith(first[0].text[:7] + more.text)


def test_a_stream_that_is_dropped_leaves_what_it_gave_out(session: Session, tokenizer: Tokenizer) -> None:
    stream = stream_text(session, tokenizer, PROMPTS[0], max_new_tokens=12, stop_tokens=[])
    given = [token for _ in range(4) for token in next(stream).token_ids]
    stream.close()  # type: ignore[attr-defined]
    assert session.pending[0] == given[-1] and session.positions[0] == len(PROMPTS[0]) + 3


def test_special_tokens_begin_a_conversation_and_no_turn_of_it(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    library = Library.from_file(str(tiny_checkpoint / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with Session(tiny_bundle, context=64, batch=2) as session:
        for options, held in (
            ({}, 4 + 1), ({"resume": True}, 4 + 1 + 1 + 3 + 1), ({}, 5), ({"add_special_tokens": False}, 4),
            ({"add_special_tokens": True, "resume": True}, 4 + 1 + 4 + 1),
        ):  # fmt: skip
            generate_text(session, tokenizer, "def", max_new_tokens=2, stop_tokens=[], **options)  # type: ignore[arg-type]
            assert session.positions[0] == held, options
        generate_text(session, tokenizer, ["def", "def"], max_new_tokens=1, stop_tokens=[], resume=True)
        assert session.positions.tolist() == [10 + 1 + 3, 4], "a slot that was empty begins its text"
        # Token ids are taken as they are, one prompt or several.
        for prompts in ([100, 101], [[100, 101]]):
            generate_text(session, tokenizer, prompts, max_new_tokens=1, stop_tokens=[])
            assert session.positions[0] == 2


@given(
    st.lists(st.text("ab😀", max_size=3), max_size=12),
    st.lists(st.text("ab😀", min_size=1, max_size=5), max_size=3),
    st.randoms(use_true_random=False),
)
@example(["a", "b", "c"], ["abc", "b"], None)
def test_where_a_text_ends_does_not_depend_on_how_it_is_cut(
    tokenizer: Tokenizer, parts: list[str], stop: list[str], rng: Any
) -> None:
    """Byte by byte the same as at once, and the same as a search over the whole text."""
    text = "".join(parts)
    writer = Writer(0, tokenizer, [], tuple(stop), True)
    out, ended = "", None
    for token in tokenizer.encode(text):
        piece = writer.push(token)
        if piece is not None:
            out += piece.text
            assert not any(mark in out for mark in stop)
            if piece.finish_reason:
                ended = piece
                break
    if ended is None:
        ended = writer.finish("length", None)
        out += ended.text
    found = [(text.index(mark) + len(mark), text.index(mark), mark) for mark in stop if mark in text]
    _, at, mark = min(found, default=(0, len(text), None))
    assert (out, ended.stop_reason) == (text[:at], mark)
    assert ended.finish_reason == ("stop" if found else "length")


def test_a_stop_string_in_what_was_held_back_to_the_end_counts(tokenizer: Tokenizer) -> None:
    writer = Writer(0, tokenizer, [], ("\N{REPLACEMENT CHARACTER}",), True)
    assert writer.push(0xF0) is None
    last = writer.finish("length", None)
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ({"stop": [257]}, "stop must be a text .* For tokens use stop_tokens"),
        ({"stop": b"ab"}, "stop must be a text"),
        ({"stop": None}, "stop must be a text"),
        ({"prompts": None}, "prompts must be texts or lists of token ids, got None"),
        ({"prompts": b"ab"}, "prompts must be texts or lists of token ids, got b'ab'"),
        ({"prompts": [b"ab"]}, "prompts must be texts or lists of token ids"),
        ({"prompts": ["a", 5]}, "prompts must be texts or lists of token ids, got 5"),
        ({"prompts": []}, "got 0 prompts"),
        ({"prompts": ["a", "b", "c"]}, "got 3 prompts"),
        ({"prompts": ""}, "prompt 0 is empty"),
        ({"prompts": "\ud800"}, "cannot be encoded"),
        ({"prompts": [[True]]}, "expected a sequence of integer token ids"),
        ({"prompts": [[300]]}, "has the id 300"),
        ({"tokenizer": None}, "tokenizer must be Tokenizer.from_bundle"),
        ({"add_special_tokens": 1}, "add_special_tokens must be True, False or None, got 1"),
        ({"skip_special_tokens": None}, "skip_special_tokens must be True or False"),
        ({"resume": 0}, "resume must be True or False"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"sampling": None}, "sampling must be a Sampling"),
        ({"stop_tokens": [999]}, "stop_tokens must be token ids"),
        ({"requests": [1, 2]}, "requests must be 1 integers"),
    ],
)
def test_a_wrong_argument_is_one_error_before_anything_is_done(
    session: Session, tokenizer: Tokenizer, options: dict[str, Any], message: str
) -> None:
    session.reset()
    session.forward([[65], []])
    arguments = {"tokenizer": tokenizer, "prompts": "a", "max_new_tokens": 2} | options
    with pytest.raises(InputError, match=message):
        stream_text(session, **arguments)
    assert session.positions.tolist() == [1, 0]


def test_too_long_a_text_is_refused_when_it_is_given(session: Session, tokenizer: Tokenizer) -> None:
    with pytest.raises(CapacityError):
        stream_text(session, tokenizer, "a" * 250, max_new_tokens=20)


def test_a_seed_draws_the_same_text(session: Session, tokenizer: Tokenizer) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    one = generate_text(session, tokenizer, PROMPTS, max_new_tokens=10, sampling=sampling, requests=[5, 6])
    two = generate_text(session, tokenizer, PROMPTS[::-1], max_new_tokens=10, sampling=sampling, requests=[6, 5])
    assert [completion.text for completion in one] == [completion.text for completion in two[::-1]]


def test_what_a_service_needs_is_imported_from_one_place_and_loads_little() -> None:
    code = (
        "import sys, foldkv.runtime\n"
        "print([name for name in ('numpy', 'onnxruntime', 'tokenizers') if name in sys.modules])\n"
        "from foldkv.runtime import Session, Sampling, Tokenizer, stream_text\n"
        "print([name for name in ('onnxruntime', 'tokenizers', 'torch', 'onnx', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:2] == ["[]", "[]"]
    for name in foldkv.runtime.__all__:
        assert name in dir(foldkv.runtime) and getattr(foldkv.runtime, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Sesion'"):
        _ = foldkv.runtime.Sesion
