"""Weights and balance of a split against plain numpy, row by row and value by value."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from escm2rec.cells import with_lists
from escm2rec.evaluation import propensity
from escm2rec.evaluation.balance import held_values, number_differences, standardised_differences, value_differences
from escm2rec.evaluation.propensity import PropensityDiagnostics
from escm2rec.reader.batch import Batch
from escm2rec.reader.columns import Slice, assemble, decode
from escm2rec.reader.dataset import Dataset
from tests.encoded import schema, write_dataset

FLOOR = 0.3


def difference(x: Any, click: Any, weight: Any, q: Any) -> tuple[float, float]:
    """d before and after weighting, by the formula."""
    clicked = click > 0
    mean, variance = np.average(x, weights=weight), np.average((x - np.average(x, weights=weight)) ** 2, weights=weight)
    of_clicked = np.average(x[clicked], weights=weight[clicked])
    of_weighted = np.average(x[clicked], weights=(weight / q)[clicked])
    clicked_variance = np.average((x[clicked] - of_clicked) ** 2, weights=weight[clicked])
    spread = ((variance + clicked_variance) / 2) ** 0.5
    return (abs(of_clicked - mean) / spread, abs(of_weighted - mean) / spread) if spread else (0.0, 0.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Encoded impressions with weights and the propensities that drew their clicks, floored."""
    made = write_dataset(tmp_path_factory.mktemp("balance") / "set", {"train": 3_000}, rows_per_file=3_000)
    table = pq.read_table(str(Dataset.open(made).row_groups("train")[0].path))
    rng = np.random.default_rng(0)
    q = np.maximum(table["true_propensity"].to_numpy(), FLOOR).astype(np.float32)
    return {"table": table, "weight": rng.choice([1.0, 2.0, 5.0], len(table)).astype(np.float32), "q": q}


def diagnosed(rows: dict[str, Any], size: int, weight: Any = None, q: Any = None, p_hat: Any = None) -> PropensityDiagnostics:
    """The diagnostics of all rows, in padded batches of `size`; p_hat is q where nothing else is said."""
    made = PropensityDiagnostics(schema(), FLOOR)
    columns = decode(rows["table"], schema(), labels=True, where="here")
    columns.labels["weight"] = rows["weight"] if weight is None else weight
    q = torch.from_numpy(rows["q"] if q is None else q)
    p_hat = q if p_hat is None else torch.from_numpy(p_hat)
    for start in range(0, columns.num_rows, size):
        stop = min(start + size, columns.num_rows)
        made.add(assemble([Slice(columns, start, stop)], schema(), padded_rows=size), q[start:stop], p_hat[start:stop])
    return made


def covariates(table: Any, name: str, folded: int = 10**9) -> list[Any]:
    """An indicator a value, no value among them."""
    values = with_lists(table)[name].to_pylist()
    sets = [
        {row % folded for row in (value if isinstance(value, list) else [value] if value is not None else [])} or {-1} for value in values
    ]
    return [np.array([value in held for held in sets], np.float64) for value in {value for held in sets for value in held}]


def test_balance_is_that_of_the_formula(rows: dict[str, Any]) -> None:
    click, weight = rows["table"]["click"].to_numpy(), rows["weight"].astype(np.float64)
    found = diagnosed(rows, 256).report()["balance"]
    assert len(found["features"]) == 6
    for row in found["features"]:
        if row["feature"] in ("price", "age"):
            columns = [rows["table"][row["feature"]].to_numpy().astype(np.float64)]
        else:
            columns = sorted(covariates(rows["table"], row["feature"]), key=lambda x: -float(weight @ x))[:5]
        expected = np.max([difference(x, click, weight, rows["q"].astype(np.float64)) for x in columns], axis=0)
        assert (row["before"], row["after"]) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-9), row["feature"]
    after = [row["after"] for row in found["features"]]
    assert after == sorted(after, reverse=True)
    assert found["largest_after"] == after[0]
    assert found["unbalanced_before"] == sum(row["before"] >= 0.1 for row in found["features"]) > 0


def with_columns(table: Any, **columns: Any) -> Any:
    """The table with other values in some of its columns."""
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, [values])
    return table


def test_selection_on_missing_numbers_is_seen_and_the_right_weights_remove_it(rows: dict[str, Any]) -> None:
    """Impressions without a price are clicked a quarter as often, whatever the price of the others: its mean, 0 where missing, stays."""
    rng = np.random.default_rng(1)
    missing = rng.random(3_000) < 0.4
    q = np.where(missing, 0.15, 0.6).astype(np.float32)
    click = (rng.random(3_000) < q).astype(np.uint8)
    price = np.where(missing, 0, rng.normal(size=3_000)).astype(np.float32)
    planted = {"table": with_columns(rows["table"], click=click, price=price), "weight": np.ones(3_000, np.float32), "q": q}
    found = diagnosed(planted, 256).report()
    of_price = next(row for row in found["balance"]["features"] if row["feature"] == "price")
    ones = planted["weight"].astype(np.float64)
    chance = 3 / found["weights"]["effective_sample_size"] ** 0.5
    assert difference(price.astype(np.float64), click, ones, q)[0] < 0.05
    assert of_price["before"] == pytest.approx(difference(missing.astype(np.float64), click, ones, q)[0])
    assert of_price["before"] > 0.5
    assert of_price["after"] < chance
    assert next(row for row in found["balance"]["features"] if row["feature"] == "age")["before"] < chance, "none of it is missing"


