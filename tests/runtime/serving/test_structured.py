"""Answers that keep to a grammar: what is allowed is what is right, and an answer can stop where it is complete, and only there."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from grammar_walks import Spelling, follow, small_bpe, walk
from hypothesis import given, settings
from hypothesis import strategies as st

from foldkv import packages
from foldkv.errors import CapacityError, GrammarError, InputError, MissingDependencyError, QueueFullError
from foldkv.runtime.serving import grammar_check, structured
from foldkv.runtime.serving.structured import Grammars
from foldkv.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]
END = 257
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["a", "日本", None]},
        "list": {"type": "array", "items": {"type": ["boolean", "string"], "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
#: llguidance takes the one sign between ASCII and the others only as an escape.
_STRINGS = st.characters(codec="utf-8", exclude_characters="\x7f")


class Model:
    """A tokenizer, the grammars of a model with it, and a token that ends answers."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: int) -> None:
        self.tokenizer, self.eos, self.spelling = tokenizer, eos, Spelling(tokenizer)
        self.grammars = Grammars(tokenizer, vocab_size, [eos])


@pytest.fixture(scope="module")
def byte_model() -> Model:
    """Tokens are bytes; the logits are more than those."""
    return Model(Tokenizer(ROOT / "examples" / "tiny-v4" / "tokenizer.json"), 300, END)


@pytest.fixture(scope="module")
def bpe_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Tokens are pieces of words and of markup."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer = small_bpe(path, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "</think>"], ["｜DSML｜"])
    return Model(tokenizer, tokenizer.vocab_size, tokenizer.encode("<｜end▁of▁sentence｜>")[0])


@pytest.fixture(params=["bytes", "bpe"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue("byte_model" if request.param == "bytes" else "bpe_model")
    return found


def _valid(text: bytes, schema: Any) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_random_allowed_tokens_are_json_of_the_schema_and_can_end_only_as_that(model: Model) -> None:
    new, done = model.grammars.json_schema(SCHEMA), 0
    for seed in range(12):
        tokens = walk(new(), model.spelling, model.eos, seed, steps=400, wishes=['"', "}", "]"])
        if tokens is None:
            continue
        done += 1
        again = new()
        for n, token in enumerate(tokens):
            assert again.allowed()[model.eos] == _valid(model.spelling.text(tokens[:n]), SCHEMA)
            again.took(token)
        assert again.ended and _valid(model.spelling.text(tokens), SCHEMA)
    assert done >= 6


@settings(max_examples=25, deadline=None)
@given(
    value=st.fixed_dictionaries(
        {
            "name": st.text(_STRINGS, max_size=8),
            "age": st.integers(0, 130),
            "kind": st.sampled_from(["a", "日本", None]),
        },
        optional={"list": st.lists(st.booleans() | st.text(_STRINGS, max_size=4), max_size=2)},
    ),
    indent=st.sampled_from([None, 2]),
)
def test_every_value_of_a_schema_can_be_written(
    byte_model: Model, bpe_model: Model, value: dict[str, Any], indent: int | None
) -> None:
    # Properties come in the order of the schema.
    text = json.dumps(
        {key: value[key] for key in SCHEMA["properties"] if key in value}, ensure_ascii=False, indent=indent
    )
    for model in (byte_model, bpe_model):
        constraint = model.grammars.json_schema(SCHEMA)()
        assert follow(constraint, model.spelling, text) == ""
        assert constraint.ended and np.flatnonzero(constraint.allowed()).tolist() == [model.eos]


def test_a_value_in_an_object_in_text_of_many_bytes(model: Model) -> None:
    constraint = model.grammars.json_object()()
    assert follow(constraint, model.spelling, '{"né": ["日本", "😀"') == "" and not constraint.ended
    # The start of a sign may be a token of its own, and only what makes it a sign may follow.
    first = "日".encode()[:1]
    assert follow(constraint, model.spelling, ', "') == ""
    constraint.took(model.spelling.bytes.index(first))
    following = {model.spelling.bytes[token][:1] for token in np.flatnonzero(constraint.allowed())}
    assert following == {bytes([byte]) for byte in range(0x80, 0xC0)}
    for byte in "日".encode()[1:]:
        constraint.took(model.spelling.bytes.index(bytes([byte])))
    assert follow(constraint, model.spelling, '"]}') == "" and constraint.ended


@pytest.mark.parametrize(
    ("schema", "text", "wrong"),
    [
        (SCHEMA, '{"name": "a", "kind": ', "3"),
        (SCHEMA, '{"name": "a", "kind": "a", "', "o"),
        (SCHEMA, '{"name": "12345678', "9"),
        (SCHEMA, '{"name": "a", "age": 13', "1"),
        ({"type": "string", "pattern": "^a+$"}, '"aa', "b"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"const": "y"}}}, '"', "z"),
    ],
)
def test_what_is_not_of_the_schema_cannot_be_written(model: Model, schema: Any, text: str, wrong: str) -> None:
    constraint = model.grammars.json_schema(json.dumps(schema))()
    assert follow(constraint, model.spelling, text) == ""
    assert follow(constraint, model.spelling, wrong) == wrong[-1] and not constraint.ended


