"""Ranking within users against plain references: one user at a time, every order of equal scores."""

from __future__ import annotations

import math
from itertools import pairwise, permutations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from escm2rec.evaluation.user_ranking import RANKING_METRICS, rank_by_user


def ranked(labels: list[int]) -> dict[str, float]:
    """The metrics of one user's labels in the order of the ranking."""
    positives = sum(labels)

    def dcg(order: list[int], k: int) -> float:
        return sum(label / math.log2(position + 1) for position, label in enumerate(order[:k], start=1))

    values = {"ndcg_at_5": dcg(labels, 5) / dcg([1] * positives, 5)}
    values |= {f"dcg_at_{k}": dcg(labels, k) for k in (2, 4, 6)}
    return values | {f"recall_at_{k}": sum(labels[:k]) / positives for k in (2, 4, 6)}


def slowly(rows: list[tuple[int, int]]) -> dict[str, float]:
    """The mean of `ranked` over every order of one user's (score, label) rows that has falling scores."""
    orders = [order for order in permutations(rows) if all(a[0] >= b[0] for a, b in pairwise(order))]
    found = [ranked([label for _, label in order]) for order in orders]
    return {name: float(np.mean([values[name] for values in found])) for name in found[0]}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=1, max_size=7), max_size=6), st.randoms())
def test_it_is_the_mean_over_users_of_what_a_loop_finds(users: list[list[tuple[int, int]]], random: Random) -> None:
    rows = [(user, score / 7, label) for user, mine in enumerate(users) for score, label in mine]
    random.shuffle(rows)
    found = rank_by_user(*(np.array([row[place] for row in rows]) for place in range(3)))
    with_positive = [slowly(mine) for mine in users if any(label for _, label in mine)]
    assert (found.users_used, found.users_without_positive) == (len(with_positive), len(users) - len(with_positive))
    assert set(found.values) == set(RANKING_METRICS)
    for name, value in found.values.items():
        expected = np.mean([values[name] for values in with_positive]) if with_positive else math.nan
        assert value == pytest.approx(expected, nan_ok=True), name


def test_a_ranking_worked_out_by_hand() -> None:
    """One user, labels 0 1 1 0 0 0 1 by falling score, rows in any order; and one without a positive, which counts nowhere."""
    scores, labels = np.array([9, 8, 7, 6, 5, 4, 3]), np.array([0, 1, 1, 0, 0, 0, 1])
    order = np.array([4, 0, 6, 2, 1, 3, 5])
    found = rank_by_user(np.append(np.full(7, 12), [3, 3]), np.append(scores[order], [1, 2]), np.append(labels[order], [0, 0]))
    second, third = 1 / math.log2(3), 1 / 2
    expected = {
        "ndcg_at_5": (second + third) / (1 + second + third),
        "dcg_at_2": second,
        "dcg_at_4": second + third,
        "dcg_at_6": second + third,
        "recall_at_2": 1 / 3,
        "recall_at_4": 2 / 3,
        "recall_at_6": 2 / 3,
    }
    assert found.values == pytest.approx(expected)
    assert (found.users_used, found.users_without_positive) == (1, 1)


def test_the_order_of_the_rows_is_no_matter() -> None:
    """To the last bit, with many equal scores."""
    rng = np.random.default_rng(3)
    users, scores, labels = rng.integers(0, 300, 5000), rng.integers(0, 4, 5000) / 3, rng.integers(0, 2, 5000)
    expected = rank_by_user(users, scores, labels)
    by_label = np.argsort(-labels)
    assert rank_by_user(users[by_label], scores[by_label], labels[by_label]) == expected
    assert 0.3 < expected.values["ndcg_at_5"] < 0.7, "chance, not the order of the labels"


def test_equal_scores_everywhere_are_chance() -> None:
    found = rank_by_user([0] * 10, np.zeros(10), [1] * 4 + [0] * 6)
    assert found.values["recall_at_4"] == pytest.approx(0.4)
    assert found.values["dcg_at_2"] == pytest.approx(0.4 * (1 + 1 / math.log2(3)))
