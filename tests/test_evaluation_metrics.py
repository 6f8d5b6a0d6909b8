"""Metrics against brute force, enumeration and closed forms."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from escm2rec.evaluation import metrics
from escm2rec.evaluation.metrics import Floats, Ranking

EXTREMES = np.array([-80.0, 80.0, -80.0, 80.0, 0.0], dtype=np.float32)

Row = tuple[int, float, float]
tied_rows = st.lists(
    st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.5, 1.0, 3.0])), min_size=2, max_size=12
)


def auc_of_pairs(scores: Floats, labels: Floats, weights: Floats) -> float:
    right = total = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        pair = weights[i] * weights[j] * labels[i] * (1 - labels[j])
        right += pair * (float(scores[i] > scores[j]) + float(scores[i] == scores[j]) / 2)
        total += pair
    return right / total if total else float("nan")


@settings(max_examples=200, deadline=None)
@given(rows=tied_rows)
def test_auc_is_that_of_all_pairs(rows: list[Row]) -> None:
    scores, labels, weights = np.array(rows, dtype=np.float64).T
    np.testing.assert_allclose(metrics.auc(scores, labels, weights), auc_of_pairs(scores, labels, weights), atol=1e-12)
    ones = np.ones_like(weights)
    np.testing.assert_allclose(metrics.auc(scores, labels), auc_of_pairs(scores, labels, ones), atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(rows=tied_rows, seed=st.integers(0, 9))
def test_ranking_metrics_do_not_depend_on_the_order_of_rows(rows: list[Row], seed: int) -> None:
    scores, labels, weights = np.array(rows, dtype=np.float64).T
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    for metric in (metrics.auc, metrics.ks, metrics.ece):
        np.testing.assert_allclose(
            metric(scores, labels, weights), metric(scores[shuffled], labels[shuffled], weights[shuffled]), atol=1e-12
        )


@settings(max_examples=50, deadline=None)
@given(rows=tied_rows)
def test_an_integer_weight_is_that_many_rows(rows: list[Row]) -> None:
    scores, labels, _ = np.array(rows, dtype=np.float64).T
    labels, counts = np.round(labels), np.arange(1, len(rows) + 1)
    repeated = [np.repeat(values, counts) for values in (scores, labels)]
    for metric in (metrics.auc, metrics.ks, metrics.ece, metrics.log_loss, metrics.normalized_entropy, metrics.calibration, metrics.rmse):
        first, second = (labels, scores) if metric is metrics.rmse else (scores, labels)
        alike = repeated[::-1] if metric is metrics.rmse else repeated
        np.testing.assert_allclose(metric(first, second, counts), metric(*alike), atol=1e-12, err_msg=metric.__name__)


def test_auc_against_a_known_truth_is_the_expected_one() -> None:
    """By enumeration of all 2^5 labels: expected rightly ordered pairs over expected pairs."""
    scores, truth = np.array([0.1, 0.1, 0.7, -2.0, 3.0]), np.array([0.2, 0.5, 0.4, 0.1, 0.9])
    right = pairs = 0.0
    for labels in itertools.product([0.0, 1.0], repeat=5):
        y = np.array(labels)
        chance = float(np.prod(np.where(y == 1, truth, 1 - truth)))
        number = y.sum() * (1 - y).sum()
        pairs += chance * number
        right += chance * number * metrics.auc(scores, y) if number else 0.0
    assert metrics.auc(scores, truth) == pytest.approx(right / pairs, abs=1e-14)


def test_auc_and_ks_of_known_distributions() -> None:
    """Uniform scores with P(y=1 | s) = s: AUC = 5/6, KS = max |s^2 - (2s - s^2)| = 1/2 at s = 1/2."""
    score = (np.arange(20000) + 0.5) / 20000
    assert metrics.auc(score, score) == pytest.approx(5 / 6, abs=1e-4)
    assert metrics.ks(score, score) == pytest.approx(0.5, abs=1e-4)
    assert metrics.auc([1, 2, 3, 4], [0, 0, 1, 1]) == 1.0
    assert metrics.auc([1, 2, 3, 4], [1, 1, 0, 0]) == 0.0
    assert metrics.auc([7, 7, 7, 7], [1, 0, 1, 0]) == 0.5


def test_roc_is_short_monotone_and_keeps_the_area() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=50_000)
    labels = (random.random(50_000) < metrics.sigmoid(scores - 2)).astype(float)
    false, true = Ranking.of(scores, labels).roc(200)
    assert 150 < len(false) <= 200
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()
    assert np.trapezoid(true, false) == pytest.approx(metrics.auc(scores, labels), abs=1e-3)
    whole = Ranking.of([1, 2, 3], [0, 1, 1]).roc(200)
    assert [list(axis) for axis in whole] == [[0, 0, 0, 1], [0, 0.5, 1, 1]]


def test_log_loss_and_entropy_of_closed_forms() -> None:
    logit = np.log(0.2 / 0.8)
    labels = np.array([1.0, 0, 0, 0, 0])
    entropy = -0.2 * np.log(0.2) - 0.8 * np.log(0.8)
    assert metrics.log_loss(np.full(5, logit), labels) == pytest.approx(entropy)
    assert metrics.normalized_entropy(np.full(5, logit), labels) == pytest.approx(1)
    assert metrics.normalized_entropy(np.full(5, 0.0), labels) == pytest.approx(np.log(2) / entropy)
    assert metrics.log_loss([-3.0, 2.0], [1, 0], [1, 3]) == pytest.approx((np.log1p(np.exp(3)) + 3 * np.log1p(np.exp(2))) / 4)
    assert metrics.entropy([0.0, 1.0, 0.5]) == pytest.approx([0, 0, np.log(2)])


def test_ctcvr_logit_is_that_of_the_product() -> None:
    ctr, cvr = np.meshgrid(np.linspace(-8, 8, 33), np.linspace(-8, 8, 33))
    product = metrics.sigmoid(ctr) * metrics.sigmoid(cvr)
    np.testing.assert_allclose(metrics.ctcvr_logits(ctr, cvr), np.log(product) - np.log1p(-product), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(metrics.ctcvr_logits([80, -80, 80], [80, -80, -80]), [80 - np.log(2), -160, -80])


@pytest.mark.parametrize("labels", [np.array([1, 0, 0, 1, 1]), np.array([0.0, 1.0, 0.3, 1.0, 0.0])])
def test_logits_of_80_stay_finite(labels: Floats) -> None:
    pair = (EXTREMES, labels)
    values = [metrics.log_loss(*pair), metrics.normalized_entropy(*pair), metrics.calibration(*pair), metrics.ece(*pair), metrics.ks(*pair)]
    values += [metrics.auc(*pair), metrics.kl(labels, EXTREMES), metrics.rmse(labels, EXTREMES), *metrics.calibration_interval(*pair)]
    values += [*metrics.ctcvr_logits(EXTREMES, EXTREMES[::-1]), *metrics.sigmoid(EXTREMES)]
    assert np.isfinite(values).all()


def test_kl_is_zero_at_the_truth_and_the_excess_log_loss_elsewhere() -> None:
    truth, logits = np.array([0.01, 0.3, 0.999, 0.0, 1.0]), np.array([-2.0, 0.5, 3.0, -1.0, 4.0])
    assert metrics.kl(truth[:3], np.log(truth[:3] / (1 - truth[:3]))) == pytest.approx(0, abs=1e-15)
    p = metrics.sigmoid(logits)
    parts = [np.log(t / q) * t if t else 0 for t, q in zip(truth, p, strict=True)]
    parts += [np.log((1 - t) / (1 - q)) * (1 - t) if t < 1 else 0 for t, q in zip(truth, p, strict=True)]
    assert metrics.kl(truth, logits) == pytest.approx(sum(parts) / 5)
    assert metrics.rmse([0.5, 0.5], [0.0, np.log(3)], [3, 1]) == pytest.approx(0.125)


def test_calibration_bins_have_equal_weight_and_keep_ties_together() -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=3000)
    labels = (random.random(3000) < metrics.sigmoid(logits)).astype(float)
    bins = Ranking.of(logits, labels).bins(15)
    assert list(bins.impressions) == [200] * 15
    assert (np.diff(bins.predicted) > 0).all()
    assert bins.observed @ bins.weight == pytest.approx(labels.sum())
    assert (bins.observed_low <= bins.observed).all()
    assert (bins.observed <= bins.observed_high).all()
    first = np.argsort(logits)[:200]
    low, high = metrics.wilson_interval(labels[first].mean(), 200)
    assert (bins.observed_low[0], bins.observed_high[0]) == pytest.approx((float(low), float(high)))
    assert list(Ranking.of(np.zeros(30), np.ones(30)).bins(15).impressions) == [30]
    assert metrics.ece([0.0] * 4, [1, 0, 1, 1]) == pytest.approx(0.25)


def test_bin_intervals_of_down_sampled_negatives_are_those_of_their_variance() -> None:
    """Positives of weight 1, negatives of weight 10: Var = [k (1-m)^2 + 100 n m^2] / W^2; with no positive, Wilson's with n = W."""
    logits, labels = np.zeros(200), np.repeat([1.0, 0.0], [100, 100])
    weights = np.where(labels > 0, 1.0, 10.0)
    bins = Ranking.of(logits, labels, weights).bins(1)
    mean = 100 / 1100
    variance = (100 * (1 - mean) ** 2 + 100 * 100 * mean**2) / 1100**2
    assert bins.observed[0] == pytest.approx(mean)
    assert bins.observed_high[0] - bins.observed_low[0] == pytest.approx(2 * metrics.Z_95 * variance**0.5, rel=0.02)
    separate = Ranking.of(labels, labels, weights).bins(2)
    assert separate.observed_high[0] == pytest.approx(float(metrics.wilson_interval(0.0, 1000.0)[1]))
    assert separate.observed_low[0] == 0


