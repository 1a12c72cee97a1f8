"""What an engine counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What a scheduler did. Whatever a client was given has been counted before, so that no reading misses it.

    Attributes:
        decode_steps: steps of one token of every running sequence.
        chunk_steps: chunks of prompts.
        prompt_tokens: tokens of prompts that were begun.
        cached_tokens: those of them that were not fed.
        new_tokens: tokens of completions.
        looked_up_tokens: tokens of prompts for which a kept state was looked for.
        finished: completions by why they ended.
        seconds: in steps, of which ``model_seconds`` in the model.
    """

    decode_steps: int = 0
    chunk_steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    looked_up_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    model_seconds: float = 0.0
