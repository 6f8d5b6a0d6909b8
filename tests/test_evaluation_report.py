"""The report: populations, groups, GAUC, and what is refused."""

import json
from typing import Any

import numpy as np
import polars as pl
import pytest

from escm2rec.errors import ConfigError, DataError
from escm2rec.evaluation import metrics, report
from escm2rec.evaluation.report import build_report, flat_metrics, gauc
from escm2rec.evaluation.user_ranking import rank_by_user
from tests.evaluation_world import simulated


def test_each_section_is_measured_on_its_own_population() -> None:
    predictions = simulated()
    made = build_report(predictions)
    click, conversion, ctr, cvr = (predictions[name].to_numpy() for name in ("click", "conversion", "ctr_logit", "cvr_logit"))
    clicked = click == 1
    product = metrics.ctcvr_logits(ctr, cvr)
    assert made["impressions"] == made["ctr"]["impressions"] == made["ctcvr"]["impressions"] == 4000
    assert made["clicks"] == made["ctr"]["positives"] == made["cvr_clicked"]["impressions"] == clicked.sum()
    assert made["conversions"] == made["ctcvr"]["positives"] == made["cvr_clicked"]["positives"] == conversion.sum()
    cases = (("ctr", ctr, click), ("ctcvr", product, conversion), ("cvr_clicked", cvr[clicked], conversion[clicked]))
    for section, logits, labels in cases:
        for name in ("auc", "log_loss", "normalized_entropy", "calibration", "ece", "ks"):
            assert made[section][name] == pytest.approx(getattr(metrics, name)(logits, labels)), (section, name)
        assert made[section]["calibration_interval"] == pytest.approx(metrics.calibration_interval(logits, labels))
        assert "undefined" not in made[section]


def test_mistake_10_cvr_is_never_measured_on_unclicked_impressions_as_zeros() -> None:
    """The clicked metric ignores what is predicted and recorded for the unclicked; the wrong one is AUC of the CTCVR label, and moves."""
    predictions = simulated()
    unclicked = pl.col("click") == 0
    changed = predictions.with_columns(
        cvr_logit=pl.when(unclicked).then(-pl.col("cvr_logit") * 3).otherwise(pl.col("cvr_logit")),
        conversion=pl.when(unclicked).then(1).otherwise(pl.col("conversion")),
    )
    before, after = build_report(predictions), build_report(changed)
    assert before["cvr_clicked"] == after["cvr_clicked"]
    assert before["curves"]["cvr_clicked"] == after["curves"]["cvr_clicked"]
    assert before["ctcvr"]["positives"] == after["ctcvr"]["positives"]
    unrecorded = predictions.with_columns(conversion=pl.when(unclicked).then(None).otherwise(pl.col("conversion")))
    assert build_report(unrecorded) == before

    def wrong(frame: pl.DataFrame) -> float:
        return metrics.auc(frame["cvr_logit"], frame["click"] * frame["conversion"])

    assert abs(wrong(predictions) - wrong(changed)) > 0.05
    # Told which impressions are clicked, and nothing about conversion, the wrong metric is nearly perfect; the right one is chance.
    clicks_only = predictions.with_columns(cvr_logit=pl.col("click").cast(pl.Float32))
    assert wrong(clicks_only) > 0.8
    assert build_report(clicks_only)["cvr_clicked"]["auc"] == 0.5


