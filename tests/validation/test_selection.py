"""The choice of entries compared as sets, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from foldkv.validation.selection import Selection, compare_selections


def selection(chosen: list[list[int]], weights: np.ndarray) -> Selection:
    return Selection(np.array(chosen), weights)


def test_overlap_and_recalled_mass_of_queries_that_had_a_choice() -> None:
    # ratio 1, two places: queries 0 and 1 see one and two entries and have no choice.
    weights = np.zeros((2, 4, 4))
    weights[0, 2], weights[1, 2] = [0.1, 0.3, 0, 0], [0.1, 0.1, 0, 0]
    weights[:, 3] = [0, 0, 0.4, 0.1]
    theirs = selection([[0, -1], [1, 0], [0, 1], [3, 2]], weights)
    ours = np.array([[0, -1], [0, -1], [1, 2], [2, 3]])
    (figure,) = compare_selections([{5: theirs}], [{5: ours}], {5: 1})
    assert (figure.layer, figure.queries) == (5, 2)
    assert figure.overlap == pytest.approx((0.5 + 1) / 2) and figure.overlap_least == 0.5
    assert figure.mass_recalled_least == pytest.approx(0.4 / 0.6)
    assert figure.mass_recalled == pytest.approx((0.4 / 0.6 + 1) / 2)


def test_without_a_choice_nothing_is_lost() -> None:
    theirs = selection([[0, -1]], np.ones((1, 1, 1)))
    (figure,) = compare_selections([{0: theirs}], [{0: np.array([[-1, -1]])}], {0: 4})
    assert figure.queries == 0 and figure.overlap == figure.mass_recalled_least == 1