@pytest.mark.parametrize(("positives", "rows", "p"), [(3, 1000, 0.01), (500, 1000, 0.4), (0, 100, 0.1), (1, 10, 0.9)])
def test_calibration_interval_of_one_probability_is_wilsons(positives: int, rows: int, p: float) -> None:
    labels = np.arange(rows) < positives
    low, high = metrics.calibration_interval(np.full(rows, np.log(p / (1 - p))), labels)
    rate_low, rate_high = metrics.wilson_interval(positives / rows, rows)
    assert low == pytest.approx(p / float(rate_high))
    assert high == (pytest.approx(p / float(rate_low)) if positives else float("inf"))


def test_calibration_interval_holds_one_exactly_when_the_count_is_within_the_poisson_binomial_spread() -> None:
    random = np.random.default_rng(2)
    seen = set()
    for _ in range(300):
        logits = random.normal(-2, 1, size=200)
        p = metrics.sigmoid(logits)
        labels = (random.random(200) < p * random.uniform(0.6, 1.4)).astype(float)
        low, high = metrics.calibration_interval(logits, labels)
        inside = abs(labels.sum() - p.sum()) <= metrics.Z_95 * (p * (1 - p)).sum() ** 0.5
        assert (low <= 1 <= high) == inside
        assert low <= metrics.calibration(logits, labels) <= high
        seen.add(inside)
    assert seen == {True, False}