def test_known_truth_is_compared_on_all_and_on_unclicked_impressions() -> None:
    predictions = simulated()
    made = build_report(predictions)
    for section, rows in (("cvr_entire", predictions), ("cvr_unclicked", predictions.filter(pl.col("click") == 0))):
        truth, logits = rows["true_cvr"].to_numpy().astype(np.float64), rows["cvr_logit"].to_numpy()
        p = metrics.sigmoid(logits)
        expected = {
            "impressions": rows.height,
            "mean_predicted": p.mean(),
            "mean_truth": truth.mean(),
            "bias_ratio": p.mean() / truth.mean(),
            "bias_difference": p.mean() - truth.mean(),
            "kl": (truth * np.log(truth / p) + (1 - truth) * np.log((1 - truth) / (1 - p))).mean(),
            "rmse": np.sqrt(((p - truth) ** 2).mean()),
            "auc": metrics.auc(logits, truth),
        }
        assert made[section] == pytest.approx(expected)
    assert made["propensity"]["ctr_kl"] == pytest.approx(metrics.kl(predictions["true_propensity"], predictions["ctr_logit"]))
    deciles = made["propensity"]["deciles"]
    assert deciles["impressions"] == [400] * 10
    assert np.mean(deciles["mean_clicked"]) == pytest.approx(predictions["click"].mean(), rel=1e-5)
    assert np.mean(deciles["mean_truth"]) == pytest.approx(predictions["true_propensity"].mean(), rel=1e-5)
    without = build_report(simulated(truth=False))
    assert {"cvr_entire", "cvr_unclicked"}.isdisjoint(without)
    assert set(without["propensity"]) == {"deciles"}


def test_a_weight_of_two_is_the_row_twice() -> None:
    predictions = simulated(1500)
    twice = pl.col("kept.user") < 100
    weighted = build_report(predictions.with_columns(weight=pl.when(twice).then(2.0).otherwise(1.0)), user="user")
    repeated = build_report(pl.concat([predictions, predictions.filter(twice)]), user="user")
    observed = ("auc", "log_loss", "normalized_entropy", "calibration", "ece", "ks")
    known = ("auc", "bias_ratio", "bias_difference", "kl", "rmse")
    for section in ("ctr", "ctcvr", "cvr_clicked", "cvr_entire", "cvr_unclicked"):
        assert weighted[section]["weight"] == repeated[section]["impressions"]
        against_truth = section in ("cvr_entire", "cvr_unclicked")
        for name in known if against_truth else observed:
            close = 1e-3 if against_truth and name == "auc" else 1e-9  # a row makes a pair with its copy, not with itself
            assert weighted[section][name] == pytest.approx(repeated[section][name], rel=close), (section, name)
    for section in ("ctr", "ctcvr", "cvr_clicked"):
        assert weighted["gauc_per_user"][section]["auc"] == pytest.approx(repeated["gauc_per_user"][section]["auc"])


def test_weights_of_1_throughout_are_none() -> None:
    predictions = simulated(500)
    assert build_report(predictions.with_columns(weight=pl.lit(1.0)), user="user") == build_report(predictions, user="user")


def test_groups_have_the_metrics_of_their_own_rows() -> None:
    predictions = simulated().with_columns(
        pl.when(pl.int_range(pl.len()) < 30).then(None).otherwise(pl.col("kept.scene")).alias("kept.scene")
    )
    made = build_report(predictions, by=["scene"])
    table = made["groups"]["scene"]
    assert [row["value"] for row in table["rows"]][2] is None
    assert (table["groups_reported"], table["groups_left_out"], table["impressions_left_out"]) == (3, 0, 0)
    assert table["rows"][0]["ctr"]["impressions"] >= table["rows"][1]["ctr"]["impressions"]
    for row in table["rows"][:2]:
        alone = build_report(predictions.filter(pl.col("kept.scene") == row["value"]))
        assert row == {"value": row["value"], **{section: alone[section] for section in row if section != "value"}}
    few = table["rows"][2]["cvr_clicked"]
    assert few["auc"] is None
    assert few["undefined"]["auc"] in {"fewer than 10 positives", "fewer than 10 negatives"}
    assert few["log_loss"] is not None


def test_only_the_largest_groups_are_reported_and_the_others_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_GROUPS", 50)
    predictions = simulated()
    table = build_report(predictions, by=["user"])["groups"]["user"]
    sizes = sorted(predictions["kept.user"].value_counts()["count"], reverse=True)
    assert [row["ctr"]["impressions"] for row in table["rows"]] == sizes[:50]
    assert (table["groups_reported"], table["groups_left_out"], table["impressions_left_out"]) == (50, 150, sum(sizes[50:]))


