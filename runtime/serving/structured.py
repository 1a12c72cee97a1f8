"""Answers that keep to a grammar: a JSON schema, a regular expression, a choice, or a grammar in Lark's syntax.

The grammars are llguidance's. It says for each step which tokens keep the text inside the grammar, whatever the cut between tokens. A
model can stop where the text is complete, and cannot stop elsewhere.

What is special in the tokenizer (ends of sequences, marks of turns and of calls) is never part of a text that a grammar
describes; a grammar that wants such a token names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import ArtifactError, GrammarError, InputError, QueueFullError, short
from ...packages import require
from ..chat.revisions import MARKS
from ..tokenizer import Tokenizer
from .constraint import NewConstraint
from .grammar_check import TooComplexError, checker
from .grammar_worker import compiled, trim, vocabulary_of, with_deep_stack

#: The largest grammar that is read, in characters: a schema, a pattern, all choices together.
LARGEST_GRAMMAR = 512 * 1024
#: So many compiled grammars are kept for later requests, and at most so many bytes of them.
_KEPT, _KEPT_BYTES = 64, 64 << 20
#: Bytes of all compiled grammars that are kept or in use, at most.
_ALL_BYTES = 512 << 20
#: When a grammar of so many bytes goes, the system gets them back.
_LARGE = 4 << 20
#: So many grammars that were too complex are remembered.
_REFUSED = 256
#: Seconds that a grammar may take while an answer runs: so many, and so many more for each token. llguidance's own limits end a
#: token after some ten milliseconds, which is too long for every token, because all answers wait.
_AT_ONCE, _PER_TOKEN = 1.0, 0.01
#: States of the lexer of one answer, of one to two kilobytes each.
_LEXER_STATES = 1 << 16
#: Items of a row of the parser. A step takes time with their number, and with its square where a grammar is ambiguous, which only
#: those that are written by hand are: with 500 of them 10 ms. An object of a schema has four for each of its properties.
_ITEMS, _ITEMS_OF_FREE = 2000, 500
#: Between the parts of a JSON value. Models that may write any white space sometimes write nothing else.
WHITE_SPACE = r"[ \t\n\r]{1,40}"


class Grammars:
    """Compiles grammars for one model and its tokenizer.

    Each method gives what makes constraints: call it once for each answer. What a grammar compiles to is kept, so that the next
    request with the same one does not wait. All methods may be called on any thread.

    ``after``, where a method has it, is a mark such as ``</think>``: any text may come up to it, and what the grammar describes follows.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """Read the vocabulary; a large one takes seconds.

        Args:
            tokenizer: the bundle's.
            vocab_size: the number of the model's logits, V. Ids that the tokenizer does not have are never allowed.
            eos_token_ids: the tokens with which the model ends an answer.

        Raises:
            InputError: an id is not one of the V.
            ArtifactError: the tokenizer is of a kind whose tokens cannot be told as bytes.
            MissingDependencyError: llguidance is not installed.
        """
        require("structured output")
        if tokenizer.vocab_size > vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and the model has logits for {vocab_size}. Use the tokenizer that "
                "belongs to the model."
            )
        eos = sorted(set(eos_token_ids))
        if eos and not 0 <= eos[0] <= eos[-1] < vocab_size:
            raise InputError(f"eos_token_ids are {short(eos)}; expected ids from 0 to {vocab_size - 1}.")
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, np.array(eos, np.intp)
        # The end of an answer is a token of our own, so that a model may have several ends, or one that the tokenizer lacks.
        self._end = tokenizer.vocab_size
        text, size = _with_end(tokenizer, self._end, eos), max(vocab_size, self._end + 1)
        try:
            self._vocabulary: Any = vocabulary_of(text, size, self._end)
        except ValueError as error:
            raise ArtifactError(
                f"answers of this model cannot be kept to a grammar: its tokenizer.json is of a kind that llguidance does not read: "
                f"{reason(str(error))}."
            ) from None
        self._number = checker.vocabulary(text, size, self._end)
        weakref.finalize(self, checker.forget, self._number)
        #: By the digest of what they were compiled from.
        self._compiled: OrderedDict[bytes, _Compiled] = OrderedDict()
        self._refused: OrderedDict[bytes, str] = OrderedDict()  # why
        #: Those that are kept, and those that requests have.
        self._all: weakref.WeakSet[_Compiled] = weakref.WeakSet()
        self._lock = threading.Lock()

    def json_schema(self, schema: Mapping[str, Any] | str, *, after: str = "") -> NewConstraint:
        """JSON of a schema. Properties come in the schema's order. ``x-guidance`` in it is read as llguidance does.

        Raises:
            InputError: the schema is not valid, or has a keyword that grammars cannot hold an answer to.
        """
        return self._value(f"value: %json {json_rule(schema)}", after, "the JSON schema")

    def json_object(self, *, after: str = "") -> NewConstraint:
        """JSON of any object."""
        return self.json_schema({"type": "object"}, after=after)

    def regex(self, pattern: str, *, after: str = "") -> NewConstraint:
        """A text that a pattern matches as a whole; the syntax is that of Rust's ``regex``.

        Raises:
            InputError: the pattern is not valid, or looks around, which grammars cannot.
        """
        import llguidance

        if not isinstance(pattern, str) or not pattern:
            raise InputError(f"the pattern is {short(pattern)}; expected a regular expression.")
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise InputError(f"the pattern is {short(pattern)}; expected something after the last backslash.")
        _check_text(pattern, "the pattern")
        return self._value(f"value: TEXT\nTEXT: /{llguidance.regex_to_lark(pattern)}/", after, "the pattern")

    def choice(self, choices: Sequence[str], *, after: str = "") -> NewConstraint:
        """One of these texts.

        Raises:
            InputError: there is none, or one is not a text, or is empty.
        """
        if isinstance(choices, str) or not choices or not all(isinstance(one, str) and one for one in choices):
            raise InputError(f"the choices are {short(choices)}; expected a list of texts that are not empty.")
        texts = " | ".join(map(quoted, dict.fromkeys(choices)))
        return self._value(f"value: TEXT\nTEXT: {texts}", after, "the list of choices")

    def lark(self, grammar: str, *, free: bool = True) -> NewConstraint:
        """A text of a grammar in llguidance's variant of Lark's syntax.

        Args:
            grammar: with a rule ``start``.
            free: somebody wrote it as they liked, so that it may be ambiguous and has to keep to a lower limit; False for those of
                :func:`~foldkv.runtime.serving.tool_grammar.tool_grammar`.

        Raises:
            InputError: the grammar is not valid.
        """
        if not isinstance(grammar, str):
            raise InputError(f"the grammar is {short(grammar)}; expected a text in Lark's syntax.")
        return self._compile(grammar, "the grammar", items=_ITEMS_OF_FREE if free else _ITEMS)

    def _value(self, rules: str, after: str, what: str) -> NewConstraint:
        """A grammar whose rules define "value", after any text up to a mark."""
        if not after:
            return self._compile(f"start: value\n{rules}", what)
        token = single_token(self._tokenizer, after)
        before, terminal = text_before(after, after, token, name="BEFORE", content=any_text([after]))
        return self._compile(f"start: {before} value\n{terminal}\n{rules}", what)

    def _compile(self, grammar: str, what: str, *, items: int = _ITEMS) -> NewConstraint:
        _check_text(grammar, what)
        key = hashlib.sha256(f"{items} {grammar}".encode()).digest()
        with self._lock:
            found, too_complex = self._compiled.get(key), self._refused.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
        if too_complex is None and found is None:
            try:
                found = self._made(key, grammar, what, items)
            except TooComplexError as error:
                too_complex = str(error)
                with self._lock:
                    if error.lasting:
                        self._refused[key] = too_complex
                    while len(self._refused) > _REFUSED:
                        self._refused.popitem(last=False)
        if found is None:
            raise InputError(f"{what} cannot be used: {too_complex}.")
        return lambda: _Matching(found, self._vocab_size, self._eos, self._end)

    def _made(self, key: bytes, grammar: str, what: str, items: int) -> _Compiled:
        """A grammar that was not compiled yet.

        Raises:
            TooComplexError: it takes too much time or memory.
            InputError: it is wrong.
            QueueFullError: there is no room for it beside the grammars that are in use.
        """
        with checker.session() as session:
            problem, size = session.grammar(self._number, grammar, items, _LEXER_STATES)
        if problem:
            raise InputError(f"{what} cannot be used: {reason(problem)}.")
        size = max(size, len(grammar))
        with self._lock:
            self._drop(_ALL_BYTES - size)
            if sum(one.bytes for one in self._all) + size > _ALL_BYTES:
                raise QueueFullError(
                    f"the grammars of the requests that run or wait take {sum(one.bytes for one in self._all) >> 20} MiB, and this one takes "
                    f"{size >> 20} MiB; together they may take {_ALL_BYTES >> 20} MiB. Try again later, or use a simpler one."
                )
            made = _Compiled(size)
            self._all.add(made)  # what is being compiled counts
        try:
            made.matcher = with_deep_stack(lambda: compiled(self._vocabulary, grammar, items, _LEXER_STATES))
        except ValueError as error:  # it was close to a limit of llguidance's
            raise InputError(f"{what} cannot be used: {reason(str(error))}.") from None
        with self._lock:
            if size <= _KEPT_BYTES:
                self._compiled[key] = made
            self._drop(_ALL_BYTES)
        return made

    def _drop(self, most: int) -> None:
        """Drop what was kept longest without use until what is kept is within its limits, and all grammars take so many bytes."""
        kept = sum(one.bytes for one in self._compiled.values())
        while self._compiled and (
            len(self._compiled) > _KEPT or kept > _KEPT_BYTES or sum(one.bytes for one in self._all) > most
        ):
            _, dropped = self._compiled.popitem(last=False)
            kept -= dropped.bytes
            del dropped


