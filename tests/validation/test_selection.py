"""The choice of entries compared as sets, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from foldkv.validation.selection import Selection, compare_selections, mass_of, settle_ties


def selection(chosen: list[list[int]], weights: np.ndarray) -> Selection:
    return Selection(np.array(chosen), mass_of(weights), np.zeros(len(chosen), bool))


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


def test_ties_at_the_last_place_go_to_what_the_subject_chose_and_a_worse_entry_never_does() -> None:
    none = -np.inf
    scores = np.array(
        [
            [3.0, 0.0, 0.0, 0.0, -1.0],  # entry 0 and one of three zeros
            [0.0, 0.0, 0.0, 0.0, none],  # two of four; the subject takes an entry that is not there
            [4.0, 3.0, 2.0, 1.0, 0.0],  # no tie: the subject's worse choice changes nothing
            [5.0, none, none, none, none],  # fewer entries than places
            [1.0, 1.0, 0.0, 0.0, 0.0],  # equal scores, but none of them was left out
        ]
    )
    own = np.array([[0, 1], [0, 1], [0, 1], [0, -1], [0, 1]])
    wanted = np.array([[4, 3], [3, 4], [2, 3], [1, 2], [1, 0]])
    chosen, tied = settle_ties(scores, own, wanted)
    assert [set(row) for row in chosen.tolist()] == [{0, 3}, {3, 0}, {0, 1}, {0, -1}, {0, 1}]
    assert tied.tolist() == [True, True, False, False, False]


def test_settled_choices_have_the_scores_of_a_sort() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, (200, 12)).astype(np.float32)
    own = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    wanted = np.argsort(rng.random(scores.shape), axis=1)[:, :7]
    chosen, tied = settle_ties(scores, own, wanted)
    assert 0 < tied.sum() < 200 and all(len(set(row)) == 5 for row in chosen.tolist())
    values = np.sort(np.take_along_axis(scores, chosen, axis=1), axis=1)
    np.testing.assert_array_equal(values, np.sort(scores, axis=1)[:, -5:])
    # Of all sets with these scores none has more in common with what is wanted.
    last = values[:, :1]
    free = 5 - (scores > last).sum(axis=1)
    at_last = (np.take_along_axis(scores, wanted, axis=1) == last).sum(axis=1)
    taken = (
        (np.take_along_axis(scores, chosen, axis=1) == last) & (chosen[:, :, None] == wanted[:, None]).any(axis=2)
    ).sum(axis=1)
    np.testing.assert_array_equal(taken, np.minimum(at_last, free))