@pytest.mark.parametrize("weighted", [False, True])
def test_gauc_is_the_weighted_mean_of_each_users_auc(weighted: bool) -> None:
    random = np.random.default_rng(5)
    users = pl.Series([*random.integers(0, 40, 395), *[None] * 5])
    scores, labels = random.integers(0, 4, 400).astype(float), (random.random(400) < 0.15).astype(float)
    weights = random.integers(1, 4, 400).astype(float) if weighted else None
    areas, shares, rows = [], [], 0
    for user in range(40):
        mine = (users == user).fill_null(False).to_numpy()
        area = metrics.auc(scores[mine], labels[mine], None if weights is None else weights[mine])
        if np.isfinite(area):
            areas.append(area)
            shares.append(mine.sum() if weights is None else weights[mine].sum())
            rows += int(mine.sum())
    assert 5 < len(areas) < 40
    assert gauc(users, scores, labels, weights) == {
        "auc": pytest.approx(np.average(areas, weights=shares)),
        "users_used": len(areas),
        "users_skipped": 40 - len(areas),
        "impressions_used": rows,
        "impressions_skipped": 395 - rows,
        "impressions_without_user": 5,
    }


@pytest.mark.parametrize("rows", [0, 1, 60])
def test_what_is_undefined_is_null_with_a_reason(rows: int) -> None:
    """No clicks at all, and no rows at all."""
    none = simulated(rows).with_columns(click=pl.lit(0, pl.UInt8), conversion=pl.lit(0, pl.UInt8))
    made = build_report(none, by=["scene"], user="user")
    json.dumps(made, allow_nan=False)
    assert made["ctr"]["auc"] is None
    assert made["ctr"]["undefined"]["auc"] == ("no positives" if rows else "no impressions")
    assert made["cvr_clicked"]["undefined"]["log_loss"] == "no impressions"
    assert made["cvr_clicked"]["calibration_interval"] is None
    assert made["gauc_per_user"]["ctr"]["undefined"] == {"auc": "no user has a positive and a negative"}
    assert made["ranking_per_user"]["ctr"]["undefined"]["recall_at_4"] == "no user has a positive"
    assert made["ranking_per_user"]["ctr"]["users_without_positive"] == none["kept.user"].n_unique()
    if rows:
        assert made["ctr"]["calibration_interval"][1] is None
    everything = build_report(simulated(50).with_columns(click=pl.lit(1), conversion=pl.lit(1)))
    assert everything["cvr_unclicked"]["undefined"]["kl"] == "no impressions"
    assert everything["ctr"]["undefined"]["auc"] == "no negatives"


@pytest.mark.parametrize("names", [None, [f"user {number}" for number in range(40)]])
def test_ranking_is_within_users_whatever_names_them(names: list[str] | None) -> None:
    """Rows without a user are left out; the clicked section ranks clicked rows."""
    predictions = simulated(800).with_columns(pl.col("kept.user") % 40)
    codes = predictions["kept.user"]
    if names is not None:
        predictions = predictions.with_columns(codes.map_elements(lambda code: names[code], pl.String))
    lost = pl.int_range(pl.len()) < 5
    made = build_report(predictions.with_columns(pl.when(lost).then(None).otherwise(pl.col("kept.user")).alias("kept.user")), user="user")
    kept = predictions.with_columns(codes.alias("code"))[5:]
    assert made["ranking_per_user"]["user"] == "user"
    clicked = kept.filter(pl.col("click") == 1)
    for section, rows, logit, label in (("ctr", kept, "ctr_logit", "click"), ("cvr_clicked", clicked, "cvr_logit", "conversion")):
        expected = rank_by_user(rows["code"], rows[logit], rows[label])
        found = made["ranking_per_user"][section]
        counts = {"users_used": expected.users_used, "users_without_positive": expected.users_without_positive}
        assert found == pytest.approx({**expected.values, **counts})
    assert flat_metrics(made)["cvr_ndcg_at_5_clicked"] == made["ranking_per_user"]["cvr_clicked"]["ndcg_at_5"]


