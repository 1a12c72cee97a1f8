"""What an answer must keep to: which tokens may come next, one token after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The rules for one answer. It has a state, so each answer needs its own."""

    def allowed(self) -> NDArray[np.bool_]:
        """The tokens that may come next, [V]. At least one is True. The array is the caller's."""

    def took(self, token: int) -> None:
        """``token`` came next.

        Raises:
            InputError: it was not allowed.
        """

    @property
    def ended(self) -> bool:
        """Whether nothing more may follow: the model ended the answer, or the answer is complete and cannot go on."""


#: Makes a constraint for each answer of a request. It is cheap, and may be called on any thread.
NewConstraint = Callable[[], Constraint]