def test_a_number_may_end_or_go_on(model: Model) -> None:
    constraint = model.grammars.json_schema({"type": "integer"})()
    assert not constraint.allowed()[model.eos]
    follow(constraint, model.spelling, "12")
    assert not constraint.ended and constraint.allowed()[model.eos] and constraint.allowed().sum() > 10
    constraint.took(model.eos)
    assert constraint.ended


def test_white_space_cannot_go_on_for_ever(byte_model: Model) -> None:
    constraint = byte_model.grammars.json_object()()
    assert follow(constraint, byte_model.spelling, "{" + " " * 100) == " " * 60
    free = byte_model.grammars.json_schema({"type": "object", "x-guidance": {"whitespace_flexible": False}})()
    assert follow(free, byte_model.spelling, "{ }") == " }"


@pytest.mark.parametrize("pattern", ["(ab|a)*c?", "[a-b]{2,3}", "a/b|c", r"\w\.", "^ab$"])
@settings(max_examples=25, deadline=None)
@given(text=st.text("abc/.", max_size=4))
def test_patterns_are_those_of_re(byte_model: Model, pattern: str, text: str) -> None:
    constraint = byte_model.grammars.regex(pattern)()
    left = follow(constraint, byte_model.spelling, text)
    complete = not left and bool(constraint.allowed()[END])
    assert complete == bool(re.fullmatch(pattern, text))


def test_one_of_some_texts(model: Model) -> None:
    texts = ['say "yes"\n', "say", "nein / {}", "日本", "\\d"]
    new = model.grammars.choice(texts)
    for text in texts:
        constraint = new()
        assert follow(constraint, model.spelling, text) == "" and constraint.allowed()[model.eos]
        assert constraint.ended == (text != "say")
    assert follow(new(), model.spelling, "sag") == "g"


def test_text_may_come_before_a_mark(model: Model) -> None:
    for new in (
        model.grammars.choice(["yes"], after="</think>"), model.grammars.regex("yes", after="</think>"),
        model.grammars.json_schema({"const": "yes"}, after="</think>"),
    ):  # fmt: skip
        constraint = new()
        assert follow(constraint, model.spelling, "{so </thin, 日本 </") == "" and not constraint.allowed()[model.eos]
        assert follow(constraint, model.spelling, "</think>") == ""
        follow(constraint, model.spelling, '"')
        assert follow(constraint, model.spelling, "no") == "no" and not constraint.allowed()[model.eos]
        assert follow(constraint, model.spelling, "yes") == ""
        follow(constraint, model.spelling, '"')
        assert constraint.ended


def test_special_tokens_are_no_text(bpe_model: Model) -> None:
    """Neither those that the tokenizer calls special nor the marks of a chat's markup, which it may call otherwise."""
    constraint = bpe_model.grammars.json_schema({"type": "string"})()
    follow(constraint, bpe_model.spelling, '"a')
    for mark in ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "</think>", "｜DSML｜"):
        (token,) = bpe_model.tokenizer.encode(mark)
        assert not constraint.allowed()[token]
    assert follow(constraint, bpe_model.spelling, "</think>｜DSML｜") == ""  # spelled out it is a text as any other


def test_ids_that_the_tokenizer_lacks_are_never_allowed(byte_model: Model) -> None:
    for constraint in (byte_model.grammars.regex("(?s:.*)")(), byte_model.grammars.lark("start: <[*]>")()):
        allowed = constraint.allowed()
        assert allowed.shape == (300,) and allowed.dtype == np.bool_
        assert not allowed[258:].any()
        for token in (258, 299, 300, -1):
            with pytest.raises(InputError, match=f"token {token} may not come here"):
                constraint.took(token)