@pytest.mark.parametrize("keep_rate", [1.0, 0.05])
def test_calibration_interval_covers_a_calibrated_model_19_times_in_20(keep_rate: float) -> None:
    """Also with negatives kept at rate k and weighted by 1/k, where rows are chosen by their label.

    There Var(O - P) = sum over all rows of p (1-p)^2 + (1-p) p^2 / k, and the interval's width is about 2 x 1.96 sd / O.
    """
    random = np.random.default_rng(3)
    held, width, expected = 0, 0.0, 0.0
    for _ in range(600):
        logits = random.normal(-3, 1, size=4000)
        labels = random.random(4000) < metrics.sigmoid(logits)
        kept = labels | (random.random(4000) < keep_rate)
        weights = np.where(labels, 1.0, 1 / keep_rate)[kept] if keep_rate < 1 else None
        low, high = metrics.calibration_interval(logits[kept], labels[kept], weights)
        held += low <= 1 <= high
        width += high - low
        p = metrics.sigmoid(logits)
        expected += 2 * metrics.Z_95 * float((p * (1 - p) ** 2 + (1 - p) * p**2 / keep_rate).sum()) ** 0.5 / labels.sum()
    assert 0.925 <= held / 600 <= 0.975
    assert width == pytest.approx(expected, rel=0.05)


def test_undefined_metrics_are_nan() -> None:
    for metric in (
        metrics.auc,
        metrics.log_loss,
        metrics.normalized_entropy,
        metrics.calibration,
        metrics.ece,
        metrics.ks,
        metrics.kl,
        metrics.rmse,
    ):
        assert np.isnan(metric([], [])), metric.__name__
    assert np.isnan(metrics.calibration_interval([], [])).all()
    for one_class in ([0, 0], [1, 1]):
        assert np.isnan(metrics.auc([1, 2], one_class))
        assert np.isnan(metrics.ks([1, 2], one_class))
        assert np.isnan(metrics.normalized_entropy([1, 2], one_class))
        assert Ranking.of([1, 2], one_class).roc()[0].size == 0
    assert np.isnan(metrics.calibration([1, 2], [0, 0]))
    assert np.isnan(metrics.auc([1.0], [0.3]))


def test_metrics_load_neither_matplotlib_nor_torch() -> None:
    code = "import sys, escm2rec.evaluation.metrics, escm2rec.evaluation.report, escm2rec.evaluation.html; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"matplotlib", "torch"}.isdisjoint(loaded)
