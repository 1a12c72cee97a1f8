"""What tests of whole validations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from damage import answered_once

from foldkv.validation.runners import OracleRunner, TransformersRunner

_REMEMBERED = [
    (runner, name, answered_once(getattr(runner, name)))
    for runner in (TransformersRunner, OracleRunner)
    for name in ("logits", "read")
    if hasattr(runner, name)
]


@pytest.fixture(scope="module")
def one_answer() -> Iterator[None]:
    """Let a reference answer a question once in a run: its answers follow from the checkpoint, the tokens and the choices alone."""
    with pytest.MonkeyPatch.context() as patch:
        for runner, name, remembering in _REMEMBERED:
            patch.setattr(runner, name, remembering)
        yield
