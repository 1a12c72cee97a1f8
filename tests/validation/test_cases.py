"""Windows of text and planted streams begin as a served prompt begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from foldkv.runtime.tokenizer import Tokenizer
from foldkv.validation.cases import text_windows
from foldkv.validation.long_context import measure_depths


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that puts <bos> before and <eos> after every text."""
    library = Library.from_file(str(tiny_checkpoint / "tokenizer.json"))
    library.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(path)


class Memory:
    """Answers every question right, and keeps what it read."""

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> np.ndarray:
        self.tokens, self.tail = list(tokens), list(tail)
        return np.eye(258, dtype=np.float32)[[*tail[1:], 0]]


def test_a_planted_stream_begins_as_a_prompt_does_and_fits_the_context(tokenizer: Tokenizer) -> None:
    memory = Memory()
    figure = measure_depths(memory, None, tokenizer, 1024)
    assert figure.subject == figure.cases == 28
    assert memory.tokens[0] == 256 and not {256, 257} & {*memory.tokens[1:], *memory.tail}
    assert len(memory.tokens) + len(memory.tail) <= 1024


def test_every_window_begins_with_the_tokenizers_prefix_and_keeps_its_length(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("def f(x): return x\n" * 20, add_special_tokens=False)
    windows = text_windows(tokens, 40, 3, seed=0, prefix=tokenizer.prefix)
    assert [len(window) for window in windows] == [40, 40, 40]
    for window in windows:
        assert window[0] == 256 and bytes(window[1:]) in bytes(tokens)
    assert text_windows(tokens[:5], 40, 3, seed=0, prefix=(256,)) == [[256, *tokens[:5]]]
