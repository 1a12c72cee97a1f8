"""Text to token ids and back, as transformers does it, at once or token by token.

Reads the ``tokenizer.json`` of a bundle with the ``tokenizers`` library. The export wrote it in the form that
``AutoTokenizer`` gives it, so transformers is not needed here.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, InputError, short
from ..packages import installed, lacks
from .bundle import Bundle, load_bundle
from .detokenizer import TextStream


class Tokenizer:
    """A tokenizer read from a ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ArtifactError: the file is missing or is not a tokenizer.
            MissingDependencyError: the package tokenizers is not installed.
        """
        if not installed("tokenizers"):
            raise lacks("text", ["tokenizers"])
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            # transformers truncates and pads only if a call asks for it, whatever the file says.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare exceptions
            raise ArtifactError(
                f"{path} is not a tokenizer.json that can be read: {error}. Make the bundle again."
            ) from None
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._added = frozenset(token.content for token in added)
        self._special = frozenset(token.content for token in added if token.special)
        # A second tokenizer, without the tokens that it names, made where it is needed.
        self._plain: tuple[frozenset[str], Any] | None = None

    @classmethod
    def from_bundle(cls, bundle: Bundle | Path) -> Tokenizer:
        """The tokenizer of a bundle, which is open or a folder.

        Raises:
            ArtifactError: the bundle has none, or cannot be read.
        """
        if not isinstance(bundle, Bundle):
            bundle = load_bundle(Path(bundle))
        if bundle.tokenizer is None:
            raise ArtifactError(
                f"{bundle.folder} has no tokenizer.json, so it takes only token ids. "
                "Put the tokenizer.json beside the checkpoint's weights and make the bundle again."
            )
        return cls(bundle.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of known tokens, including special ones."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``."""
        return str(self._tokenizer.to_str())

    @property
    def decoder(self) -> Any:
        """The decoder of the library, or None."""
        return self._tokenizer.decoder

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that :meth:`encode` puts before every text; often the one that begins a sequence, or none."""
        text = self._tokenizer.encode("a")
        return tuple(text.ids[: (*text.special_tokens_mask, 0).index(0)])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, as ``AutoTokenizer.from_pretrained(checkpoint)(text)`` gives them.

        Special tokens that are spelled out in the text are recognised. ``add_special_tokens=False`` leaves out those that the
        tokenizer puts around every text, such as the one that begins a sequence.

        Raises:
            InputError: ``text`` is not text, or contains a surrogate, which UTF-8 cannot encode.
        """
        if type(add_special_tokens) is not bool:
            raise InputError(f"add_special_tokens must be True or False, got {add_special_tokens!r}.")
        if not isinstance(text, str):
            raise InputError(f"the text must be a str, got {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text cannot be encoded: {error}. Give valid Unicode text.") from None
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    @property
    def added_tokens(self) -> frozenset[str]:
        """The texts of all tokens that are found in a text before it is cut into others; the special ones are among them."""
        return self._added

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of all special tokens."""
        return self._special

    def encode_literally(self, text: str, tokens: Collection[str]) -> list[int]:
        """The token ids of a text in which these added tokens are ordinary text; nothing is added around it.

        Raises:
            InputError: as :meth:`encode`; or the vocabulary has no other way to write one of these tokens.
        """
        ids, forbidden = (
            self.encode(text, add_special_tokens=False),
            {self._tokenizer.token_to_id(one) for one in tokens},
        )
        if not forbidden.intersection(ids):
            return ids
        ids = self._without(frozenset(tokens)).encode(text, add_special_tokens=False).ids
        if found := forbidden.intersection(ids):
            names = ", ".join(sorted(str(self._tokenizer.id_to_token(token)) for token in found))
            raise InputError(
                f"the text spells out {names}, which this tokenizer cannot write as ordinary text. Remove it."
            )
        return list(ids)

    def _without(self, tokens: frozenset[str]) -> Any:
        """A tokenizer of the library that does not add these tokens."""
        import tokenizers

        if self._plain is None or self._plain[0] != tokens:
            facts = json.loads(self._tokenizer.to_str())
            facts["added_tokens"] = [one for one in facts["added_tokens"] if one["content"] not in tokens]
            self._plain = tokens, tokenizers.Tokenizer.from_str(json.dumps(facts))
        return self._plain[1]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; unknown ids give no text.

        Raises:
            InputError: an id is not an integer of 0 or more.
        """
        return str(self._tokenizer.decode(_ids(tokens), skip_special_tokens=skip_special_tokens))

    def token_text(self, token: int, *, skip_special_tokens: bool = False) -> str | None:
        """A token as the vocabulary spells it; None for an unknown id, and for a skipped special token.

        Raises:
            InputError: ``token`` is not an integer of 0 or more.
        """
        # This is called for every token of a text, so a plain id is not checked further.
        known = token if type(token) is int and 0 <= token < 1 << 32 else _ids((token,))[0]
        text: str | None = self._tokenizer.id_to_token(known)
        return None if skip_special_tokens and text in self._special else text

    def stream(self, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder for one sequence of tokens that arrive one by one; the pieces together equal :meth:`decode` of all tokens.

        ``prompt`` is tokens that come before. The pieces are then what the tokens add to the prompt's text, including a leading
        space.
        """
        return TextStream(self, skip_special_tokens=skip_special_tokens, prompt=prompt)


def _ids(tokens: Sequence[int]) -> list[int]:
    """Token ids as the library takes them."""
    try:
        given = list(tokens)
        ids = [-1 if isinstance(token, bool) else operator.index(token) for token in given]
    except TypeError:
        ids = [-1]
    if not all(0 <= known < 1 << 32 for known in ids):
        raise InputError(f"token ids must be integers of 0 or more, got {short(tokens)}.")
    return ids
