"""The study on a ratings file: what is read, completed and drawn, and what the estimators are worth where the truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from escm2rec.errors import ConfigError, DataError
from escm2rec.objectives.imputation import imputation_losses, imputation_weights
from escm2rec.simulate.world import generator
from escm2rec.study.completion import complete
from escm2rec.study.ratings import (
    CVRS,
    ESTIMATORS,
    MATRICES,
    SHARES,
    Cells,
    assign,
    draw_labels,
    estimated_risks,
    judge,
    mean_with_interval,
    predictions,
    pseudo_label,
    ratings_study,
    relative_errors,
    summary,
)
from escm2rec.study.ratings_file import read_ratings
from tests.study_cells import one_thread  # noqa: F401
from tests.test_evaluation_html import Page

UNBIASED = ("IPS", "SNIPS", "DR-JL", "MRDR")  # under the true propensity, the last three but for O(1 / observed cells)


def lines_of(users: int = 40, items: int = 30, seed: int = 0, separator: str = "\t", header: str = "") -> str:
    """Ratings 1 to 5 of half of all cells, of two factors and noise, with a time stamp."""
    rng = np.random.default_rng(seed)
    user, item = np.divmod(rng.choice(users * items, users * items // 2, replace=False), items)
    truth = rng.normal(size=(users, 2)) @ rng.normal(size=(2, items)) + rng.normal(size=items)
    rating = np.clip(np.rint(3 + truth[user, item] + rng.normal(0, 0.3, len(user))), 1, 5).astype(int)
    rows = (separator.join(map(str, row)) for row in zip(user + 1, item + 1, rating, np.full(len(user), 881250949), strict=True))
    return header + "\n".join(rows) + "\n"


def cells_of(count: int) -> Cells:
    return assign(np.random.default_rng(count).normal(size=count).astype(np.float32))


# Reading


def write_parquet(path: Path) -> None:
    pl.DataFrame({"rating": [4.5, 1, 3], "item_id": [7, 9, 9], "User": ["b", "b", "a"]}).write_parquet(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("u.data", "b\t7\t4.5\t881250949\nb\t9\t1\t881250949\na\t9\t3\t891717742\n"),
        ("ratings.dat", "b::7::4.5::978300760\r\nb::9::1::978302109\r\na::9::3::978301968\r\n"),
        ("ratings.csv", '\ufeff"userId","movieId","rating","timestamp"\n"b","7","4.5","1"\n"b","9","1","2"\n\n"a","9","3","3"\n'),
        ("named.csv", "rating,time,USER_ID,item\n4.5,1,b,7\n1,2,b,9\n3,3,a,9"),
        ("bare.csv", "b,7,4.5\nb,9,1\na,9,3"),
        ("ratings.parquet", None),
    ],
)
def test_files_of_every_kind_are_read_alike(tmp_path: Path, name: str, text: str | None) -> None:
    path = tmp_path / name
    if text is None:
        write_parquet(path)
    else:
        path.write_text(text, encoding="utf-8")
    ratings = read_ratings(path)
    assert ratings.user.tolist() == [1, 1, 0]
    assert ratings.item.tolist() == [0, 1, 1]
    assert ratings.rating.tolist() == [4.5, 1, 3]
    assert (ratings.num_users, ratings.num_items) == (2, 2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("u.data", "", "u.data holds no rating\nhint: expected is one rating a line"),
        ("u.data", "\n \n", "holds no rating"),
        ("u.data", "user\titem\trating\n", "holds no rating"),
        ("u.data", "\n1 2 3\n", "u.data, line 2: no tab, comma or :: in '1 2 3'\nhint: expected is one rating a line: user, item, rating"),
        (
            "u.data",
            "1\t2\tfive\n",
            "u.data has no columns for user, no columns for item, no columns for rating among: 1, 2, five\nhint: name the columns",
        ),
        ("u.csv", "user,user_id,item,rating\n1,1,2,3\n", "u.csv has 2 columns for user among: user, user_id, item, rating"),
        ("u.data", "1\t2\t3\n1\t3\n2\n", "u.data, line 2: fewer than 3 columns: '1\\\\t3', and 1 more alike\nhint: expected is"),
        ("u.csv", "a,user,item,rating\n1,1,2,3\n1,2,3\n", "u.csv, line 3: fewer than 4 columns: '1,2,3'"),
        ("u.data", "1\t2\t3\n\n1\t3\tnan\n", "u.data, line 3: the rating is no number: '1\\\\t3\\\\tnan'\nhint: expected is"),
        ("u.data", "1\t2\t3\n1\t3\t\n", "line 2: the rating is no number"),
        ("u.data", "1\t2\t3\n\t3\t4\n", "line 2: user or item is missing: '\\\\t3\\\\t4'\nhint: remove or mend it"),
        ("u.data", "a\t2\t3\nb\t3\t4\na\t2\t5\n", "u.data: user 'a' rates item '2' 2 times, in lines 1 and 3\nhint: keep one rating"),
        (
            "u.data",
            "a\t2\t3\nb\t3\t4\na\t2\t5\na\t2\t1\nb\t3\t4\n",
            "'a' rates item '2' 3 times, in lines 1 and 3 first; and so for 1 more pair of user and item\nhint: keep one rating",
        ),
        ("c.yaml", "data:\n", "c.yaml is no ratings file but .yaml\nhint: --ratings takes a file, one rating a line: user, item, rating"),
        ("u.data", "a\t2\t3\nb\t3\t3\n", "u.data: all ratings are 3, which orders nothing\nhint: give ratings that differ"),
        ("u.data", b"\x1f\x8b\x08\xff\xfe", "u.data is no UTF-8 text: .*\nhint: unpack or convert it"),
        ("u.parquet", b"PAR1 not", "u.parquet is not a Parquet file, or is damaged: "),
        ("few.data", "1\t2\t3\n1\t3\t4\n", "1 users x 2 items = 2 cells, but 1,000 to 25,000,000 can be studied\nhint: give more of both"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=said):
        ratings_study(path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_bad_parquet_rows_are_told_by_row(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pl.DataFrame({"user": [1, 2, None], "item": [1, 1, 1], "rating": [1.0, 2.0, 3.0]}).write_parquet(path)
    with pytest.raises(DataError, match=r"r\.parquet, row 3: user or item is missing: 'None, 1, 3\.0'"):
        read_ratings(path)
    pl.DataFrame({"user": [1, 2], "item": [1, 1], "rating": [1.0, None]}).write_parquet(path)
    with pytest.raises(DataError, match="row 2: the rating is no number"):
        read_ratings(path)
    pl.DataFrame({"user": [1, 2], "stars": [1.0, 2.0]}).write_parquet(path)
    with pytest.raises(DataError, match="has no columns for item, no columns for rating among: user, stars"):
        read_ratings(path)


def test_a_matrix_that_memory_may_not_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.data"
    path.write_text("".join(f"{number}\t{number}\t{number % 5}\n" for number in range(5001)), encoding="utf-8")
    with pytest.raises(DataError, match=r"5,001 users x 5,001 items = 25,010,001 cells, but .*\nhint: the whole matrix is held in memory"):
        ratings_study(path, tmp_path / "out")


def test_other_mistakes_are_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "u.data", tmp_path / "out"
    with pytest.raises(DataError, match=r"no ratings file at .*u\.data\nhint: --ratings takes a file, one rating a line"):
        ratings_study(path, out)
    path.write_text(lines_of(), encoding="utf-8")
    with pytest.raises(ConfigError, match="2 draws give no interval: at least 3 are needed\nhint: pass more --draws"):
        ratings_study(path, out, draws=2)
    with pytest.raises(ConfigError, match="the seed -1 is negative\nhint: pass a --seed of at least 0"):
        ratings_study(path, out, seed=-1)
    with pytest.raises(ConfigError, match="is or holds the input"):
        ratings_study(path, tmp_path, overwrite=True)
    ratings_study(path, out, draws=3)
    with pytest.raises(ConfigError, match=r"the output folder .* exists\nhint: choose another --out, or pass --overwrite"):
        ratings_study(path, out, draws=3)
    ratings_study(path, out, draws=3, overwrite=True)


# The matrix


def test_completion_finds_the_ratings_that_were_not_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=(120, 2)) @ rng.normal(size=(2, 80)) + rng.normal(size=(120, 1)) + rng.normal(size=80)
    given = rng.random(truth.shape) < 0.3
    path = tmp_path / "u.data"
    # Ids of one width, whose order as text is that of their numbers.
    path.write_text("".join(f"{u:03}\t{i:03}\t{10 * truth[u, i] + 50}\n" for u, i in np.argwhere(given)), encoding="utf-8")
    ratings = read_ratings(path)
    completion = complete(ratings, seed=0)
    assert completion.rating.shape == truth.shape
    assert np.corrcoef(completion.rating[~given], truth[~given])[0, 1] > 0.9
    assert completion.rmse < 0.5 * ratings.rating.std()
    assert np.array_equal(complete(ratings, seed=0).rating, completion.rating)


def test_cells_get_levels_by_rank_and_propensities_of_five_percent() -> None:
    completed = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    cells = assign(completed)
    assert [int((cells.cvr == cvr).sum()) for cvr in CVRS] == [round(share * 2000) for share in SHARES]
    ordered = cells.cvr[np.argsort(completed)]
    assert bool((ordered.diff() >= 0).all())
    assert float(cells.propensity.mean()) == pytest.approx(0.05, abs=1e-12)
    by_level = [float(cells.propensity[cells.cvr == cvr][0]) for cvr in CVRS]
    assert np.array(by_level) / by_level[4] == pytest.approx([0.125, 0.25, 0.5, 1, 1])
    assert torch.equal(assign(np.zeros(2000, np.float32)).cvr, ordered)


def test_predictions_are_wrong_as_the_protocol_says() -> None:
    cvr = cells_of(20_000).cvr
    made = predictions(cvr, generator(0, 2))
    assert tuple(made) == MATRICES
    count = int((cvr == 0.9).sum())
    assert count == 600
    for name, level in (("ONE", 0.1), ("THREE", 0.3), ("FIVE", 0.5)):
        changed = made[name] != cvr
        assert int(changed.sum()) == count
        assert bool((cvr[changed] == level).all())
        assert bool((made[name][changed] == 0.9).all())
    for level in CVRS:
        assert set(made["CRS"][cvr == level].tolist()) == {0.2 if level <= 0.6 else 0.6}
    assert (float(made["SKEW"].min()), float(made["SKEW"].max())) == (0.1, 0.9)
    # Clipping a normal of mean 0.5 and deviation 0.25 at 1.6 deviations on both sides leaves its mean.
    assert float(made["SKEW"][cvr == 0.5].mean()) == pytest.approx(0.5, abs=0.02)
    assert 0.18 < float(made["SKEW"][cvr == 0.5].std()) < 0.25


def test_labels_are_drawn_afresh_in_every_draw() -> None:
    cells = cells_of(10_000)
    first, again, other = (draw_labels(cells, generator(0, 3, number)) for number in (0, 0, 1))
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(same))
        assert not torch.equal(torch.as_tensor(one), torch.as_tensor(different))
    # Conversions of cells of CVR 0.5 agree between draws as often as coins do.
    middle = cells.cvr == 0.5
    assert float((first.conversion == other.conversion)[middle].double().mean()) == pytest.approx(0.5, abs=0.06)
    assert float(first.conversion[middle].mean()) == pytest.approx(0.5, abs=0.06)
    made = relative_errors(cells, 3, seed=0)
    for values in (*made["true_risks"].values(), made["betas"]):
        assert len(set(values)) == 3


def test_estimated_propensities_are_between_the_true_ones_and_the_share() -> None:
    cells = cells_of(5_000)
    true, flat, mixed = (draw_labels(cells, generator(0, 3, 0), beta) for beta in (0.0, 1.0, 0.5))
    torch.testing.assert_close(true.q, cells.propensity)
    torch.testing.assert_close(flat.q, true.click.mean().expand_as(flat.q))
    torch.testing.assert_close(1 / mixed.q, (1 / true.q + 1 / flat.q) / 2)
    assert torch.equal(true.conversion, mixed.conversion)


# The estimators


class Dense:
    """The formulas of the docstring over all cells in numpy, written without the code under test."""

    def __init__(self, predicted: Tensor, click: Tensor, conversion: Tensor, q: Tensor) -> None:
        self.predicted, self.o, self.r, self.q = (each.numpy() for each in (predicted, click, conversion, q))

    def error(self, label: Any) -> Any:
        return -label * np.log(self.predicted) - (1 - label) * np.log1p(-self.predicted)

    def imputed(self, v: Any) -> Any:
        z = np.log(self.predicted / (1 - self.predicted))
        return self.error(np.sum(self.o * v * z**2 * self.r) / np.sum(self.o * v * z**2))

    def risks(self) -> dict[str, float]:
        o, q, delta = self.o, self.q, self.error(self.r)
        plain, jl, mrdr = self.imputed(1.0), self.imputed(1 / q), self.imputed((1 - q) / q**2)
        return {
            "naive": np.sum(o * delta) / np.sum(o),
            "direct": np.mean(plain),
            "EIB": np.mean(o * delta + (1 - o) * plain),
            "IPS": np.mean(o * delta / q),
            "SNIPS": np.sum(o * delta / q) / np.sum(o / q),
            "DR-JL": np.mean(jl + o * (delta - jl) / q),
            "MRDR": np.mean(mrdr + o * (delta - mrdr) / q),
        }


@pytest.mark.parametrize("name", MATRICES)
def test_estimates_are_their_formulas(name: str) -> None:
    cells = cells_of(3_000)
    predicted = predictions(cells.cvr, generator(0, 2))[name]
    draw = draw_labels(cells, generator(0, 3, 0), beta=0.3)
    found = estimated_risks(judge(predicted), draw.click, draw.conversion, draw.q)
    expected = Dense(predicted, draw.click, draw.conversion, draw.q).risks()
    assert tuple(found) == ESTIMATORS
    assert found == pytest.approx(expected, rel=1e-6)  # logits are kept in float32
    assert len({round(value, 9) for value in found.values()}) == len(ESTIMATORS)


@pytest.mark.parametrize("weighting", ["dr-jl", "mrdr"])
def test_the_pseudo_label_minimises_the_imputation_loss_that_trains(weighting: Any) -> None:
    cells = cells_of(3_000)
    draw = draw_labels(cells, generator(0, 3, 0), beta=0.3)
    observed = draw.click > 0
    z = torch.logit(predictions(cells.cvr, generator(0, 2))["SKEW"])[observed]
    r, v = draw.conversion[observed], imputation_weights(draw.q[observed], weighting, 0.0)
    imputation_logit = torch.logit(pseudo_label(z, r, v)).requires_grad_()

    def loss(logit: Tensor) -> Tensor:
        return (v * imputation_losses(logit.expand_as(z), z, r, "label", "squared")).sum() / v.sum()

    loss(imputation_logit).backward()  # type: ignore[no-untyped-call]
    assert imputation_logit.grad is not None
    assert abs(float(imputation_logit.grad)) < 1e-10
    held = imputation_logit.detach()
    assert float(loss(held)) < min(float(loss(held + step)) for step in (-0.1, 0.1))


def test_labels_that_were_not_observed_change_nothing() -> None:
    cells = cells_of(3_000)
    judged = judge(predictions(cells.cvr, generator(0, 2))["ONE"])
    draw = draw_labels(cells, generator(0, 3, 0))
    found = estimated_risks(judged, draw.click, draw.conversion, draw.q)
    changes: tuple[Callable[[Tensor], Tensor], ...] = (lambda r: 1 - r, lambda r: r * 0, lambda r: r * torch.nan)
    for change in changes:
        mutated = torch.where(draw.click > 0, draw.conversion, change(draw.conversion))
        assert estimated_risks(judged, draw.click, mutated, draw.q) == found
    # Those that were observed do.
    other = estimated_risks(judged, draw.click, 1 - draw.conversion, draw.q)
    assert all(other[name] != found[name] for name in ESTIMATORS)


def test_snips_of_a_constant_loss_is_that_constant() -> None:
    cells = cells_of(3_000)
    draw = draw_labels(cells, generator(0, 3, 0))
    # A prediction of 0.5 is log 2 wrong, whatever the label.
    found = estimated_risks(judge(torch.full_like(cells.cvr, 0.5)), draw.click, draw.conversion, draw.q)
    exact = pytest.approx(np.log(2), rel=1e-12)
    assert {name for name, value in found.items() if value == exact} == set(ESTIMATORS) - {"IPS"}


def test_a_draw_without_a_click_is_finite() -> None:
    cells = cells_of(1_000)
    click = torch.zeros_like(cells.cvr)
    found = estimated_risks(judge(predictions(cells.cvr, generator(0, 2))["CRS"]), click, click, cells.propensity)
    assert np.isfinite(list(found.values())).all()
    assert found["naive"] == found["IPS"] == found["SNIPS"] == 0
    unseen = draw_labels(Cells(cells.cvr, torch.full_like(click, 1e-12)), generator(0, 3, 0), beta=1.0)
    assert float(unseen.click.sum()) == 0
    assert bool((unseen.q == 0.05).all())


def signed(count: int, draws: int) -> dict[str, dict[str, Any]]:
    errors = relative_errors(cells_of(count), draws, seed=1, beta=0.0)["errors"]
    return {name: {estimator: np.array(values) for estimator, values in found.items()} for name, found in errors.items()}


def test_under_the_true_propensity_weighting_is_unbiased_and_naive_is_not() -> None:
    found = signed(40_000, draws=80)
    z = {
        (name, estimator): values.mean() / (values.std(ddof=1) / np.sqrt(len(values)))
        for name, by_estimator in found.items()
        for estimator, values in by_estimator.items()
    }
    assert len(z) == len(MATRICES) * len(ESTIMATORS)
    # Of 20 standard normals, one beyond 3.5 in a hundred runs.
    assert max(abs(z[name, estimator]) for name in MATRICES for estimator in UNBIASED) < 3.5
    assert min(abs(z[name, estimator]) for name in MATRICES for estimator in ("naive", "direct", "EIB")) > 10


def test_relative_error_falls_with_the_number_of_cells() -> None:
    small, large = signed(4_000, draws=40), signed(64_000, draws=40)
    for name in MATRICES:
        for estimator in UNBIASED:
            # With 16 times the cells a quarter is expected.
            assert np.abs(large[name][estimator]).mean() < 0.45 * np.abs(small[name][estimator]).mean()
        assert np.abs(large[name]["naive"]).mean() > 0.6 * np.abs(small[name]["naive"]).mean()


# What is said of the draws


def test_intervals_are_students() -> None:
    # Quantiles of the t distribution, from its tables.
    for draws, quantile in ((3, 4.303), (5, 2.776), (20, 2.093)):
        values = np.arange(draws, dtype=float)
        mean, (low, high) = mean_with_interval(values)
        assert mean == (draws - 1) / 2
        assert high - mean == pytest.approx(mean - low)
        assert (high - mean) / (values.std(ddof=1) / np.sqrt(draws)) == pytest.approx(quantile, rel=0.01)


def test_the_best_is_marked_and_those_that_may_be_level() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 20))
    noise -= noise.mean(1, keepdims=True)
    made = summary({"a": list(0.5 + noise[0]), "b": list(-0.1 + noise[0]), "c": list(-0.1001 + noise[1]), "d": list(-0.103 + noise[0])})
    assert [name for name, record in made.items() if record["best"]] == ["b"]
    # d is worse than b in every draw, by little: only a paired comparison shows it.
    assert [name for name, record in made.items() if record["level_with_best"]] == ["b", "c"]
    assert made["b"]["relative_error"] == pytest.approx(-made["b"]["bias"])
    assert made["b"]["bias_interval"][0] < made["b"]["bias"] < made["b"]["bias_interval"][1] < 0


def test_no_interval_of_a_relative_error_goes_below_0() -> None:
    """Three draws, one of them far off: Student's interval of the mean size would begin below 0. The bias has a sign and keeps its own."""
    record = summary({"a": [0.3, 0.001, -0.002], "b": [0.3, 0.301, 0.302]})["a"]
    low, high = mean_with_interval(np.array([0.3, 0.001, 0.002]))[1]
    assert low < 0
    assert record["interval"] == [0, high]
    assert record["bias_interval"][0] < 0
    tight = summary({"b": [0.3, 0.301, 0.302]})["b"]
    assert tight["interval"] == mean_with_interval(np.array([0.3, 0.301, 0.302]))[1]


