"""Metrics of predicted probabilities, as pure functions of numpy arrays.

Symbols, for B rows: z a logit, p = sigmoid(z) the predicted probability, y in [0, 1] a label (0 or 1, or a known probability),
w > 0 an impression weight (1 when absent), W = sum(w). Everything is computed in float64 from logits, so that nothing saturates.
A metric that does not exist for its rows (no rows, one class only) is NaN; `report` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

NUM_BINS = 15
"""Bins of calibration curves and ECE, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""

Z_95 = 1.959963984540054
"""The 97.5% quantile of the standard normal distribution."""


def as_floats(values: ArrayLike) -> Floats:
    """Any 1-D array as float64."""
    return np.asarray(values, dtype=np.float64)


def softplus(logits: ArrayLike) -> Floats:
    """log(1 + exp(z)), finite for every finite z."""
    return as_floats(np.logaddexp(0.0, as_floats(logits)))


def sigmoid(logits: ArrayLike) -> Floats:
    """p = 1 / (1 + exp(-z)), without overflow."""
    return as_floats(np.exp(-softplus(-as_floats(logits))))


def ctcvr_logits(ctr_logits: ArrayLike, cvr_logits: ArrayLike) -> Floats:
    """Logit of p_ctr p_cvr: -log(exp(-a) + exp(-z) + exp(-a - z)), a the CTR logit, z the CVR logit.

    It follows from 1/p - 1 = (1 + exp(-a))(1 + exp(-z)) - 1, and is finite wherever a and z are.
    """
    a, z = as_floats(ctr_logits), as_floats(cvr_logits)
    return as_floats(-np.logaddexp(np.logaddexp(-a, -z), -a - z))


