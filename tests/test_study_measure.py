"""What a cell comes to: every formula beside a plain one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from escm2rec.evaluation.entire_risk import JUDGE_FLOOR
from escm2rec.study import cell
from escm2rec.study.candidates import CANDIDATES
from escm2rec.study.cell import Draw, draw_world, train
from escm2rec.study.measure import measure, priority_slope
from escm2rec.study.presets import BASE
from tests.study_cells import one_thread  # noqa: F401

WORLD = replace(BASE, impressions=6_000, keep_rate=0.5)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """IPS after a few steps, its draw, its judge and what it comes to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cell, "EPOCHS", 2)
        patch.setattr(cell, "FRESH_ROWS", 2_000)
        drawn = draw_world(WORLD, 0)
        trained = train(WORLD, CANDIDATES["escm2-ips"], drawn.training, 0)
        judge = train(replace(WORLD, towers="flexible"), CANDIDATES["naive"], drawn.training, 0).predict(drawn.held_out)
        incumbent = train(WORLD, CANDIDATES["naive"], drawn.training, 0).predict(drawn.held_out).cvr_logit
    given = ({"": judge}, incumbent)
    return {"draw": drawn, "trained": trained, "judge": judge, "given": given, "values": measure(trained, drawn, *given)}


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def loss(label: float, rate: float) -> float:
    return -label * math.log(rate) - (1 - label) * math.log(1 - rate)


def auc(scores: list[float], labels: list[float], weights: list[float]) -> float:
    """Weighted share of pairs in the right order."""
    positive = [(s, w) for s, y, w in zip(scores, labels, weights, strict=True) if y]
    negative = [(s, w) for s, y, w in zip(scores, labels, weights, strict=True) if not y]
    right = sum(a * b * ((s > t) + 0.5 * (s == t)) for s, a in positive for t, b in negative)
    return right / (sum(a for _, a in positive) * sum(b for _, b in negative))


def test_errors_against_the_truth(measured: dict[str, Any]) -> None:
    fresh, values = measured["draw"].fresh, measured["values"]
    predictions = measured["trained"].predict(fresh)
    hat = [sigmoid(z) for z in predictions.cvr_logit.double().tolist()]
    ctr = [sigmoid(a) for a in predictions.ctr_logit.double().tolist()]
    rows = list(zip(fresh.cvr.tolist(), fresh.propensity.tolist(), hat, ctr, fresh.click.tolist(), fresh.conversion.tolist(), strict=True))
    count, unclicked = len(rows), sum(1 - p for _, p, *_ in rows)
    kl = [loss(eta, h) - loss(eta, eta) for eta, _, h, *_ in rows]
    clicks = sum(o for *_, o, _ in rows)
    plain = {
        "kl": sum(kl) / count,
        "kl_unclicked": sum((1 - row[1]) * each for row, each in zip(rows, kl, strict=True)) / unclicked,
        "rmse": math.sqrt(sum((eta - h) ** 2 for eta, _, h, *_ in rows) / count),
        "rmse_unclicked": math.sqrt(sum((1 - p) * (eta - h) ** 2 for eta, p, h, *_ in rows) / unclicked),
        "cvr_over_truth": sum(hat) / sum(eta for eta, *_ in rows),
        "cvr_over_truth_unclicked": sum((1 - p) * h for _, p, h, *_ in rows) / sum((1 - p) * eta for eta, p, *_ in rows),
        "true_risk": sum(loss(eta, h) for eta, _, h, *_ in rows) / count,
        "ctr_kl": sum(loss(p, a) - loss(p, p) for _, p, _, a, *_ in rows) / count,
        "ctr_calibration": sum(ctr) / clicks,
        "cvr_clicked_calibration": sum(h * o for _, _, h, _, o, _ in rows) / sum(o * r for *_, o, r in rows),
        "ctcvr_calibration": sum(h * a for _, _, h, a, *_ in rows) / sum(o * r for *_, o, r in rows),
        "cvr_auc_entire": auc(hat, [r for *_, r in rows], [1.0] * count),
        "ctcvr_auc": auc([h * a for _, _, h, a, *_ in rows], [o * r for *_, o, r in rows], [1.0] * count),
    }
    assert {name: values[name] for name in plain} == pytest.approx(plain, rel=1e-5)


def test_the_objectives_own_risk_and_weights(measured: dict[str, Any]) -> None:
    fresh, values, trained = measured["draw"].fresh, measured["values"], measured["trained"]
    predictions = trained.predict(fresh)
    floor = trained.objective.floor
    rows = zip(predictions.cvr_logit.double().tolist(), predictions.ctr_logit.double().tolist(), fresh.click, fresh.conversion, strict=True)
    clicked = [(1 / max(sigmoid(a), floor), loss(float(r), sigmoid(z))) for z, a, o, r in rows if o]
    estimate = sum(weight * delta for weight, delta in clicked) / len(fresh)
    weight, squared = sum(w for w, _ in clicked), sum(w * w for w, _ in clicked)
    assert values["risk_error"] == pytest.approx(estimate / values["true_risk"] - 1, rel=1e-4)
    assert values["mean_weight"] == pytest.approx(weight / len(fresh), rel=1e-5)
    assert values["effective_share"] == pytest.approx(weight**2 / squared / len(clicked), rel=1e-5)