def test_a_number_is_compared_over_those_that_have_it(rows: dict[str, Any]) -> None:
    """Clicks depend on the price of the half that has one, and not on whether there is one."""
    click, weight = rows["table"]["click"].to_numpy(), rows["weight"].astype(np.float64)
    held = np.random.default_rng(2).random(3_000) < 0.5
    price = np.where(held, rows["table"]["price"].to_numpy(), 0).astype(np.float32)
    found = diagnosed({**rows, "table": with_columns(rows["table"], price=price)}, 256).report()["balance"]["features"]
    of_price = next(row for row in found if row["feature"] == "price")
    expected = difference(price[held].astype(np.float64), click[held], weight[held], rows["q"][held].astype(np.float64))
    assert (of_price["before"], of_price["after"]) == pytest.approx(expected, rel=1e-6)
    assert of_price["before"] > 1.2 * difference(price.astype(np.float64), click, weight, rows["q"])[0], "zeros would hide some of it"


def test_a_number_that_no_click_has_differs_by_its_missingness_alone(rows: dict[str, Any]) -> None:
    click = rows["table"]["click"].to_numpy()
    price = np.where(click > 0, 0, 1 + rows["table"]["price"].to_numpy()).astype(np.float32)
    found = diagnosed({**rows, "table": with_columns(rows["table"], price=price)}, 256).report()["balance"]["features"]
    of_price = next(row for row in found if row["feature"] == "price")
    expected = difference((price == 0).astype(np.float64), click, rows["weight"].astype(np.float64), rows["q"].astype(np.float64))
    assert (of_price["before"], of_price["after"]) == pytest.approx(expected, rel=1e-6)


def test_weights_are_those_of_the_formula(rows: dict[str, Any]) -> None:
    clicked = rows["table"]["click"].to_numpy() > 0
    w, q = rows["weight"].astype(np.float64), rows["q"].astype(np.float64)
    weights = (w / q)[clicked]
    mean, p = weights.sum() / w.sum(), rows["table"]["true_propensity"].to_numpy()
    expected, half = (w * p / q).sum() / w.sum(), 1.96 * np.sqrt((w**2 * p * (1 - p) / q**2).sum()) / w.sum()
    found = diagnosed(rows, 256, p_hat=p).report()["weights"]
    assert found.pop("mean_weight_interval") == pytest.approx([expected - half, expected + half])
    assert expected < 0.9, "the floor of 0.3 keeps weights down"
    assert found == pytest.approx(
        {
            "floor": FLOOR,
            "num_clicked": clicked.sum(),
            "effective_sample_size": weights.sum() ** 2 / (weights**2).sum(),
            "effective_share": weights.sum() ** 2 / (weights**2).sum() / clicked.sum(),
            "floor_share": (rows["q"][clicked] == np.float32(FLOOR)).mean(),
            "mean_weight": mean,
            "mean_weight_expected": expected,
            "mean_weight_off": False,
            "largest_share": weights.max() / weights.sum(),
            "floor_binds_for_most": False,
        }
    )


@pytest.mark.parametrize("heavy", [False, True])
def test_the_interval_of_the_mean_weight_covers_as_often_as_it_says(heavy: bool) -> None:
    """Clicks drawn again 400 times with p_hat, unequal weights, a floor that binds for some; at most 5% are outside, whatever the tails.

    Heavy: a few impressions in ten thousand would weigh most, and most draws have none of them."""
    rng = np.random.default_rng(3)
    count = 5_000 if heavy else 500
    p = 1 / (1 + np.exp(4 - 2 * rng.standard_normal(count))) if heavy else rng.uniform(0.05, 0.6, count)
    q, weight = np.maximum(p, 0.0 if heavy else 0.1), rng.choice([1.0, 4.0], count)
    numbers = schema().model_copy(update={"features": schema().numeric})
    held, off = [], []
    for _ in range(400):
        made = PropensityDiagnostics(numbers, 0.0)
        click = torch.from_numpy(rng.random(count) < p).float()
        labels = [click, torch.zeros(count), torch.from_numpy(weight).float()]
        made.add(Batch(None, None, torch.zeros(count, 2), *labels, num_rows=count), torch.from_numpy(q), torch.from_numpy(p))
        said = made.report()["weights"]
        low, high = said["mean_weight_interval"]
        held.append(low <= said["mean_weight"] <= high)
        off.append(said["mean_weight_off"])
    assert np.mean(held) >= 0.95 - 0.033
    assert np.mean(off) <= 0.05