def mean(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """sum(w v) / sum(w); NaN without rows."""
    values = as_floats(values)
    if values.size == 0:
        return float("nan")
    return float(values.mean() if weights is None else np.average(values, weights=as_floats(weights)))


def log_loss(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean binary cross-entropy in nats: (1/W) sum w [y softplus(-z) + (1-y) softplus(z)]."""
    z, y = as_floats(logits), as_floats(labels)
    return mean(y * softplus(-z) + (1.0 - y) * softplus(z), weights)


def entropy(rates: ArrayLike) -> Floats:
    """Entropy of Bernoulli(t) in nats, 0 at t = 0 and t = 1."""
    t = as_floats(rates)
    inside = np.where((t > 0) & (t < 1), t, 0.5)
    return as_floats(np.where((t > 0) & (t < 1), -inside * np.log(inside) - (1 - inside) * np.log1p(-inside), 0.0))


def normalized_entropy(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Log loss over the entropy of the base rate mean(y): below 1 beats predicting the base rate for everyone.

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014. NaN with one class only.
    """
    base = float(entropy(mean(labels, weights))) if np.size(labels) else 0.0
    return log_loss(logits, labels, weights) / base if base > 0 else float("nan")


def calibration(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """sum(w p) / sum(w y): predicted over observed, 1 is right, above 1 predicts too much. NaN without a positive."""
    observed = mean(labels, weights)
    return mean(sigmoid(logits), weights) / observed if observed > 0 else float("nan")


def calibration_interval(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, quantile: float = Z_95
) -> tuple[float, float]:
    """95% interval of the calibration ratio rho = predicted over expected observed; the upper end may be infinite.

    Let P = sum(w p), O = sum(w y). Suppose the true probabilities are t p, t = 1/rho. The interval holds every rho that the score test
    does not reject, |O - t P| <= quantile sqrt(V(t)), a quadratic in t:
    - equal weights: V(t) = sum w^2 [t p - t^2 p^2], the Poisson-binomial variance of O. For one p in all rows this is Wilson's
      interval (JASA 1927). In particular 1 is inside exactly when |O - P| is within 1.96 standard deviations of a calibrated model.
    - unequal weights (down-sampled negatives, whose weight depends on the label): V(t) = sum w^2 (y - t p)^2, the empirical variance.
    Rows count as independent given p; rows of one user are not quite, so true intervals are somewhat wider. (NaN, NaN) without rows.
    """
    p, y = sigmoid(logits), as_floats(labels)
    if p.size == 0:
        return float("nan"), float("nan")
    w = np.ones_like(p) if weights is None else as_floats(weights)
    predicted, observed, squares = float(w @ p), float(w @ y), w * w
    if observed == 0 or np.ptp(w) == 0:
        constant, linear, quadratic = 0.0, float(squares @ p), -float(squares @ (p * p))
    else:
        constant, linear, quadratic = float(squares @ (y * y)), -2 * float(squares @ (y * p)), float(squares @ (p * p))
    # (O - t P)^2 <= quantile^2 V(t), that is a t^2 - b t + c <= 0. It holds at t = O / P, so the roots are real but for rounding.
    a = predicted**2 - quantile**2 * quadratic
    b = 2 * observed * predicted + quantile**2 * linear
    c = observed**2 - quantile**2 * constant
    if a <= 0:  # so few rows that no ratio is rejected
        return 0.0, float("inf")
    larger = (b + max(b * b - 4 * a * c, 0.0) ** 0.5) / (2 * a)
    smaller = c / (a * larger) if larger > 0 else 0.0  # by the product of the roots: no cancellation
    return 1 / larger if larger > 0 else 0.0, 1 / smaller if smaller > 0 else float("inf")


def kl(truth: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean KL(Bernoulli(t) || Bernoulli(p)) in nats, t the true probability: the log loss in excess of the best possible."""
    excess = as_floats(truth) * softplus(-as_floats(logits)) + (1 - as_floats(truth)) * softplus(logits) - entropy(truth)
    return mean(np.maximum(excess, 0.0), weights)  # below 0 only by rounding


def rmse(truth: ArrayLike, logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """sqrt((1/W) sum w (p - t)^2), t the true probability."""
    return float(np.sqrt(mean((sigmoid(logits) - as_floats(truth)) ** 2, weights)))


class CalibrationBins(NamedTuple):
    """Predicted and observed rates in bins of equal weight, by rising prediction; arrays of one length, empty bins left out."""

    impressions: NDArray[np.int64]
    weight: Floats
    predicted: Floats  # mean p
    observed: Floats  # mean y
    observed_low: Floats  # 95% interval of the observed rate
    observed_high: Floats


@dataclass(frozen=True)
class Ranking:
    """Rows added up by distinct score, highest first: all that AUC, KS, ROC and calibration curves need, from one sort.

    For the g-th score: `positives` sum(w y), `negatives` sum(w (1-y)), the same with w^2 in `*_squares`, and `impressions`, the rows.
    `self_pairs` is sum(w^2 y (1-y)) over rows: 0 for 0/1 labels.
    """

    scores: Floats
    positives: Floats
    negatives: Floats
    positive_squares: Floats
    negative_squares: Floats
    impressions: NDArray[np.int64]
    self_pairs: float

    @classmethod
    def of(cls, scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> Ranking:
        """Sort and add up, O(B log B)."""
        s, y = as_floats(scores), as_floats(labels)
        if s.size == 0:
            none = np.zeros(0)
            return cls(none, none, none, none, none, np.zeros(0, np.int64), 0.0)
        order = np.argsort(-s)
        s, y = s[order], y[order]
        starts = np.flatnonzero(np.concatenate(([True], s[1:] != s[:-1])))
        impressions = np.diff(np.append(starts, s.size)).astype(np.int64)

        def add(values: Floats) -> Floats:
            return as_floats(np.add.reduceat(values, starts))

        if weights is None:
            positives, negatives = add(y), add(1 - y)
            return cls(s[starts], positives, negatives, positives, negatives, impressions, float((y * (1 - y)).sum()))
        w = as_floats(weights)[order]
        w2 = w * w
        sums = (add(w * y), add(w * (1 - y)), add(w2 * y), add(w2 * (1 - y)))
        return cls(s[starts], *sums, impressions, float((w2 * y * (1 - y)).sum()))

    def auc(self) -> float:
        """See `auc`."""
        num_positives, num_negatives = self.positives.sum(), self.negatives.sum()
        pairs = num_positives * num_negatives - self.self_pairs
        if pairs <= 1e-12 * num_positives * num_negatives:
            return float("nan")
        below = num_negatives - np.cumsum(self.negatives)  # negatives with a lower score
        return float((self.positives @ (below + self.negatives / 2) - self.self_pairs / 2) / pairs)

    def _rates(self) -> tuple[Floats, Floats]:
        """False and true positive rates at every threshold, from (0, 0) to (1, 1)."""
        false, true = np.cumsum(self.negatives), np.cumsum(self.positives)
        return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])

    def has_both_classes(self) -> bool:
        """Whether there is a positive and a negative."""
        return bool(self.positives.sum() > 0 and self.negatives.sum() > 0)

    def ks(self) -> float:
        """See `ks`."""
        if not self.has_both_classes():
            return float("nan")
        false, true = self._rates()
        return float(np.abs(true - false).max())

    def roc(self, max_points: int = 200) -> tuple[Floats, Floats]:
        """False and true positive rates, at most `max_points` of them, evenly along the curve; empty with one class only."""
        if not self.has_both_classes():
            return np.zeros(0), np.zeros(0)
        false, true = self._rates()
        if false.size > max_points:
            kept = np.unique(np.searchsorted((false + true) / 2, np.linspace(0, 1, max_points)).clip(0, false.size - 1))
            kept[-1] = false.size - 1
            false, true = false[kept], true[kept]
        return false, true

    def bins(self, num_bins: int = NUM_BINS) -> CalibrationBins:
        """Calibration curve of logits in `num_bins` bins of equal weight; equal logits share a bin, so the order of rows is no matter.

        The interval is Wilson's, with the number of impressions that would give the weighted rate its variance,
        sum w^2 (y - mean y)^2 / W^2: without weights that is the count itself.
        """
        weight = self.positives + self.negatives
        middle = np.cumsum(weight) - weight / 2
        bin_of = np.minimum((middle / max(weight.sum(), 1e-300) * num_bins).astype(np.int64), num_bins - 1)

        def add(values: NDArray[Any]) -> Floats:
            return as_floats(np.bincount(bin_of, weights=values, minlength=num_bins))[::-1]

        impressions, total = add(self.impressions), add(weight)
        used = impressions > 0
        impressions, total = impressions[used], total[used]
        observed = add(self.positives)[used] / total
        positive_squares, negative_squares = add(self.positive_squares)[used], add(self.negative_squares)[used]
        variance = (positive_squares * (1 - observed) ** 2 + negative_squares * observed**2) / total**2
        binomial = observed * (1 - observed)
        # One class only: as many impressions as the other class, weighted as it is elsewhere, would have needed.
        effective = total / np.where(observed > 0, self._mean_weight(positive=False), self._mean_weight(positive=True))
        effective = np.divide(binomial, variance, out=effective, where=(binomial > 0) & (variance > 0))
        low, high = wilson_interval(observed, effective)
        predicted = add(sigmoid(self.scores) * weight)[used] / total
        return CalibrationBins(impressions.astype(np.int64), total, predicted, observed, low, high)

    def _mean_weight(self, positive: bool) -> float:
        """sum(w^2) / sum(w) of one class, or of both where that class is empty."""
        squares, sums = (self.positive_squares, self.positives) if positive else (self.negative_squares, self.negatives)
        if sums.sum() <= 0:
            squares, sums = self.positive_squares + self.negative_squares, self.positives + self.negatives
        return float(squares.sum() / sums.sum()) if sums.size else 1.0

    def ece(self, num_bins: int = NUM_BINS) -> float:
        """See `ece`."""
        curve = self.bins(num_bins)
        return mean(np.abs(curve.predicted - curve.observed), curve.weight)


def auc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Probability that a positive scores above a negative, ties counting a half; exact with ties and weights.

    sum_{i != j} w_i w_j y_i (1-y_j) ([s_i > s_j] + [s_i = s_j] / 2) / sum_{i != j} w_i w_j y_i (1-y_j).
    Labels may be known probabilities: a row then counts y as a positive and 1-y as a negative, and the value is the expected number of
    rightly ordered pairs over that of all pairs. For 0/1 labels it is the Mann-Whitney statistic. NaN with one class only.
    """
    return Ranking.of(scores, labels, weights).auc()


def ks(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Kolmogorov-Smirnov: largest |TPR - FPR| over thresholds, 0 no separation, 1 perfect. NaN with one class only."""
    return Ranking.of(scores, labels, weights).ks()


def ece(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: sum_b (W_b / W) |mean_b p - mean_b y| over bins of equal weight.

    Source: Naeini et al., AAAI 2015, with equal-mass bins (Nguyen & O'Connor, EMNLP 2015). NaN without rows.
    """
    return Ranking.of(logits, labels, weights).ece(num_bins)


def wilson_interval(rates: ArrayLike, counts: ArrayLike, quantile: float = Z_95) -> tuple[Floats, Floats]:
    """Wilson's 95% interval of binomial rates observed on `counts` trials (JASA 1927)."""
    rate, n = as_floats(rates), as_floats(counts)
    spread = quantile**2 / n
    centre = (rate + spread / 2) / (1 + spread)
    half = quantile * np.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return as_floats(np.where(rate > 0, centre - half, 0.0)), as_floats(np.where(rate < 1, centre + half, 1.0))