def test_a_model_may_have_several_ends_or_ends_that_its_tokenizer_lacks_or_none() -> None:
    tokenizer = Tokenizer(ROOT / "examples" / "tiny-v4" / "tokenizer.json")
    for eos in ([], [256, 257], [258], [299, 0]):
        for ended_by in eos:
            constraint = Grammars(tokenizer, 300, eos).regex("a*")()
            constraint.took(tokenizer.encode("a", add_special_tokens=False)[0])
            assert set(eos) <= set(np.flatnonzero(constraint.allowed()).tolist())
            constraint.took(ended_by)
            assert constraint.ended
        inside = Grammars(tokenizer, 300, eos).choice(["ab"])()
        follow(inside, Spelling(tokenizer), "a")
        assert not inside.allowed()[eos].any()
        follow(inside, Spelling(tokenizer), "b")
        assert inside.ended and np.flatnonzero(inside.allowed()).tolist() == sorted(eos)


def test_each_answer_has_a_state_of_its_own(model: Model) -> None:
    new = model.grammars.choice(["abc", "abd"])
    first, second = new(), new()
    follow(first, model.spelling, "abc")
    assert first.ended and not second.ended
    made: list[str] = []
    thread = threading.Thread(target=lambda: made.append(follow(new(), model.spelling, "abd")))
    thread.start()
    thread.join()
    assert made == [""] and follow(second, model.spelling, "abd") == ""


def test_a_token_that_is_not_allowed_is_an_error(model: Model) -> None:
    new = model.grammars.choice(["abc"])
    constraint = new()
    for wrong in (model.eos, model.tokenizer.encode("x")[0]):
        with pytest.raises(InputError, match=f"token {wrong} may not come here"):
            constraint.took(wrong)
    assert follow(constraint, model.spelling, "abc") == "" and constraint.ended
    ended = new()
    follow(ended, model.spelling, "abc")
    with pytest.raises(InputError, match="may not come here"):
        ended.took(model.eos)