@pytest.mark.parametrize(("scale", "rows_used", "off"), [(1.0, 3_000, False), (0.8, 3_000, True), (1.25, 3_000, True), (0.8, 20, False)])
def test_a_mean_weight_is_far_from_1_beyond_chance_and_tolerance(rows: dict[str, Any], scale: float, rows_used: int, off: bool) -> None:
    """q too small or too large by a fourth: of 3,000 impressions that is seen, of 20 it may be chance."""
    few = {"table": rows["table"].slice(0, rows_used), "weight": np.ones(rows_used, np.float32)}
    q = (scale * rows["table"]["true_propensity"].to_numpy()).astype(np.float32)[:rows_used]
    found = diagnosed({**few, "q": q}, 256).report()["weights"]
    assert found["mean_weight_off"] is off
    assert found["mean_weight_expected"] == pytest.approx(1, abs=1e-6)
    assert abs(found["mean_weight"] - 1) > 0.1 or scale == 1


def test_sums_do_not_depend_on_the_batches(rows: dict[str, Any]) -> None:
    one, other = diagnosed(rows, 3_000), diagnosed(rows, 77)
    np.testing.assert_allclose(one.sums, other.sums, rtol=1e-10)
    few, many = one.report()["weights"], other.report()["weights"]
    assert few.pop("mean_weight_interval") == pytest.approx(many.pop("mean_weight_interval"))
    assert few == pytest.approx(many)


def test_true_propensities_balance_what_selection_has_not(rows: dict[str, Any]) -> None:
    """Clicks depend on price and user; weighted by the true propensity, what is left of it is chance."""
    ones = np.ones(len(rows["table"]), np.float32)
    found = diagnosed(rows, 500, ones, rows["table"]["true_propensity"].to_numpy()).report()
    price = next(row for row in found["balance"]["features"] if row["feature"] == "price")
    assert price["before"] > 0.3
    assert price["after"] < 3 / found["weights"]["effective_sample_size"] ** 0.5
    assert found["weights"]["mean_weight"] == pytest.approx(1, abs=0.1)
    flat = diagnosed(rows, 500, ones, np.full_like(ones, 0.5)).report()
    assert all(row["after"] == pytest.approx(row["before"]) for row in flat["balance"]["features"]), "equal weights change nothing"


def test_a_weight_of_two_is_the_row_twice(rows: dict[str, Any]) -> None:
    table = rows["table"]
    twice = np.arange(len(table)) % 3 == 0
    order = np.concatenate([np.arange(len(table)), np.flatnonzero(twice)])
    again = {"table": table.take(order), "weight": np.ones(len(order), np.float32), "q": rows["q"][order]}
    weighted = diagnosed(rows, 300, np.where(twice, 2, 1).astype(np.float32))
    twice_over = diagnosed(again, 300)
    # All but the variance of the mean weight, which tells rows that are alike from rows that are one.
    np.testing.assert_allclose(np.delete(weighted.sums, 1, axis=1), np.delete(twice_over.sums, 1, axis=1), rtol=1e-9)


def test_large_tables_are_folded(rows: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propensity, "FOLDED_ROWS", 7)
    click, weight, q = rows["table"]["click"].to_numpy(), rows["weight"].astype(np.float64), rows["q"].astype(np.float64)
    made = diagnosed(rows, 256)
    assert made.sums.shape == (3, 1 + 1 + 3 * 2 + 3 * (7 + 1) + (5 + 1))
    found = {row["feature"]: row["before"] for row in made.report()["balance"]["features"]}
    for name in ("user", "tags", "history"):
        columns = sorted(covariates(rows["table"], name, 7), key=lambda x: -float(weight @ x))[:5]
        assert found[name] == pytest.approx(max(difference(x, click, weight, q)[0] for x in columns))


def test_without_a_click_there_is_no_balance(rows: dict[str, Any]) -> None:
    none = {**rows, "table": with_columns(rows["table"], click=np.zeros(3_000, np.uint8))}
    found = diagnosed(none, 500).report()
    assert found.keys() == {"weights"}
    assert (found["weights"]["num_clicked"], found["weights"]["effective_share"], found["weights"]["mean_weight"]) == (0, None, 0)
    assert found["weights"]["mean_weight_off"], "clicks were to be expected"


def test_an_impression_holds_a_value_once() -> None:
    lengths, ids = np.array([3, 0, 1, 2]), np.array([4, 4, 9, 1, 0, 5])
    impressions, values = held_values(ids, lengths, 5)
    assert Counter(zip(impressions.tolist(), values.tolist(), strict=True)) == Counter([(0, 4), (2, 1), (3, 0), (1, 5)])
    empty = np.zeros(0, np.int64)
    assert [part.tolist() for part in held_values(empty, empty, 5)] == [[], []]
    assert [part.tolist() for part in held_values(empty, np.array([0, 0]), 5)] == [[0, 1], [5, 5]]


def test_what_is_the_same_everywhere_differs_by_nothing() -> None:
    totals = np.array([[10.0], [4.0], [7.0]])
    constant = 3 * totals
    assert standardised_differences(constant, 3 * constant, totals).tolist() == [[0], [0]]
    assert number_differences(0 * totals, 0 * totals, 0 * totals, totals).tolist() == [[0], [0]], "missing everywhere"
    assert value_differences(totals, totals).tolist() == [0, 0]
