"""What a server answers with: an engine, and what clients are told of its model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from time import time
from typing import TYPE_CHECKING

from ..chat import ChatFormat
from ..serving.engine import Engine
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..serving.prefixes import PrefixIndex
    from ..serving.structured import Grammars


@dataclass(frozen=True)
class Service:
    """A model that is served.

    Attributes:
        engine: runs the requests.
        tokenizer: of the model.
        name: of the model, for clients.
        context: tokens that a prompt and its answer can have together.
        slots: sequences that run at once.
        chat: how the model reads conversations; None if nobody knows.
        no_chat: why not.
        timeout: seconds that a request may take from its arrival, with all of its prompts; None for any.
        prefixes: states that prompts may begin with.
        free_grammars: clients may write grammars by hand, and not only schemas, patterns and choices.
        exact: take only states that have the bits of a run without any; otherwise also those after prompts and answers.
        created: when the server began, in seconds since 1970.
    """

    engine: Engine
    tokenizer: Tokenizer
    name: str
    context: int
    slots: int
    chat: ChatFormat | None = None
    no_chat: str = ""
    timeout: float | None = None
    prefixes: PrefixIndex | None = None
    free_grammars: bool = True
    exact: bool = True
    created: int = field(default_factory=lambda: int(time()))

    @property
    def fingerprint(self) -> str:
        """Names the bundle: two servers with the same one compute the same."""
        return f"fp_{self.engine.model.bundle.digest[:12]}"

    @functools.cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars for the model. The first request that has one makes it.

        Raises:
            ArtifactError: the tokenizer is of a kind that grammars cannot be written for.
            MissingDependencyError: llguidance is not installed.
        """
        from ..serving.structured import Grammars

        model = self.engine.model.bundle.model
        return Grammars(self.tokenizer, model.vocab_size, model.eos_token_ids)
