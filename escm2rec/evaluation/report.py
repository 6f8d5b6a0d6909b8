"""Metrics by population, as one JSON-able record: `report.json`.

A section's name says what is predicted and on whom:

    ctr            clicks, on all impressions
    ctcvr          click and conversion, on all impressions
    cvr_clicked    conversions, on clicked impressions: only there were they observed
    cvr_entire     predicted CVR against the known truth, on all impressions (simulated logs)
    cvr_unclicked  the same, on unclicked impressions
    cvr            conversions, on impressions drawn at random of which each was seen (the test split of rating matrices)

A name without a population is of all impressions, `cvr` too: its rows are a random sample of them with every label observed, so nothing is
selected by clicks, and the clicked CVR is that of the entire space. Such rows say nothing of clicks: `ctr` and `ctcvr` are left out.

CVR is never measured on all impressions with unclicked ones as zeros: that would measure the ranking of CTCVR.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from escm2rec.config import KEPT_PREFIX
from escm2rec.errors import ConfigError, DataError
from escm2rec.evaluation import metrics
from escm2rec.evaluation.metrics import Floats, Ranking
from escm2rec.evaluation.user_ranking import RANKING_METRICS, rank_by_user

REPORT_VERSION = 1
MAX_GROUPS = 1000
"""Groups of one column in a report; the smaller ones are only counted."""
LEAST_PER_CLASS = 10
"""Positives and negatives that a group needs for AUC and KS: with 10 the standard error of an AUC of 0.5 is already 0.09."""
ROC_POINTS = 200
LOGITS = ("ctr_logit", "cvr_logit")
TRUTH_COLUMNS = ("true_propensity", "true_cvr")
OBSERVED = ("ctr", "ctcvr", "cvr_clicked", "cvr")
"""Sections whose labels were observed; a report has the first three, or the last."""

Record = dict[str, Any]


class Population(NamedTuple):
    """What one section of the report measures: `labels` are 0 or 1, or the known truth."""

    section: str
    logits: Floats
    labels: Floats
    weights: Floats | None


@dataclass(frozen=True)
class Rows:
    """Checked columns of B impressions. `conversion` is 0 wherever there is no click, whatever was recorded.

    `at_random` says that they were drawn at random from all impressions, and each was seen.
    """

    click: Floats
    conversion: Floats
    ctr_logit: Floats
    cvr_logit: Floats
    weight: Floats | None
    true_propensity: Floats | None
    true_cvr: Floats | None
    at_random: bool = False

    @classmethod
    def of(cls, predictions: pl.DataFrame, at_random: bool = False) -> Rows:
        """Columns of a predictions table; DataError names the first value that cannot be right."""
        for name in ("click", "conversion", *LOGITS):
            if name not in predictions.columns:
                raise DataError(f"the predictions have no column {name}; they have {', '.join(predictions.columns)}")
        click = _checked(predictions, "click", pl.col("click").is_in([0, 1]), "0 or 1")
        recorded = (pl.col("click") == 0) | pl.col("conversion").is_in([0, 1])
        conversion = _checked(predictions, "conversion", recorded, "0 or 1 where clicked")
        ctr_logit, cvr_logit = (_checked(predictions, name, pl.col(name).is_finite(), "a finite number") for name in LOGITS)
        propensity, cvr = (
            _checked(predictions, name, pl.col(name).is_between(0, 1), "a probability") if name in predictions.columns else None
            for name in TRUTH_COLUMNS
        )
        weight = None
        if "weight" in predictions.columns:
            positive = (pl.col("weight") > 0) & pl.col("weight").is_finite()
            weight = _checked(predictions, "weight", positive, "a finite number above 0")
            weight = None if (weight == 1).all() else weight  # a whole split beside a down-sampled one: nothing is weighted
        return cls(click, np.where(click > 0, conversion, 0.0), ctr_logit, cvr_logit, weight, propensity, cvr, at_random)

    def take(self, rows: slice | np.ndarray[Any, Any]) -> Rows:
        """Some of the rows."""

        def some(column: Floats | None) -> Floats | None:
            return None if column is None else column[rows]

        return Rows(
            click=self.click[rows],
            conversion=self.conversion[rows],
            ctr_logit=self.ctr_logit[rows],
            cvr_logit=self.cvr_logit[rows],
            weight=some(self.weight),
            true_propensity=some(self.true_propensity),
            true_cvr=some(self.true_cvr),
            at_random=self.at_random,
        )

    def observed(self) -> Iterator[Population]:
        """Each population whose labels were observed."""
        if self.at_random:
            yield Population("cvr", self.cvr_logit, self.conversion, self.weight)
            return
        clicked = self.click > 0
        weight = None if self.weight is None else self.weight[clicked]
        yield Population("ctr", self.ctr_logit, self.click, self.weight)
        yield Population("ctcvr", metrics.ctcvr_logits(self.ctr_logit, self.cvr_logit), self.conversion, self.weight)
        yield Population("cvr_clicked", self.cvr_logit[clicked], self.conversion[clicked], weight)

    def known(self) -> Iterator[Population]:
        """Each population to compare with the true CVR; none where it is unknown."""
        if self.true_cvr is None:
            return
        unclicked = self.click == 0
        weight = None if self.weight is None else self.weight[unclicked]
        yield Population("cvr_entire", self.cvr_logit, self.true_cvr, self.weight)
        yield Population("cvr_unclicked", self.cvr_logit[unclicked], self.true_cvr[unclicked], weight)


def build_report(predictions: pl.DataFrame, by: Sequence[str] = (), user: str | None = None, at_random: bool = False) -> Record:
    """Every metric of a model on labelled impressions.

    `predictions` has columns click, conversion (0 or 1), ctr_logit, cvr_logit, and optionally weight, true_propensity, true_cvr and
    kept.<column>. `by` names columns to report by group, `user` the column to rank within; a kept column may be named without its prefix.
    `at_random` is of rows that were drawn at random from all impressions and all seen: their one section is `cvr`.
    Weights multiply every sum (weights of 1 throughout are none); `impressions` and `positives` stay counts of rows. Undefined metrics are
    None, with a reason under `undefined`; an unbounded end of an interval is None. Raises DataError on values that cannot be right,
    ConfigError on unknown columns.
    """
    columns = [resolve_column(predictions, name) for name in by]
    user_column = resolve_column(predictions, user) if user is not None else None
    rows = Rows.of(predictions, at_random)
    report: Record = {
        "version": REPORT_VERSION,
        "impressions": predictions.height,
        "clicks": int(rows.click.sum()),
        "conversions": int(rows.conversion.sum()),
        "weighted": rows.weight is not None,
        "at_random": at_random,
        **_sections(rows, least=1),
        "propensity": {} if at_random else _propensity(rows),
        "curves": _curves(rows),
    }
    if user_column is not None:
        users, name = predictions[user_column], user_column.removeprefix(KEPT_PREFIX)
        populations = _with_users(users, rows)
        report["gauc_per_user"] = {"user": name, **{p.section: gauc(mine, p.logits, p.labels, p.weights) for mine, p in populations}}
        report["ranking_per_user"] = {"user": name, **{p.section: ranking(mine, p) for mine, p in populations}}
    if columns:
        report["groups"] = {column.removeprefix(KEPT_PREFIX): _groups(predictions[column], rows) for column in columns}
    return report


def flat_metrics(report: Record) -> dict[str, float]:
    """Defined metrics as one flat record with their population in the name: `ctr_auc`, `ctcvr_auc`, `cvr_auc_clicked`, `cvr_kl_entire`.

    `cvr_auc` is that of impressions at random. `propensity_*` are of the weights 1 / q, under the names that training logs them by, and
    `balance_*` of the features' balance before and after weighting, where the report has them.
    """
    flat = {}
    for section in (*OBSERVED, "cvr_entire", "cvr_unclicked"):
        task, _, population = section.partition("_")
        ending = f"_{population}" if population else ""
        gauc = report.get("gauc_per_user", {}).get(section, {}).get("auc")
        ranked = report.get("ranking_per_user", {}).get(section, {})
        ranked = {name: ranked.get(name) for name in RANKING_METRICS}
        for name, value in {**report.get(section, {}), "gauc": gauc, **ranked}.items():
            if isinstance(value, int | float):
                flat[f"{task}_{name}{ending}"] = float(value)
    for prefix, part in (("propensity", "weights"), ("balance", "balance")):
        for name, value in report["propensity"].get(part, {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                flat[f"{prefix}_{name}"] = float(value)
    return flat


def resolve_column(predictions: pl.DataFrame, name: str) -> str:
    """The column `name` or `kept.<name>`; ConfigError when there is none, or its values are lists."""
    for column in (KEPT_PREFIX + name, name):
        if column in predictions.columns:
            if predictions.schema[column].is_nested():
                raise ConfigError(f"cannot group by {name}: its values are of type {predictions.schema[column]}", "name a scalar column")
            return column
    known = [column.removeprefix(KEPT_PREFIX) for column in predictions.columns]
    near = difflib.get_close_matches(name, known, n=1)
    kept = [column.removeprefix(KEPT_PREFIX) for column in predictions.columns if column.startswith(KEPT_PREFIX)]
    said = f"did you mean {near[0]}?" if near else f"kept columns: {', '.join(kept) or 'none; name some under `keep` and preprocess again'}"
    raise ConfigError(f"the predictions have no column {name}", said)


def observed_metrics(logits: Floats, labels: Floats, weights: Floats | None = None, least: int = 1) -> Record:
    """Metrics of predictions whose 0/1 labels were observed; AUC and KS only with `least` positives and negatives."""
    ranking = Ranking.of(logits, labels, weights)
    impressions, positives = len(labels), int(labels.sum())
    negatives = impressions - positives
    values = {
        "mean_predicted": metrics.mean(metrics.sigmoid(logits), weights),
        "mean_observed": metrics.mean(labels, weights),
        "auc": ranking.auc(),
        "log_loss": metrics.log_loss(logits, labels, weights),
        "normalized_entropy": metrics.normalized_entropy(logits, labels, weights),
        "calibration": metrics.calibration(logits, labels, weights),
        "ece": ranking.ece(),
        "ks": ranking.ks(),
    }
    few = "no impressions" if not impressions else "no positives" if not positives else "no negatives" if not negatives else ""
    if not few and min(positives, negatives) < least:
        few = f"fewer than {least} {'positives' if positives < least else 'negatives'}"
        values["auc"] = values["ks"] = float("nan")
    low, high = metrics.calibration_interval(logits, labels, weights)
    return {
        "impressions": impressions,
        "positives": positives,
        **_weight(weights),
        **_json_numbers(values),
        "calibration_interval": [_json_number(low), _json_number(high)] if impressions else None,
        **_undefined(values, few),
    }


def truth_metrics(logits: Floats, truth: Floats, weights: Floats | None = None) -> Record:
    """Metrics of predictions against known probabilities: `bias_ratio` and `bias_difference` compare mean predicted with mean truth."""
    predicted, mean_truth = metrics.mean(metrics.sigmoid(logits), weights), metrics.mean(truth, weights)
    values = {
        "mean_predicted": predicted,
        "mean_truth": mean_truth,
        "bias_ratio": predicted / mean_truth if mean_truth > 0 else float("nan"),
        "bias_difference": predicted - mean_truth,
        "kl": metrics.kl(truth, logits, weights),
        "rmse": metrics.rmse(truth, logits, weights),
        "auc": metrics.auc(logits, truth, weights),
    }
    few = "the truth is 0 or 1 everywhere" if len(truth) else "no impressions"
    return {"impressions": len(truth), **_weight(weights), **_json_numbers(values), **_undefined(values, few)}


def gauc(users: pl.Series, logits: Floats, labels: Floats, weights: Floats | None = None) -> Record:
    """Impression-weighted AUC within users, sum_u n_u AUC_u / sum_u n_u over users with a positive and a negative; n_u is their weight.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017. Ties count a half. Rows without a user
    are left out and counted.
    """
    weight = np.ones_like(labels) if weights is None else weights
    frame = pl.DataFrame({"score": logits, "positive": weight * labels, "negative": weight * (1 - labels), "user": users})
    per_user = (
        frame.lazy()
        .drop_nulls("user")
        .group_by("user", "score")
        .agg(pl.col("positive", "negative").sum(), pl.len().alias("rows"))
        .sort("user", "score")
        .with_columns(below=pl.col("negative").cum_sum().over("user") - pl.col("negative"))
        .group_by("user")
        .agg(
            pl.col("positive", "negative", "rows").sum(),
            pairs=(pl.col("positive") * (pl.col("below") + pl.col("negative") / 2)).sum(),
        )
        .collect()
    )
    rows = int(per_user["rows"].sum())
    used = per_user.filter((pl.col("positive") > 0) & (pl.col("negative") > 0))
    rows_used = int(used["rows"].sum())
    share = (used["positive"] + used["negative"]).to_numpy()
    area = (used["pairs"] / used["positive"] / used["negative"]).to_numpy()
    values = {"auc": metrics.mean(area, share)}
    return {
        **_json_numbers(values),
        "users_used": used.height,
        "users_skipped": per_user.height - used.height,
        "impressions_used": rows_used,
        "impressions_skipped": rows - rows_used,
        "impressions_without_user": users.null_count(),
        **_undefined(values, "no user has a positive and a negative"),
    }


def ranking(users: pl.Series, population: Population) -> Record:
    """NDCG, DCG and Recall of `rank_by_user`; rows without a user are left out. Weighted rows have no positions, so no values."""
    held = users.is_not_null().to_numpy()
    found = rank_by_user(users.drop_nulls().rank("dense").to_numpy(), population.logits[held], population.labels[held])
    weighted = population.weights is not None and bool((population.weights != population.weights[:1]).any())
    values = dict.fromkeys(RANKING_METRICS, float("nan")) if weighted else found.values
    reason = "weighted rows have no position" if weighted else "no user has a positive"
    counts = {"users_used": found.users_used, "users_without_positive": found.users_without_positive}
    return {**_json_numbers(values), **counts, **_undefined(values, reason)}


def _sections(rows: Rows, least: int) -> Record:
    observed = {p.section: observed_metrics(p.logits, p.labels, p.weights, least) for p in rows.observed()}
    known = {p.section: truth_metrics(p.logits, p.labels, p.weights) for p in rows.known()}
    return observed | known


def _with_users(users: pl.Series, rows: Rows) -> list[tuple[pl.Series, Population]]:
    """Each population whose labels were observed, and the users of its rows."""
    clicked = users.filter(pl.Series(rows.click > 0))
    return [(clicked if population.section == "cvr_clicked" else users, population) for population in rows.observed()]


def _propensity(rows: Rows) -> Record:
    """Calibration of p_hat by decile of p_hat, against clicks and, where known, the truth; and its KL from the truth."""
    clicks = Ranking.of(rows.ctr_logit, rows.click, rows.weight).bins(10)
    deciles: Record = {
        "impressions": clicks.impressions.tolist(),
        "mean_predicted": _rounded(clicks.predicted),
        "mean_clicked": _rounded(clicks.observed),
        "clicked_low": _rounded(clicks.observed_low),
        "clicked_high": _rounded(clicks.observed_high),
    }
    if rows.true_propensity is None:
        return {"deciles": deciles}
    truth = Ranking.of(rows.ctr_logit, rows.true_propensity, rows.weight).bins(10)
    comparison = truth_metrics(rows.ctr_logit, rows.true_propensity, rows.weight)
    against = {f"ctr_{name}": comparison[name] for name in ("kl", "rmse", "bias_ratio", "mean_predicted", "mean_truth")}
    return {**against, "deciles": {**deciles, "mean_truth": _rounded(truth.observed)}}


def _curves(rows: Rows) -> Record:
    """Points for plots: a calibration curve of every section, ROC of those whose labels were observed."""
    curves: Record = {}
    for section, logits, labels, weights in (*rows.observed(), *rows.known()):
        ranking = Ranking.of(logits, labels, weights)
        bins = ranking.bins()
        curve: Record = {"impressions": bins.impressions.tolist(), "mean_predicted": _rounded(bins.predicted)}
        if section in OBSERVED:
            curve["mean_observed"] = _rounded(bins.observed)
            curve["observed_low"], curve["observed_high"] = _rounded(bins.observed_low), _rounded(bins.observed_high)
            false, true = ranking.roc(ROC_POINTS)
            roc = {"false_positive_rate": _rounded(false), "true_positive_rate": _rounded(true)}
            curves[section] = {"calibration": curve, "roc": roc}
        else:
            curves[section] = {"calibration": {**curve, "mean_truth": _rounded(bins.observed)}}
    return curves


def _groups(column: pl.Series, rows: Rows) -> Record:
    """The sections of each of the MAX_GROUPS largest groups, largest first, equal ones by value; missing values are a group."""
    column = column.rename("value")
    sizes = column.to_frame().group_by("value").len("impressions").sort(["impressions", "value"], descending=[True, False])
    largest = sizes.head(MAX_GROUPS).with_row_index("group")
    joined = column.to_frame().join(largest, on="value", how="left", nulls_equal=True, maintain_order="left")
    group = joined["group"].fill_null(MAX_GROUPS).to_numpy()
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(largest["impressions"].to_numpy())
    table, start = [], 0
    for value, end in zip(largest["value"], ends, strict=True):
        table.append({"value": _json_value(value), **_sections(rows.take(order[start:end]), LEAST_PER_CLASS)})
        start = int(end)
    return {
        "least_per_class": LEAST_PER_CLASS,
        "groups_reported": largest.height,
        "groups_left_out": sizes.height - largest.height,
        "impressions_left_out": len(column) - start,
        "rows": table,
    }


def _checked(predictions: pl.DataFrame, name: str, right: pl.Expr, expected: str) -> Floats:
    """A numeric column as float64; DataError naming the first row whose value is not right."""
    if not (predictions.schema[name].is_numeric() or predictions.schema[name] == pl.Boolean):
        raise DataError(f"column {name} of the predictions is of type {predictions.schema[name]}, expected numbers")
    wrong = predictions.select(~right.fill_null(False)).to_series()
    if wrong.any():
        row = int(wrong.arg_true()[0])
        raise DataError(
            f"column {name} of the predictions: {wrong.sum()} of {len(wrong)} values are wrong, the first in row {row}: "
            f"{predictions[name][row]}, expected {expected}"
        )
    return metrics.as_floats(predictions[name].cast(pl.Float64).fill_null(0.0).to_numpy())


def _weight(weights: Floats | None) -> Record:
    return {} if weights is None else {"weight": float(weights.sum())}


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json_numbers(values: dict[str, float]) -> Record:
    return {name: _json_number(value) for name, value in values.items()}


def _json_value(value: Any) -> str | int | float | None:
    """A group's value: numbers, strings and None as they are, anything else as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _undefined(values: dict[str, float], reason: str) -> Record:
    missing = {name: reason for name, value in values.items() if not math.isfinite(value)}
    return {"undefined": missing} if missing else {}


def _rounded(values: Floats) -> list[float]:
    """Plot points with 6 significant digits."""
    return [float(f"{value:.6g}") for value in values]