def test_a_study_is_the_same_twice_and_explains_itself(tmp_path: Path) -> None:
    ratings = tmp_path / "u <1>.data"
    ratings.write_text(lines_of(), encoding="utf-8")
    result = ratings_study(ratings, tmp_path / "one", draws=4, seed=5)
    ratings_study(ratings, tmp_path / "two", draws=4, seed=5)
    other = ratings_study(ratings, tmp_path / "three", draws=4, seed=6)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["manifest.json", "ratings.html", "ratings.json"]
    text = (tmp_path / "one" / "ratings.json").read_text(encoding="utf-8")
    assert text == (tmp_path / "two" / "ratings.json").read_text(encoding="utf-8")
    tree = json.loads(text)
    means = {name: {each: found[each]["relative_error"] for each in found} for name, found in tree["results"].items()}
    assert result["relative_errors"] == means
    assert other["relative_errors"] != means
    assert (result["html"], result["cells"], len(means)) == (str(tmp_path / "one" / "ratings.html"), 1200, 5)
    assert tree["data"]["cells"] == 1200
    assert {len(record["errors"]) for found in tree["results"].values() for record in found.values()} == {4}
    html = (tmp_path / "one" / "ratings.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.outside == []
    assert page.headings[0] == "Estimating the risk of a CVR model"
    assert "u &lt;1&gt;.data" in html
    relative = html.split("<h2>Relative error")[1].split("<h2>")[0]
    assert "by Student's t, cut at 0, which no such error is below" in relative
    assert ">-" not in relative
    for name, found in tree["results"].items():
        assert name in html
        for estimator, record in found.items():
            assert estimator in html
            assert f"{100 * record['relative_error']:.2f}" in html
    assert html.count("<b>") == 1 + len(MATRICES)