class _Compiled:
    """A compiled grammar; llguidance's matcher at the start of a text, and the bytes that it takes."""

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.matcher: Any = None

    def __del__(self) -> None:
        """The allocator keeps what is given back in pieces."""
        self.matcher = None
        if self.bytes >= _LARGE:
            trim()


class _Matching:
    """The state of one answer."""

    def __init__(self, grammar: _Compiled, vocab_size: int, eos: NDArray[np.intp], end: int) -> None:
        """``end`` is the token that llguidance knows as the end, and ``eos`` are the model's."""
        self._matcher = grammar.matcher.deep_copy()
        self._grammar = grammar  # of which the copy has a part; it goes after the copy
        self._vocab_size, self._eos, self._end = vocab_size, eos, end
        self._left = _AT_ONCE  # seconds
        self._ends = frozenset(eos.tolist())

    @property
    def ended(self) -> bool:
        """Whether nothing more may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [V]; once ended, the ends of sequence.

        Raises:
            GrammarError: llguidance gave up, because the grammar is too complex or the vocabulary cannot write what must follow; or its
                tokens take too much time.
        """
        if self._left < 0:
            raise GrammarError(
                f"the answer cannot go on within its grammar: its tokens take more than {_PER_TOKEN * 1000:g} ms each to check. Use a "
                "simpler one."
            )
        self._left = min(_AT_ONCE, self._left + _PER_TOKEN)
        with self._timed():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            # The mask is of the end alone then, which would end the answer anywhere.
            raise self._given_up()
        # One bit for each token, the lowest first.
        mask = np.unpackbits(bits, bitorder="little").view(np.bool_)
        complete, allowed = bool(mask[self._end]), mask[: self._vocab_size]
        allowed[self._end :] = False
        allowed[self._eos] = complete
        return allowed

    def took(self, token: int) -> None:
        """``token`` came next.

        Raises:
            InputError: it was not allowed; nothing has changed.
            GrammarError: as for :meth:`allowed`.
        """
        matcher = self._matcher
        if token in self._ends:
            # An end that comes early could be text to llguidance, and one that comes late is nothing to it.
            known, fits = self._end, matcher.is_accepting() and not matcher.is_stopped()
        else:
            known, fits = token, 0 <= token < self._end and matcher.validate_tokens([token]) == 1
        if not fits and not matcher.is_error():
            raise InputError(f"token {token} may not come here: the grammar of the answer does not allow it.")
        with self._timed():
            consumed = matcher.consume_token(known)
        if not consumed:
            raise self._given_up()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        before = time.thread_time()
        yield
        self._left -= time.thread_time() - before

    def _given_up(self) -> GrammarError:
        return GrammarError(
            f"the answer cannot go on within its grammar: {reason(self._matcher.get_error())}. Use a simpler one."
        )