def test_weighted_rows_have_no_ranking() -> None:
    weighted = build_report(simulated().with_columns(weight=1.0 + pl.col("click")), user="user")["ranking_per_user"]["ctr"]
    assert weighted["ndcg_at_5"] is None
    assert set(weighted["undefined"].values()) == {"weighted rows have no position"}
    equal = build_report(simulated().with_columns(weight=pl.lit(2.0)), user="user")["ranking_per_user"]
    assert equal == build_report(simulated(), user="user")["ranking_per_user"]


def test_random_impressions_have_one_section_of_the_entire_space() -> None:
    """Rows of which each was seen: the clicked CVR is that of all, and is called so; clicks are not measured."""
    seen = simulated(truth=False).with_columns(click=pl.lit(1, pl.UInt8))
    made = build_report(seen, by=["scene"], user="user", at_random=True)
    as_log = build_report(seen, by=["scene"], user="user")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert [section for section in report.OBSERVED if section in made] == ["cvr"]
    assert made["cvr"] == as_log["cvr_clicked"]
    assert made["curves"] == {"cvr": as_log["curves"]["cvr_clicked"]}
    assert made["propensity"] == {}
    for table in ("gauc_per_user", "ranking_per_user"):
        assert made[table] == {"user": "user", "cvr": as_log[table]["cvr_clicked"]}
    assert [set(row) for row in made["groups"]["scene"]["rows"]] == [{"value", "cvr"}] * 2
    flat = flat_metrics(made)
    assert flat["cvr_auc"] == made["cvr"]["auc"]
    assert {"cvr_gauc", "cvr_ndcg_at_5", "cvr_dcg_at_2", "cvr_recall_at_6", "cvr_log_loss"} <= set(flat)
    assert not any(name.startswith("ct") for name in flat)


def test_the_report_is_json_and_flat_names_carry_their_population() -> None:
    made = build_report(simulated(), by=["scene", "user"], user="user")
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    flat = flat_metrics(made)
    assert {"ctr_auc", "ctcvr_auc", "cvr_auc_clicked", "cvr_auc_entire", "cvr_kl_unclicked", "ctr_gauc", "cvr_gauc_clicked"} <= set(flat)
    assert flat["cvr_auc_clicked"] == made["cvr_clicked"]["auc"]
    assert not any(name in flat for name in ("cvr_auc", "cvr_log_loss"))
    for curve in made["curves"].values():
        assert len(curve["calibration"]["mean_predicted"]) == metrics.NUM_BINS
        assert len(curve.get("roc", {}).get("true_positive_rate", [])) <= report.ROC_POINTS


WRONG = [
    ({"click": 2}, "column click of the predictions: 4000 of 4000 values are wrong, the first in row 0: 2, expected 0 or 1"),
    ({"conversion": 7}, "column conversion .* expected 0 or 1 where clicked"),
    ({"cvr_logit": float("nan")}, "column cvr_logit .* expected a finite number"),
    ({"weight": 0.0}, "column weight .* expected a finite number above 0"),
    ({"true_cvr": 1.5}, "column true_cvr .* expected a probability"),
    ({"ctr_logit": "high"}, "column ctr_logit of the predictions is of type String, expected numbers"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_values_are_refused_with_their_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_report(simulated().with_columns(**{name: pl.lit(value) for name, value in values.items()}))


def test_missing_columns_are_refused() -> None:
    with pytest.raises(DataError, match="the predictions have no column cvr_logit; they have click"):
        build_report(simulated().drop("cvr_logit"))
    with pytest.raises(ConfigError, match=r"no column scenes\nhint: did you mean scene\?"):
        build_report(simulated(), by=["scenes"])
    with pytest.raises(ConfigError, match="no column zzz\nhint: kept columns: user, scene"):
        build_report(simulated(), user="zzz")
    with pytest.raises(ConfigError, match="cannot group by tags: its values are of type List"):
        build_report(simulated().with_columns(pl.lit([[1]]).alias("kept.tags")), by=["tags"])
