"""What is measured. All of it changes the figures and is in the report."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from .cases import RECORD_BYTES


def prompt_room(distance: int) -> int:
    """Tokens of a value to retrieve at this distance, at most, with its answer."""
    return distance + 24 * 4 + 8


@dataclass(frozen=True)
class Plan:
    """Windows of the text, values to retrieve at distances (bytes) and from long contexts (tokens), and cases of behaviour: of each
    kind, of up to so many tokens, and of the sweep at each of its lengths; 0 for none.

    Raises:
        InputError: a number is out of its range; all such numbers are named.
    """

    seed: int = 0
    texts: int = 6
    text_tokens: int = 384
    distances: tuple[int, ...] = (16, 64, 128, 256, 512)
    cases_per_distance: int = 20
    contexts: tuple[int, ...] = ()
    cases_per_kind: int = 8
    case_tokens: int = 256
    sweep_cases: int = 1

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value!r}, expected an integer of {least} or more"
            for name, value, least in (
                ("seed", self.seed, 0), ("texts", self.texts, 1), ("text_tokens", self.text_tokens, 2),
                ("cases_per_distance", self.cases_per_distance, 1), ("cases_per_kind", self.cases_per_kind, 0),
                ("case_tokens", self.case_tokens, 1), ("sweep_cases", self.sweep_cases, 0),
            )
            if type(value) is not int or value < least
        ]  # fmt: skip
        step = RECORD_BYTES
        if not self.distances or any(type(d) is not int or d < step or d % step for d in self.distances):
            wrong.append(f"distances are {list(self.distances)}, expected at least one, all multiples of {step}")
        if wrong:
            raise InputError(f"this cannot be measured: {'; '.join(wrong)}.")

    def longest(self, prefix: int = 0) -> int:
        """Tokens of the longest case, with room for its answer; a tokenizer puts ``prefix`` special tokens before every text.

        The numbers of tokens in the plan count those. A stream whose length follows from a distance comes after them.
        """
        behaviour = self.case_tokens + 8 if self.cases_per_kind or self.sweep_cases else 0
        return max(self.text_tokens, prefix + prompt_room(max(self.distances)), behaviour)

    def options(self) -> list[str]:
        """The same as options of ``foldkv validate``, with defaults, because another version may have other defaults."""
        words = ["--seed", str(self.seed), "--texts", str(self.texts), "--text-tokens", str(self.text_tokens)]
        words += [word for distance in self.distances for word in ("--distance", str(distance))]
        words += ["--cases-per-distance", str(self.cases_per_distance), "--cases-per-kind", str(self.cases_per_kind)]
        words += ["--case-tokens", str(self.case_tokens), "--sweep-cases", str(self.sweep_cases)]
        return words + [word for context in self.contexts for word in ("--context", str(context))]
