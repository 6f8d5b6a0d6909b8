"""Intervals, paired tests and Holm, against figures worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from escm2rec.study.compare import Interval, holm, interval, paired


def test_intervals_are_students() -> None:
    # t(0.975) of 2 degrees of freedom is 4.3027; the standard deviation of 1, 2, 3 is 1.
    found = interval([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.seeds) == (2.0, 3)
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert interval([5.0]) == Interval(5.0, None, None, 1)
    assert interval([]) is None


def test_a_paired_test_is_that_of_the_logs() -> None:
    # Differences of logs are log 2 - 0.1, log 2, log 2 + 0.1: mean log 2, deviation 0.1, t = 12.006.
    others = [1.0, 3.0, 10.0]
    errors = [2 * other * math.exp(shift) for other, shift in zip(others, (-0.1, 0.0, 0.1), strict=True)]
    found = paired(errors, others)
    assert found.ratio == pytest.approx(2)
    assert found.low == pytest.approx(2 * math.exp(-4.3027 * 0.1 / math.sqrt(3)), rel=1e-4)
    assert found.high == pytest.approx(2 * math.exp(4.3027 * 0.1 / math.sqrt(3)), rel=1e-4)
    assert found.effect == pytest.approx(math.log(2) / 0.1)
    assert (found.wins, found.seeds) == (0, 3)
    assert found.p == pytest.approx(2 * stats.t.sf(math.log(2) / 0.1 * math.sqrt(3), 2))


def test_a_paired_test_agrees_with_scipy_and_turns_round() -> None:
    random = np.random.default_rng(0)
    errors, others = np.exp(random.normal(0, 1, (2, 12)))
    found, turned = paired(errors.tolist(), others.tolist()), paired(others.tolist(), errors.tolist())
    assert found.p == pytest.approx(stats.ttest_rel(np.log(errors), np.log(others)).pvalue)
    assert found.p == pytest.approx(turned.p)
    assert found.ratio == pytest.approx(1 / turned.ratio)
    assert found.wins + turned.wins == 12
    assert found.wins == int((errors < others).sum())


def test_the_same_model_twice_is_no_difference() -> None:
    found = paired([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert (found.ratio, found.low, found.high, found.p, found.effect, found.wins) == (1, 1, 1, 1, 0, 0)
    assert paired([0.25, 0.5], [0.5, 1.0]).p == 0


@pytest.mark.parametrize(("errors", "others"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_a_pair_needs_two_seeds(errors: list[float], others: list[float]) -> None:
    said = f"needs the same 2 seeds or more on both sides, got {len(errors)} and {len(others)}"
    with pytest.raises(ValueError, match=said):
        paired(errors, others)


def test_holm_is_that_of_a_known_example() -> None:
    # Wikipedia, "Holm-Bonferroni method": of these, the first and the fourth are rejected at 5%. Values as R's p.adjust gives them.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.5, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(raw <= made <= 1 for raw, made in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    if p_values:
        assert min(adjusted) == min(1, len(p_values) * min(p_values))
        assert max(adjusted) >= max(p_values)
