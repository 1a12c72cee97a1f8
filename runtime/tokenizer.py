"""Text to token ids and back, also token by token without ever splitting a character.

Reads the ``tokenizer.json`` of a bundle with the ``tokenizers`` library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foldkv.errors import ArtifactError, InputError, MissingDependencyError
from foldkv.runtime.bundle import Bundle

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A tokenizer read from a ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ArtifactError: the file is missing or is not a tokenizer.
            MissingDependencyError: the package tokenizers is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise MissingDependencyError("text needs the package tokenizers: pip install tokenizers") from None
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare exceptions
            raise ArtifactError(
                f"{path} is not a tokenizer.json that can be read: {error}. Make the bundle again."
            ) from None

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Tokenizer:
        """The tokenizer of a bundle.

        Raises:
            ArtifactError: the bundle holds none.
        """
        if bundle.tokenizer is None:
            raise ArtifactError(
                f"{bundle.folder} holds no tokenizer.json, so that it takes token ids only. "
                "Put the tokenizer.json beside the checkpoint's weights and make the bundle again."
            )
        return cls(bundle.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Tokens known, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of a text; special tokens that are spelled out in it are recognised.

        ``add_special_tokens`` adds those that the tokenizer's template puts around every text.

        Raises:
            InputError: ``text`` is not text, or holds a surrogate that UTF-8 cannot carry.
        """
        try:
            text.encode()
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, AttributeError, UnicodeEncodeError) as error:
            raise InputError(f"the text cannot be encoded: {error}. Give valid Unicode text.") from None

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """A decoder for one sequence of tokens that arrive one by one."""
        return TextStream(self, skip_special_tokens=skip_special_tokens)


class TextStream:
    """Text of tokens that arrive one by one; the pieces together are ``decode`` of all tokens.

    A character that is still incomplete is held back until the token that completes it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._context = 0  # tokens at the start of the window that only give context (leading spaces)
        self._sent = 0  # characters of the window's text that were returned already

    def push(self, token: int) -> str:
        """The text that the token makes final; often a word, sometimes nothing."""
        self._window.append(token)
        text = self._text()
        # Of an incomplete character only the last one of the text can still change: all before it is final.
        complete = not text.endswith(_REPLACEMENT)
        final = text if complete else text[:-1]
        piece = final[self._sent :]
        self._sent = max(self._sent, len(final))
        if complete and piece:
            del self._window[: self._context]
            self._context = len(self._window)
            self._sent = len(self._text())
        return piece

    def finish(self) -> str:
        """What is still held back: U+FFFD if the last character never became complete."""
        piece = self._text()[self._sent :]
        self._window, self._context, self._sent = [], 0, 0
        return piece

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
