"""What one cell of a study comes to: predictions on fresh impressions against the truth, and what a log alone could have said."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from escm2rec.evaluation import metrics
from escm2rec.evaluation.entire_risk import JUDGE_FLOOR, risk_estimates, risk_sums
from escm2rec.models.predictions import Predictions
from escm2rec.objectives.propensity import propensity, propensity_report, propensity_sums
from escm2rec.objectives.reduction import local_sums, reduce_terms
from escm2rec.study.cell import Draw, Rows, Trained
from escm2rec.study.worlds import Sample

Floats = NDArray[np.float64]
LEAST_RATE = 1e-12


def measure(trained: Trained, draw: Draw, judges: Mapping[str, Predictions], incumbent: Tensor) -> dict[str, float | None]:
    """One number by name; None where it does not exist.

    On fresh impressions, with the truth: `kl` and `kl_unclicked` (mean KL of eta_hat from eta in nats; over the unclicked each impression
    weighs 1 - p), `rmse`, `rmse_unclicked`, `cvr_over_truth`, `cvr_over_truth_unclicked` (means), `cvr_auc_entire`, `ctcvr_auc`,
    calibration of `ctr`, `cvr_clicked` and `ctcvr`, `ctr_kl`, `priority` (see `priority_slope`), `true_risk`, and `risk_error`, by
    which share the objective's own CVR loss misses it.

    From a log alone: `effective_share` and `mean_weight` of its weights, and on the held-out log `heldout_auc_clicked`, the AUC of clicked
    impressions, and by each judge `heldout_snips` and `heldout_dr`, its name appended: risks on all impressions by the propensity and
    imputed labels of a model that never saw that log and is no candidate; with `_over` how much they are above those of the incumbent,
    whose CVR logits of the held-out log are given, and with `_over_error` its standard error.
    """
    predictions = trained.predict(draw.fresh)
    values = _against_truth(predictions, draw.fresh) | _own_risk(trained, predictions, draw.fresh)
    held_out = trained.predict(draw.held_out)
    for name, judge in judges.items():
        values |= {f"{key}{name}": value for key, value in _held_out(held_out, draw.held_out, judge, incumbent).items()}
    clicked = draw.held_out.click > 0
    labels, weights = draw.held_out.conversion[clicked], draw.held_out.weight[clicked]
    values["heldout_auc_clicked"] = metrics.auc(_array(held_out.cvr_logit)[clicked], labels, weights)
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def priority_slope(cvr_logit: Floats, click_logit: Floats, true_logit: Floats) -> float:
    """The slope of the predicted logit on the logit of p beside the true logit: 0 where the prediction follows conversion alone."""
    columns = np.stack([np.ones_like(click_logit), click_logit, true_logit], axis=1)
    solution, *_ = np.linalg.lstsq(columns, cvr_logit, rcond=None)
    return float(solution[1])


def _against_truth(predictions: Predictions, fresh: Sample) -> dict[str, float]:
    z, a = _array(predictions.cvr_logit), _array(predictions.ctr_logit)
    eta, p, unclicked = fresh.cvr, fresh.propensity, 1 - fresh.propensity
    clicked = fresh.click > 0
    both, ctcvr = metrics.ctcvr_logits(a, z), fresh.click * fresh.conversion
    eta_hat = metrics.sigmoid(z)
    return {
        "kl": metrics.kl(eta, z),
        "kl_unclicked": metrics.kl(eta, z, unclicked),
        "rmse": metrics.rmse(eta, z),
        "rmse_unclicked": metrics.rmse(eta, z, unclicked),
        "cvr_over_truth": float(eta_hat.mean() / eta.mean()),
        "cvr_over_truth_unclicked": float((unclicked * eta_hat).sum() / (unclicked * eta).sum()),
        "cvr_auc_entire": metrics.auc(z, fresh.conversion),
        "ctcvr_auc": metrics.auc(both, ctcvr),
        "ctr_calibration": metrics.calibration(a, fresh.click),
        "cvr_clicked_calibration": metrics.calibration(z[clicked], fresh.conversion[clicked]),
        "ctcvr_calibration": metrics.calibration(both, ctcvr),
        "ctr_kl": metrics.kl(p, a),
        "priority": priority_slope(z, _logit(p), _logit(eta)),
        "true_risk": metrics.log_loss(z, eta),
    }


def _own_risk(trained: Trained, predictions: Predictions, fresh: Sample) -> dict[str, float]:
    """The objective's CVR loss as an estimate of the risk on all impressions, and the state of its weights."""
    rows, objective = Rows.of(fresh), trained.objective
    found: dict[str, float] = {}
    terms = objective.terms(predictions, rows.click, rows.conversion, rows.weight, trained.stage)
    # DCMT's loss is of two towers, and the oracle's of conversions that no log holds.
    if "cvr" in terms and objective.kind != "dcmt" and trained.reference != "all conversions":
        only = {"cvr": terms["cvr"]}
        estimate = float(reduce_terms(only, local_sums(only), world_size=1)[1]["cvr"])
        if objective.kind == "two-space":
            estimate /= 1 + objective.settings.beta
        risk = metrics.log_loss(_array(predictions.cvr_logit), fresh.cvr)
        found["risk_error"] = (estimate - risk) / risk
    if objective.estimator.weighs:
        q = objective.propensity(predictions, trained.stage)
        report = propensity_report(propensity_sums(q, rows.click, rows.weight, objective.floor))
        found |= {"effective_share": report.effective_share or math.nan, "mean_weight": report.mean_weight or math.nan}
    return found


def _held_out(predictions: Predictions, log: Sample, judge: Predictions, incumbent: Tensor) -> dict[str, float]:
    rows = Rows.of(log)
    base_ctr = float((rows.weight * rows.click).sum() / rows.weight.sum())
    q = propensity(judge.ctr_logit, JUDGE_FLOOR * base_ctr)
    seen = (predictions.cvr_logit, rows.click, rows.conversion, rows.weight, q, judge.cvr_logit)
    risk, over = risk_estimates(risk_sums(*seen)), risk_estimates(risk_sums(*seen, beside=incumbent))
    found = {
        "heldout_snips": risk.snips,
        "heldout_snips_over": over.snips,
        "heldout_snips_over_error": over.snips_standard_error,
        "heldout_dr": risk.dr,
        "heldout_dr_over": over.dr,
        "heldout_dr_over_error": over.dr_standard_error,
    }
    return {name: math.nan if value is None else value for name, value in found.items()}


def _array(logit: Tensor) -> Floats:
    return logit.double().numpy()


def _logit(rate: Floats) -> Floats:
    rate = rate.clip(LEAST_RATE, 1 - LEAST_RATE)
    return np.log(rate) - np.log1p(-rate)