def _check_text(text: str, what: str) -> None:
    if len(text) > LARGEST_GRAMMAR:
        raise InputError(
            f"{what} is too large: {len(text)} characters; at most {LARGEST_GRAMMAR} are read. Use a smaller one."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} cannot be encoded: {error}. Give valid Unicode text.") from None


def any_text(without: Collection[str] = ()) -> str:
    """Lark's expression of a terminal: any text in which none of these texts occurs."""
    if not without:
        return "/(?s:.*)/"
    return f"(/(?s:.*)/ & ~(/(?s:.*)/ ({' | '.join(map(quoted, sorted(without)))}) /(?s:.*)/))"


def quoted(text: str) -> str:
    """A text as Lark's grammars write it. It must not be empty."""
    return json.dumps(text, ensure_ascii=False)


def single_token(tokenizer: Tokenizer, mark: str) -> int | None:
    """The token that a mark is, or None if the tokenizer writes it with ordinary ones."""
    if mark not in tokenizer.added_tokens:
        return None
    ids = tokenizer.encode(mark, add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def written(text: str, mark: str, token: int | None) -> str:
    """A text with a mark in it, as a rule writes it. ``token`` is the mark's; without one the mark is spelled out."""
    if token is None:
        return quoted(text)
    parts = [quoted(part) if part else "" for part in text.split(mark)]
    return f" <[{token}]> ".join(parts).strip()


def text_before(end: str, mark: str, token: int | None, *, name: str, content: str) -> tuple[str, str]:
    """Text of a terminal's expression ``content``, and what ends it: what stands in a rule, and the terminal ``name`` in it.

    ``end`` has a mark in it. As a token it ends the terminal, since it is no text; spelled out it is a part of the terminal, so that
    ``content`` must exclude it.
    """
    if token is None:
        return name, f"{name}: {content} {quoted(end)}"
    head, rest = end.split(mark, 1)
    return f"{name} {written(mark + rest, mark, token)}", f"{name}: {content} {quoted(head) if head else ''}".rstrip()


def json_rule(schema: Mapping[str, Any] | str) -> str:
    """A schema as it stands after ``%json`` in a grammar.

    Raises:
        InputError: it is no JSON, or not a schema.
    """
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(found, Mapping):
            raise InputError(f"the JSON schema is {short(found)}; expected a table such as {{'type': 'object'}}.")
        own = found.get("x-guidance", {})
        if isinstance(own, Mapping) and not own.keys() & {"whitespace_flexible", "whitespace_pattern"}:
            found = {**found, "x-guidance": {"whitespace_pattern": WHITE_SPACE, **own}}
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
        text.encode()  # surrogates are no text
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema cannot be read: {error}.") from None


def _with_end(tokenizer: Tokenizer, end: int, eos: Sequence[int]) -> str:
    """The tokenizer.json for llguidance: with one more token, and with every mark and every end as special ones."""
    facts = json.loads(tokenizer.to_json())
    special = {*MARKS, *(tokenizer.token_text(token) for token in eos)}
    for token in facts["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    facts["added_tokens"].append({"id": end, "content": "<|end of the answer|>", **plain, "special": True})
    return json.dumps(facts)


def reason(message: str) -> str:
    """What llguidance says is wrong, without the places and copies of our grammar."""
    lines = message.split("\n")
    first = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", lines[0])
    first = re.sub(r"^invalid regex .*: regex parse error:$", "it is not a regular expression", first)
    cause = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return re.sub(":+", ":", first + cause.replace("error", "", 1)).rstrip(" .:")[:400]
