from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suites.ranking import average_precision, places_of, precision_at, score_ranking

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def reference(golden: Callable[[str], Arrays]) -> Arrays:
    return golden("retrieval_map")


def lists(reference: Arrays, *keys: str) -> list[np.ndarray]:
    """Per query, the numbers under all keys, without the padding of -1."""
    rows = np.concatenate([reference[f"{key}_padded"] for key in keys], axis=1)
    return [row[row >= 0] for row in rows]


SETUPS = {"E": (("easy",), ("junk", "hard")), "M": (("easy", "hard"), ("junk",)), "H": (("hard",), ("junk", "easy"))}


@pytest.mark.parametrize("name", SETUPS)
def test_golden_retrieval_map_of_easy_medium_and_hard(reference: Arrays, name: str) -> None:
    positives, junk = (lists(reference, *keys) for keys in SETUPS[name])
    found = score_ranking(reference["ranks"], positives, junk, reference["kappas"].tolist())
    np.testing.assert_allclose(found.mean_average_precision, reference[f"{name}.map"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.average_precision, reference[f"{name}.aps"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.mean_precision, reference[f"{name}.mpr"], rtol=0, atol=1e-10)
    scored = np.isfinite(reference[f"{name}.aps"])
    np.testing.assert_allclose(found.precision[scored], reference[f"{name}.prs"][scored], rtol=0, atol=1e-10)
    assert found.num_scored == scored.sum() < len(scored)


def test_golden_retrieval_map_without_junk(reference: Arrays) -> None:
    easy = lists(reference, "easy")
    found = score_ranking(reference["ranks"], easy, [[]] * len(easy))
    np.testing.assert_allclose(found.mean_average_precision, reference["easy_nojunkkey.map"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.average_precision, reference["easy_nojunkkey.aps"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("key", ["ap_compute_ap", "ap_copydays_score_ap_from_ranks_1"])
def test_golden_retrieval_map_average_precision(reference: Arrays, key: str) -> None:
    padded = reference["ap_ranks_padded"]
    found = [average_precision(row[row >= 0], int(n)) for row, n in zip(padded, reference["ap_nres"], strict=True)]
    np.testing.assert_allclose(found, reference[key], rtol=0, atol=1e-10)


@given(st.permutations(range(12)), st.integers(0, 6), st.integers(0, 6))
def test_junk_counts_as_if_it_were_not_in_the_list(order: list[int], num_positives: int, num_junk: int) -> None:
    positives, junk = np.arange(num_positives), 6 + np.arange(num_junk)
    left = [image for image in order if image not in junk]
    expected = [place for place, image in enumerate(left) if image in positives]
    assert places_of(np.array(order), positives, junk).tolist() == expected


def test_perfect_and_worst_lists() -> None:
    assert average_precision([0, 1, 2], 3) == pytest.approx(1)
    assert average_precision([], 3) == 0
    assert precision_at([], 5) == 0
    # The last positive is at place 2 of 10 wanted: two of two.
    assert precision_at([0, 1], 10) == 1
    assert precision_at([0, 3], 2) == 0.5


def test_no_query_with_positives_has_no_mean() -> None:
    found = score_ranking(np.array([[0], [1]]), [[]], [[]], [1])
    assert np.isnan(found.mean_average_precision) and np.isnan(found.mean_precision).all() and found.num_scored == 0