def test_compiled_grammars_are_kept_but_not_all(byte_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import llguidance

    made: list[str] = []
    real = llguidance.LLMatcher

    class Counting:
        grammar_from_lark = staticmethod(real.grammar_from_lark)

        def __new__(cls, vocabulary: Any, grammar: str, **options: Any) -> Any:
            made.append(grammar)
            return real(vocabulary, grammar, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", Counting)
    monkeypatch.setattr(structured, "_KEPT", 2)
    for text in ("k1", "k1", "k2", "k1", "k3", "k1", "k2"):
        constraint = byte_model.grammars.choice([text])()
        assert follow(constraint, byte_model.spelling, text) == "" and constraint.ended
    assert [next(text for text in ("k1", "k2", "k3") if text in one) for one in made] == ["k1", "k2", "k3", "k2"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda one: one.json_schema("{"), "the JSON schema cannot be read: Expecting property name"),
        (lambda one: one.json_schema("[]"), r"the JSON schema is \[\]; expected a table"),
        (lambda one: one.json_schema({"minimum": float("nan")}), "the JSON schema cannot be read"),
        (lambda one: one.json_schema({"const": object()}), "the JSON schema cannot be read: .* not JSON serializable"),
        (lambda one: one.json_schema({"type": "strin"}), "the JSON schema cannot be used: Invalid type: strin"),
        (lambda one: one.json_schema({"not": {}}), 'the JSON schema cannot be used: Unimplemented keys: .*"not"'),
        (lambda one: one.json_schema({"$ref": "#/x"}), "the JSON schema cannot be used: Pointer '/x' does not exist"),
        (lambda one: one.json_schema({"type": "string", "pattern": "(?=a)"}), "schema cannot be used: .*look-around"),
        (lambda one: one.json_schema("[" * 100_000), "the JSON schema cannot be read"),
        (lambda one: one.json_schema({"const": "x" * structured.LARGEST_GRAMMAR}), "the JSON schema is too large: "),
        (lambda one: one.regex("a("), "the pattern cannot be used: it is not a regular expression: unclosed group"),
        (lambda one: one.regex(""), "the pattern is ''; expected a regular expression"),
        (lambda one: one.regex("x" * (1 + structured.LARGEST_GRAMMAR)), "the pattern is too large: 52.... characters"),
        (lambda one: one.regex("a\\"), "the pattern is .*; expected something after the last backslash"),
        (lambda one: one.regex("\ud800"), "the pattern cannot be encoded: .*surrogates not allowed"),
        (lambda one: one.json_schema({"const": "\ud800"}), "the JSON schema cannot be read: .*surrogates not allowed"),
        (lambda one: one.choice([]), r"the choices are \[\]; expected a list of texts"),
        (lambda one: one.choice("ab"), "the choices are 'ab'; expected a list of texts"),
        (lambda one: one.choice(["a", ""]), "the choices are .*; expected a list of texts that are not empty"),
        (lambda one: one.lark("start: x"), "the grammar cannot be used: unknown name: \"x\""),
        (lambda one: one.lark(3), "the grammar is 3; expected a text"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_held_to_is_refused_before_anything_runs(
    byte_model: Model, make: Any, problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        make(byte_model.grammars)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_what_cannot_be_written_with_the_vocabulary_is_an_error_and_not_an_end(tmp_path: Path) -> None:
    facts = json.loads((ROOT / "examples" / "tiny-v4" / "tokenizer.json").read_text())
    word = next(iter(facts["model"]["vocab"]))
    facts["model"]["vocab"] = {word: 0, "a": 1}
    for i, token in enumerate(facts["added_tokens"]):
        token["id"] = 2 + i
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    grammars = Grammars(Tokenizer(tmp_path / "tokenizer.json"), 4, [3])
    constraint = grammars.choice(["ab"])()
    constraint.took(1)
    with pytest.raises(GrammarError, match="the answer cannot go on within its grammar"):
        constraint.allowed()


def test_a_grammar_that_turns_out_too_complex_is_an_error_and_not_an_end(byte_model: Model) -> None:
    """llguidance has limits of its own, which it reaches while it runs."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1200)}}
    constraint = byte_model.grammars.json_schema(schema)()
    with pytest.raises(GrammarError, match=r"the answer cannot go on within its grammar: .*items; max is") as caught:
        follow(constraint, byte_model.spelling, '{"p7": ')
    assert not isinstance(caught.value, CapacityError), "nothing says that a prompt is too long"
    with pytest.raises(GrammarError, match="cannot go on"):
        constraint.allowed()


def test_an_ambiguous_grammar_gives_up_before_its_steps_are_slow(byte_model: Model) -> None:
    """Each step takes time with the square of what a text could be so far. Schemas, which are long but not ambiguous, may have more."""
    constraint = byte_model.grammars.lark('start: s\ns: s s | "a" | s s s')()
    with pytest.raises(GrammarError, match=r"items; max is 500"):
        follow(constraint, byte_model.spelling, "a" * 150)
    long = byte_model.grammars.json_schema({"properties": {f"p{i}": {"type": "null"} for i in range(300)}})()
    assert follow(long, byte_model.spelling, '{"p1": null, "p299": null}') == "" and long.ended


@pytest.mark.parametrize("kind", ["rules", "terminals", "references"])
def test_long_chains_do_not_end_the_process(byte_model: Model, kind: str) -> None:
    """llguidance follows them by recursion, which took more than the stack of a thread."""
    n = 10_000
    if kind == "references":
        chain = {f"s{i}": {"$ref": f"#/$defs/s{i + 1}"} for i in range(n)} | {f"s{n}": {"const": "a"}}
        new = byte_model.grammars.json_schema({"$ref": "#/$defs/s0", "$defs": chain})
        assert follow(new(), byte_model.spelling, '"a"') == ""
    else:
        name = {"rules": "s", "terminals": "S"}[kind]
        rules = "\n".join(f'{name}{i}: "a" {name}{i + 1}' for i in range(n))
        new = byte_model.grammars.lark(f'start: {name}0\n{rules}\n{name}{n}: "b"')
        assert follow(new(), byte_model.spelling, "aaab") == "b"


def _multiples(number: int) -> dict[str, Any]:
    """A short schema that takes some hundred bytes for each of the numbers up to this one."""
    return {"type": "integer", "multipleOf": number}


def test_what_compiled_grammars_take_is_bounded(byte_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_KEPT_BYTES", 3 << 20)
    grammars = Grammars(byte_model.tokenizer, 300, [END])
    used: list[Any] = []
    for number in (8009, 8011, 8017):
        used.append(grammars.json_schema(_multiples(number)))
        assert sum(one.bytes for one in grammars._compiled.values()) <= 3 << 20
        assert follow(used[-1](), byte_model.spelling, str(3 * number)) == "", "what is not kept is used all the same"
    assert all(one.bytes > 1 << 20 for one in grammars._all) and len(grammars._all) == 3
    monkeypatch.setattr(structured, "_ALL_BYTES", sum(one.bytes for one in grammars._all))
    with pytest.raises(QueueFullError, match="Try again later, or use a simpler one"):
        grammars.json_schema(_multiples(8039))
    used.clear()
    assert grammars.json_schema(_multiples(8039))().allowed().any(), "those that nobody uses any more do not count"


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"type": "string", "pattern": f"a.{{{n}}}b"} for n in range(5, 40)]},
        {"type": "object", "properties": {f"p{n}": _multiples(999_983 - 2 * n) for n in range(20)}},
    ],
)
def test_a_short_schema_that_takes_long_to_compile_is_refused(
    byte_model: Model, monkeypatch: pytest.MonkeyPatch, schema: Any
) -> None:
    """The first took more than minutes and all memory, and nothing could end it."""
    monkeypatch.setattr(grammar_check, "SECONDS", 0.2)
    for _ in range(2):  # the second is known
        with pytest.raises(
            InputError, match=r"the JSON schema cannot be used: it is too complex: .* more than 0.2 s\. Use "
        ):
            byte_model.grammars.json_schema(schema)
    assert byte_model.grammars.choice(["the next"])().allowed().any()
    with pytest.raises(InputError, match="the grammar cannot be used: it is too complex"):
        byte_model.grammars.lark(f"start: %json {json.dumps(schema)}")


def test_a_grammar_that_takes_much_memory_is_refused(byte_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MEMORY", -(112 << 20))  # less than what a thread is allowed for itself
    with pytest.raises(InputError, match=r"it is too complex: compiling it takes more than .* MiB of memory"):
        byte_model.grammars.json_schema(_multiples(80_021))


def test_the_process_that_tries_grammars_starts_again_and_can_be_interrupted(
    byte_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = grammar_check.checker
    assert byte_model.grammars.choice(["before"])().allowed().any() and checker._process is not None
    checker._process.kill()
    checker._process.wait()
    assert byte_model.grammars.choice(["after"])().allowed().any()
    monkeypatch.setattr(grammar_check, "SECONDS", 60)
    failed: list[QueueFullError] = []

    def compile() -> None:
        try:
            byte_model.grammars.json_schema(_multiples(999_961))
        except QueueFullError as error:
            failed.append(error)

    thread = threading.Thread(target=compile)
    thread.start()
    while not checker.lock.locked():
        thread.join(0.01)
    checker.interrupt()
    thread.join(5)
    assert not thread.is_alive() and len(failed) == 1
    assert byte_model.grammars.choice(["in the end"])().allowed().any()
    monkeypatch.setattr(grammar_check, "_PATIENCE", 0.05)
    with pytest.raises(InputError, match=r"more than 0.05 s on this busy machine"):
        byte_model.grammars.json_schema(_multiples(20_011))
    monkeypatch.undo()
    assert byte_model.grammars.json_schema(_multiples(20_011))().allowed().any(), "only what lasts is remembered"


def test_an_answer_whose_tokens_take_long_gives_up(byte_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "_AT_ONCE", 0.002)
    monkeypatch.setattr(structured, "_PER_TOKEN", 0.00001)
    constraint = byte_model.grammars.lark('start: s\ns: s s | "a" | s s s')()
    with pytest.raises(GrammarError, match=r"its tokens take more than 0.01 ms each to check. Use a simpler one"):
        follow(constraint, byte_model.spelling, "a" * 40)
    monkeypatch.setattr(structured, "_PER_TOKEN", 0.1)
    assert follow(byte_model.grammars.regex("a*")(), byte_model.spelling, "a" * 100) == ""


def test_a_vocabulary_that_does_not_belong_to_the_model_is_refused() -> None:
    tokenizer = Tokenizer(ROOT / "examples" / "tiny-v4" / "tokenizer.json")
    with pytest.raises(InputError, match="the tokenizer has 258 tokens, and the model has logits for 257"):
        Grammars(tokenizer, 257, [1])
    with pytest.raises(InputError, match=r"eos_token_ids are \[300\]; expected ids from 0 to 299"):
        Grammars(tokenizer, 300, [300])


def test_without_llguidance_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(ROOT / "examples" / "tiny-v4" / "tokenizer.json")
    monkeypatch.setattr(packages, "installed", lambda module: module != "llguidance")
    with pytest.raises(
        MissingDependencyError, match=r"`structured output` needs llguidance.*foldkv\[serve\]"
    ) as caught:
        Grammars(tokenizer, 258, [END])
    assert caught.value.packages == ("llguidance",)