def test_what_a_held_out_log_says(measured: dict[str, Any]) -> None:
    log, judge, values = measured["draw"].held_out, measured["judge"], measured["values"]
    assert set(log.weight) == {1.0, 2.0}
    z = measured["trained"].predict(log).cvr_logit.double().tolist()
    w, o, r = log.weight.tolist(), log.click.tolist(), log.conversion.tolist()
    base = sum(a * b for a, b in zip(w, o, strict=True)) / sum(w)
    q = [max(sigmoid(a), JUDGE_FLOOR * base) for a in judge.ctr_logit.double().tolist()]
    delta = [loss(label, sigmoid(each)) for label, each in zip(r, z, strict=True)]
    imputed = [loss(sigmoid(m), sigmoid(each)) for m, each in zip(judge.cvr_logit.double().tolist(), z, strict=True)]
    rows = list(zip(w, o, q, delta, imputed, strict=True))
    plain = {
        "heldout_snips": sum(w * o * d / q for w, o, q, d, _ in rows) / sum(w * o / q for w, o, q, *_ in rows),
        "heldout_dr": sum(w * (i + o * (d - i) / q) for w, o, q, d, i in rows) / sum(w),
        "heldout_auc_clicked": auc(*([x for x, clicked in zip(each, o, strict=True) if clicked] for each in (z, r, w))),
    }
    assert {name: values[name] for name in plain} == pytest.approx(plain, rel=1e-4)


def test_how_much_a_candidate_is_above_the_incumbent_is_a_difference_of_risks(
    measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "EPOCHS", 2)
    incumbent = measure(train(WORLD, CANDIDATES["naive"], measured["draw"].training, 0), measured["draw"], *measured["given"])
    for name in ("heldout_snips", "heldout_dr"):
        assert incumbent[f"{name}_over"] == incumbent[f"{name}_over_error"] == 0
        own, other, over, error = (
            measured["values"][name],
            incumbent[name],
            *(measured["values"][f"{name}_over{end}"] for end in ("", "_error")),
        )
        assert over == pytest.approx(own - other, abs=1e-9)
        assert abs(over) > 1e-5
        assert 0 < error < 0.05


def test_priority_slope_is_that_of_the_click_beside_the_truth() -> None:
    random = np.random.default_rng(0)
    truth = random.standard_normal(500)
    click = 0.8 * truth + random.standard_normal(500)
    assert priority_slope(0.3 + 0.7 * truth, click, truth) == pytest.approx(0, abs=1e-12)
    assert priority_slope(0.3 - 0.45 * click + 0.7 * truth, click, truth) == pytest.approx(-0.45)


def test_what_does_not_exist_is_none(measured: dict[str, Any]) -> None:
    drawn = measured["draw"]
    none = replace(drawn.held_out, conversion=np.zeros_like(drawn.held_out.conversion))
    values = measure(measured["trained"], Draw(drawn.training, none, drawn.fresh), *measured["given"])
    assert values["heldout_auc_clicked"] is None
    assert values["heldout_snips"] is not None
    assert "NaN" not in json.dumps(values, allow_nan=False)


@pytest.mark.parametrize(("name", "absent"), [("esmm", {"risk_error", "effective_share", "mean_weight"}), ("dcmt", {"risk_error"})])
def test_some_candidates_have_no_risk_or_weights(
    name: str, absent: set[str], measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "EPOCHS", 1)
    drawn = measured["draw"]
    values = measure(train(WORLD, CANDIDATES[name], drawn.training, 0), drawn, *measured["given"])
    assert measured["values"].keys() - values.keys() == absent


def test_two_space_risk_is_of_one_space(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell, "EPOCHS", 1)
    drawn = measured["draw"]
    trained = train(WORLD, CANDIDATES["two-space"], drawn.training, 0)
    values, predictions = measure(trained, drawn, *measured["given"]), trained.predict(drawn.fresh)
    assert predictions.imputation_logit is not None
    logits = zip(
        *(logit.double().tolist() for logit in (predictions.cvr_logit, predictions.ctr_logit, predictions.imputation_logit)), strict=True
    )
    total, beta = 0.0, trained.objective.settings.beta
    for (z, a, m), o, r in zip(logits, drawn.fresh.click.tolist(), drawn.fresh.conversion.tolist(), strict=True):
        q = max(sigmoid(a), trained.objective.floor)
        total += loss(r, sigmoid(z)) / q if o else beta * loss(sigmoid(m), sigmoid(z)) / (1 - q)
    assert values["risk_error"] is not None
    assert values["true_risk"] is not None
    assert (1 + values["risk_error"]) * values["true_risk"] == pytest.approx(total / len(drawn.fresh) / (1 + beta), rel=1e-4)
