"""What `inspect` says of a data set, against the raw rows that it was made of."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import Counter
from html import escape, unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from escm2rec.cells import from_cells, to_cells, with_lists
from escm2rec.cli import main
from escm2rec.config import parse_config
from escm2rec.errors import ConfigError, DataError, RunError
from escm2rec.inspection import held, plots
from escm2rec.inspection.inspect import inspect, length_quantiles, raw_numbers, told_number
from escm2rec.preprocess import preprocess
from escm2rec.reader.dataset import Dataset
from escm2rec.schema import Feature
from tests.raw_tables import FEATURES, raw_table
from tests.small_disks import small_disk
from tests.test_evaluation_html import Page

ROWS = 4_000
HASHED = {"name": "hashed", "kind": "list", "column": "tags", "hash_size": 16}
KIND = {"name": "kind", "kind": "categorical"}
SPLIT = {"by": "file", "train": "a*.parquet", "test": "b*.parquet"}


def parsed_page(page: str) -> Page:
    """The page, in which no tag but those that need no end is left open; where words may break needs none either."""
    return Page(page.replace("<wbr>", ""))


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return {"train": raw_table(ROWS, 1, labels=True), "test": raw_table(500, 2, labels=True)}


@pytest.fixture(scope="module")
def data(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    (folder / "logs").mkdir()
    pq.write_table(tables["train"], folder / "logs" / "a.parquet")
    pq.write_table(tables["test"], folder / "logs" / "b.parquet")
    tree = {"source": {"kind": "table"}, "features": [*FEATURES, HASHED], "split": SPLIT, "rows_per_file": 1_500, "rows_per_group": 400}
    preprocess(parse_config({"data": tree}).data, folder / "logs", folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def record(data: Path) -> dict[str, Any]:
    return inspect(data, top=5)


def test_splits_are_told_with_their_rates(record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    assert list(record["splits"]) == ["train", "validation", "test"]
    for split, table in tables.items():
        told, click, conversion = record["splits"][split], table["click"].to_numpy(), table["conversion"].to_numpy()
        assert (told["rows"], told["clicks"], told["conversions"]) == (len(table), click.sum(), conversion.sum())
        assert told["ctr"] == pytest.approx(click.mean())
        assert told["cvr"] == pytest.approx(conversion[click == 1].mean())
        assert told["ctcvr"] == pytest.approx(conversion.mean())
    assert (record["splits"]["train"]["files"], record["splits"]["train"]["row_groups"]) == (3, 11)


def test_a_split_without_rows_is_told_as_such(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = inspect(data, html=tmp_path / "page.html")
    counts = dict.fromkeys(("rows", "clicks", "conversions", "files", "row_groups", "bytes"), 0)
    assert told["splits"]["validation"] == {**counts, **dict.fromkeys(("weights", "rates_of", "ctr", "cvr", "ctcvr"))}
    assert all(list(each["coverage"]) == ["train", "test"] for each in told["features"].values())
    err = capsys.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("validation"))
    assert line.split() == ["validation", "0", "0", "0", "–", "–", "–", "–", "0", "0.0"]
    assert "train / test" in err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    row = page[page.index('<th scope="row">validation</th>') :].split("</tr>")[0]
    cells = re.findall("<td>(.*?)</td>", row)
    assert [re.sub("<.*?>", "", cell) for cell in cells] == ["0", "0", "0", "–", "–", "–", "–", "0", "0", "0.0"]
    assert page.count("validation") == 1 + page.count("in validation and test"), "no feature is told of it"


@pytest.mark.parametrize("rate", [1.0, 0.25])
@pytest.mark.parametrize("weight", [None, "[w]"])
def test_rates_say_whether_they_are_of_rows_or_of_weights(
    weight: str | None, rate: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").mkdir()
    for seed, name in ((1, "a"), (2, "b")):
        table = raw_table(ROWS, seed, labels=True)
        pq.write_table(table.append_column("[w]", pa.array(2.0 - table["click"].to_numpy())), tmp_path / "logs" / f"{name}.parquet")
    tree = {"source": {"kind": "table", "weight": weight}, "features": FEATURES, "split": SPLIT, "negative_keep_rate": rate}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")
    said, page = " ".join(capsys.readouterr().err.split()), (tmp_path / "page.html").read_text(encoding="utf-8")
    rows = {split for split, each in told["splits"].items() if each["rates_of"] == "rows"}
    assert (told["weight"], rows) == (weight, set() if weight else {"test"} if rate < 1 else {"train", "test"})
    for split in ("train", "test"):
        each, kept = told["splits"][split], pq.read_table(tmp_path / "data" / split)
        weights = kept["weight"].to_numpy().astype(np.float64) if weight or rate < 1 else np.ones(len(kept))
        click = kept["click"].to_numpy()
        assert each["ctr"] == pytest.approx((weights * click).sum() / weights.sum())
        assert (each["weights"] is None) == (weight is None and rate == 1)
        assert each["weights"] is None or each["weights"]["rows"] == pytest.approx(weights.sum())
        assert (each["rates_of"] == "rows") == (each["ctr"] == pytest.approx(click.mean()))
    sentence = {
        (None, 1.0): "CTR, CVR and CTCVR are not weighted: of rows, each counting once (rows have no weights).",
        ("[w]", 1.0): "CTR, CVR and CTCVR of train and test are weighted: of the sums of weights, not of the rows that are here. "
        "Rows weigh what column [w] says. All else counts rows.",
        (None, 0.25): "CTR, CVR and CTCVR of train are weighted: of the sums of weights, not of the rows that are here. Of the unclicked "
        "training impressions 25.0% were kept, and each weighs 4 to make up for it. Those of test are of rows. All else counts rows.",
        (
            "[w]",
            0.25,
        ): "CTR, CVR and CTCVR of train and test are weighted: of the sums of weights, not of the rows that are here. Rows weigh "
        "what column [w] says. Of the unclicked training impressions 25.0% were kept, and each weighs 4 times that to make up for it. "
        "All else counts rows.",
    }[weight, rate]
    assert sentence in page
    assert sentence in said
    left_out = told["negatives_left_out"]
    assert ("Rejected rows: none. Negatives" in said) == ("negatives of training" in page) == (rate < 1)
    assert (f"Negatives left out of training: {left_out:,} (25.0% were kept)." in said) == (rate < 1)
    assert (f"<dd>25.0% kept, {left_out:,} left out</dd>" in page) == (rate < 1)
    assert ("means that new values keep coming" in page) == (rate == 1)
    assert ("that were kept, 25.0% of the unclicked ones among them: a value that was in the others alone" in page) == (rate < 1)
    cells = page[page.index("<h2>Splits</h2>") : page.index("</table>")]
    assert [cells.count(f"<td>{of}</td>") for of in ("rows", "weights")] == [len(rows), 2 - len(rows)]


def test_rejected_rows_are_told_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    lines = [f"{'train' if row % 3 else 'other'},{'x' if row == 4 else row},0,0" for row in range(3_000)]
    (tmp_path / "logs" / "a.csv").write_text("\n".join(["part,price,click,conversion", *lines]))
    tree = {
        "source": {"kind": "table", "files": "*.csv"},
        "features": [{"name": "part", "kind": "categorical"}, {"name": "price", "kind": "numeric"}],
        "split": {"by": "column", "column": "part", "train": ["train"]},
        "bad_rows": "count",
    }
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    capsys.readouterr()
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")
    assert sorted(told["rejected"].values()) == [1, 1_000]
    reasons = ", ".join(f"{reason}: {rows:,}" for reason, rows in told["rejected"].items())
    assert "no split: 1,000" in reasons
    assert f"Rejected rows: {reasons}. Features" in " ".join(capsys.readouterr().err.split())
    assert f"<dt>rejected rows</dt><dd>{reasons}</dd>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_weights_that_change_no_rate_are_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    table = raw_table(200, 1, labels=True)
    pq.write_table(table.append_column("w", pa.array(np.ones(200))), tmp_path / "logs" / "a.parquet")
    tree = {"source": {"kind": "table", "weight": "w"}, "features": FEATURES, "split": SPLIT}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    assert inspect(tmp_path / "data")["splits"]["train"]["rates_of"] == "rows"
    assert "of rows, each counting once (weights do not change them)." in " ".join(capsys.readouterr().err.split())


def test_coverage_and_vocabulary_are_those_of_the_log(record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    user, known = record["features"]["user"], set(tables["train"]["user"].drop_null().to_pylist())
    for split, table in tables.items():
        values = table["user"].drop_null().to_pylist()
        assert user["coverage"][split] == pytest.approx(len(values) / len(table))
        assert user["oov"][split] == pytest.approx(sum(value not in known for value in values) / len(values))
    assert (user["values"], user["table_rows"]) == (len(known), len(known) + 1)
    shops = Counter(tables["train"]["shop"].to_pylist())
    kept = sum(count for count in shops.values() if count >= 2)
    assert record["features"]["shop"]["oov"]["train"] == pytest.approx(1 - kept / ROWS)


def test_frequent_values_come_with_their_share_of_all_values(record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    for name in ("shop", "tags"):
        column = tables["train"][name].combine_chunks()
        values = (column.flatten() if name == "tags" else column).to_pylist()
        counts = Counter(values)
        top = record["features"][name]["top"]
        assert len(top) == 5
        assert [entry["count"] for entry in top] == sorted(counts.values(), reverse=True)[:5]
        assert all(counts[entry["value"]] == entry["count"] for entry in top)
        assert [entry["share"] for entry in top] == pytest.approx([entry["count"] / len(values) for entry in top])
    users = Counter(tables["train"]["user"].drop_null().to_pylist())
    assert len(users) == 200
    first_hundredth = sorted(users.values(), reverse=True)[:2]
    assert record["features"]["user"]["concentration"] == pytest.approx(sum(first_hundredth) / sum(users.values()))


@pytest.mark.parametrize("feature", [{"kind": "categorical", "column": "shop"}, {"kind": "list", "column": "tags"}])
@pytest.mark.parametrize("limits", [{}, {"min_count": 10_000}, {"max_size": 3}, {"max_size": 2, "oov_rows": 9}, {"oov_rows": 300}])
def test_concentration_and_plot_are_of_all_rows_those_that_values_share_among_them(
    feature: dict[str, Any], limits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    pq.write_table(raw_table(ROWS, 1, labels=True), tmp_path / "logs" / "a.parquet")
    tree = {"source": {"kind": "table"}, "features": [{"name": "one", **feature, **limits}], "split": SPLIT, "rows_per_group": 500}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    lines = drawn_lines(monkeypatch)
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")["features"]["one"]
    column = with_lists(pq.read_table(tmp_path / "data" / "train"))["one"].combine_chunks()
    rows = (column.flatten() if feature["kind"] == "list" else column).to_numpy()
    counts = np.sort(np.bincount(rows, minlength=told["table_rows"]))[::-1]
    assert told["concentration"] == pytest.approx(counts[: max(told["table_rows"] // 100, 1)].sum() / len(rows))
    assert sum(entry["count"] for entry in told["top"]) <= (1 - told["oov"]["train"]) * len(rows) + 0.5
    if limits.get("min_count"):
        assert (told["values"], told["table_rows"], told["concentration"], told["top"]) == (0, 1, 1.0, [])
    assert len(lines) == (np.count_nonzero(counts) > 1)
    for x, y in lines:
        assert y[0] == pytest.approx(counts[0] / len(rows))
        assert (x[-1], y[-1]) == (told["table_rows"] if told["table_rows"] <= plots.FEW_ROWS else 1.0, 1.0)


def drawn_lines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[float], list[float]]]:
    """The points of each line that a plot is about to have."""
    lines: list[tuple[list[float], list[float]]] = []

    def image(draw: Any, size: tuple[float, float]) -> str:
        axes = Figure(size).subplots()
        draw(axes)
        lines.extend((line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines)  # type: ignore[union-attr]
        return ""

    monkeypatch.setattr(plots, "image", image)
    return lines


def test_long_values_are_short_on_the_page_with_the_whole_in_the_title(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    address = '<https://shop.example/"a"/very/long/path>'
    table = raw_table(400, 1, labels=True).append_column("address", pa.array([address] * 400))
    pq.write_table(table, tmp_path / "logs" / "a.parquet")
    crossed = {"name": "crossed", "kind": "categorical", "cross": ["user", "shop"]}
    hashed = {**crossed, "name": "hashed", "hash_size": 16}
    features = [KIND | {"column": "shop"}, {"name": "address", "kind": "categorical"}, crossed, hashed]
    tree = {"source": {"kind": "table"}, "features": features, "split": SPLIT}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")["features"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert parsed_page(page).open == []
    value = str(told["crossed"]["top"][0]["value"])
    assert len(value) > 10
    page = page.replace("<wbr>", "")
    assert f'<td class="text"><span title="{value}">hash {value[:9]}…</span></td>' in page
    assert f'<td class="text"><span title="{escape(address)}">{escape(address[:23])}…</span></td>' in page
    assert f'<td class="text">row {told["hashed"]["top"][0]["value"]}</td>' in page
    assert '<td class="text">shop 1</td>' in page
    assert page.count(" title=") == 2


def test_rows_of_a_hashed_table_are_counted(record: dict[str, Any], data: Path, tables: dict[str, pa.Table]) -> None:
    told = record["features"]["hashed"]
    counts = np.bincount(with_lists(pq.read_table(data / "train"))["hashed"].combine_chunks().flatten().to_numpy(), minlength=16)
    assert counts.sum() == len(tables["train"]["tags"].combine_chunks().flatten())
    assert [(entry["value"], entry["count"]) for entry in told["top"]] == [
        (int(row), int(counts[row])) for row in np.argsort(-counts, kind="stable")[:5]
    ]
    assert "oov" not in told
    assert "values" not in told


def test_where_training_has_no_value_nothing_is_concentrated(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    table = raw_table(200, 1, labels=True).append_column("never", pa.array([None] * 200, pa.int64()))
    pq.write_table(table, tmp_path / "logs" / "a.parquet")
    features = [
        {"name": name, "kind": "categorical", "column": "never", **more} for name, more in (("own", {}), ("hashed", {"hash_size": 9}))
    ]
    tree = {"source": {"kind": "table"}, "features": [KIND | {"column": "shop"}, *features], "split": SPLIT}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")["features"]
    assert [(told[name]["concentration"], told[name]["top"]) for name in ("own", "hashed")] == [(None, [])] * 2


def test_a_hashed_table_too_large_to_count_is_not(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(held, "MAX_COUNTED_ROWS", 15)
    told = inspect(data, html=tmp_path / "page.html")["features"]["hashed"]
    assert told["table_rows"] == 16
    assert "top" not in told
    assert told["lengths"]["train"]["max"] == 3


def test_list_lengths_are_those_of_the_log(record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    for name in ("tags", "history", "hashed"):
        for split, table in tables.items():
            lengths = np.sort(np.diff(table["tags"].combine_chunks().offsets.to_numpy()))
            told = record["features"][name]["lengths"][split]
            assert told["mean"] == pytest.approx(lengths.mean())
            assert told["max"] == lengths.max()
            for quantile, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                assert told[quantile] == lengths[int(np.ceil(share * len(lengths))) - 1]


def test_quantiles_of_lengths_are_reached() -> None:
    assert length_quantiles(np.array([9, 0, 0, 1])) == {"mean": 0.3, "p50": 0, "p90": 0, "p99": 3, "max": 3}
    assert length_quantiles(np.array([0, 1])) == {"mean": 1.0, "p50": 1, "p90": 1, "p99": 1, "max": 1}


def test_numbers_are_told_in_the_units_of_the_log(record: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    price, told = tables["train"]["price"].to_numpy(), record["features"]["price"]
    assert told["mean"] == pytest.approx(np.log1p(price).mean())
    for name, share in (("min", 0.0), ("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        assert told["quantiles"]["train"][name] == pytest.approx(np.quantile(price, share), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize(("most", "decimals"), [(5e-6, 9), (0.5, 4), (5.0, 2), (5e3, 1), (5e5, 0)])
def test_numbers_are_told_as_they_were_where_float32_holds_them(most: float, decimals: int, log1p: bool) -> None:
    numbers = np.round(np.minimum(np.random.default_rng(1).exponential(most / 5, 2_000), most), decimals)
    numbers[:2] = 0, most
    fitted = np.log1p(numbers) if log1p else numbers
    mean, std = float(fitted.mean()), float(fitted.std())
    feature = Feature(name="x", kind="numeric", column="x", log1p=log1p, mean=mean, std=std, clip=(0, most))
    back = raw_numbers(feature, ((fitted - mean) / std).astype(np.float32))
    assert np.count_nonzero(back != numbers) > 1_000, "what float32 rounded"
    told = [told_number(feature, number) for number in back.tolist()]
    assert told == numbers.tolist()
    assert str(told[0]) == "0.0"


def test_digits_that_float32_does_not_tell_are_not_told() -> None:
    feature = Feature(name="x", kind="numeric", column="x", mean=1_000.0, std=800.0)
    assert told_number(feature, 5000.000129238026) == 5000.0
    assert told_number(feature, -1.89e-09) == 0.0
    assert told_number(feature, 1234.56789012345) == 1234.5679
    assert told_number(feature, 1000.0) == 1000.0
    assert told_number(feature, 1000.0123456789) == 1000.0123, "close to the mean as many as float32 has"
    late = Feature(name="x", kind="numeric", column="x", mean=1_769_385_600.0, std=86_400.0)
    assert told_number(late, 1_769_471_999.0001) == 1_769_471_999.0, "seconds since 1970 have ten"
    clipped = feature.model_copy(update={"clip": (None, 3.14159)})
    assert told_number(clipped, 3.14161) == 3.14159
    logarithm = feature.model_copy(update={"log1p": True, "mean": 0.0, "std": 1.0})
    assert told_number(logarithm, -1.0) == -1.0


def numbers_with_gaps(rows: int, seed: int) -> pa.Table:
    """`price` is missing in every third row, `stars` are so made that some are just their mean, `never` is there in the first log alone."""
    rng = np.random.default_rng(seed)
    gap = np.arange(rows) % 3 == 0
    click = (rng.random(rows) < 0.2).astype(np.int8)
    return pa.table(
        {
            "price": pa.array(rng.exponential(20.0, rows) + 100, mask=gap),
            "stars": pa.array(np.tile([1.0, 2.0, 3.0, 2.0], rows // 4), mask=np.arange(rows) % 8 >= 4),
            "never": pa.array(rng.normal(5, 1, rows), mask=np.full(rows, seed > 1)),
            "same": pa.array(np.full(rows, 7.0), mask=gap),
            "kind": np.arange(rows) % 5,
            "click": click,
            "conversion": click & (rng.random(rows) < 0.5).astype(np.int8),
        }
    )


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gaps")
    (folder / "logs").mkdir()
    pq.write_table(numbers_with_gaps(2_400, 1), folder / "logs" / "a.parquet")
    pq.write_table(numbers_with_gaps(80, 2), folder / "logs" / "b.parquet")
    features = [KIND, *({"name": name, "kind": "numeric"} for name in ("price", "stars", "never", "same"))]
    tree = {"source": {"kind": "table"}, "features": features, "split": SPLIT, "rows_per_group": 500}
    preprocess(parse_config({"data": tree}).data, folder / "logs", folder / "data")
    return folder / "data"


def test_numbers_are_those_that_were_there_with_the_share_missing_beside_them(gaps: Path, tmp_path: Path) -> None:
    told = inspect(gaps, html=tmp_path / "page.html")["features"]
    for split, seed, rows in (("train", 1, 2_400), ("test", 2, 80)):
        table = numbers_with_gaps(rows, seed)
        for name in ("price", "stars", "same"):
            there = table[name].drop_null().to_numpy()
            assert told[name]["missing"][split] == pytest.approx(1 - len(there) / rows)
            for quantile, share in (("min", 0.0), ("p1", 0.01), ("p25", 0.25), ("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                assert told[name]["quantiles"][split][quantile] == pytest.approx(np.quantile(there, share), abs=1e-4), (name, quantile)
    assert told["price"]["mean"] == pytest.approx(np.mean(numbers_with_gaps(2_400, 1)["price"].drop_null().to_numpy()))
    assert told["stars"]["mean"] == 2.0, "the stars of 2 lie as missing ones do"
    assert (told["never"]["missing"], told["never"]["quantiles"]["test"]) == ({"train": 0.0, "test": 1.0}, None)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "of the numbers that were there; missing is the share of the impressions without one" in page
    numbers = page[page.index("<h2>Numbers</h2>") : page.index("<h2>Distributions")]
    assert [row.split("</td>")[0] for row in numbers.split("<tbody>")[1].split("<td>")[1::10]] == ["33.3%", "50.0%", "0.00%", "33.3%"]


def test_a_number_that_training_never_has_is_told_without_quantiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    pq.write_table(numbers_with_gaps(40, 2), tmp_path / "logs" / "a.parquet")
    tree = {"source": {"kind": "table"}, "features": [KIND, {"name": "never", "kind": "numeric"}], "split": SPLIT}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")["features"]["never"]
    assert (told["missing"], told["quantiles"]) == ({"train": 1.0}, {"train": None})
    assert capsys.readouterr().err.splitlines()[-1].split() == ["never", "numeric", "–", "0.00%", "–", "–", "–"]
    assert len(parsed_page((tmp_path / "page.html").read_text(encoding="utf-8")).images) == 1, "that of the kind"


@pytest.mark.parametrize(("most", "said"), [(1_000_000, "all of them"), (2_400, "all of them"), (100, "one impression in 24")])
def test_the_page_says_that_numbers_are_of_a_sample(
    gaps: Path, most: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "SAMPLE_ROWS", most)
    inspect(gaps, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Quantiles, their range and the plot are of a sample of 1,000,000 impressions at most, which may have none" in page
    assert f"here it is {said}." in page


@pytest.mark.parametrize("most", [1, 7, 800, 10_000])
def test_a_sample_is_without_missing_numbers_and_with_as_many_of_the_mean_as_all_have(
    gaps: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "SAMPLE_ROWS", most)
    step = -(-2_400 // most)
    numbers = held.held_by(Dataset.open(gaps))["train"].numbers
    kept = {name: pq.read_table(gaps / "train")[name].to_numpy()[::step] for name in ("price", "stars")}
    assert np.array_equal(numbers["price"], kept["price"][kept["price"] != 0])
    zeros = np.count_nonzero(kept["stars"] == 0)
    assert np.count_nonzero(numbers["stars"] == 0) == round(zeros / 3), "600 of 1,800 are the mean, not missing"


@pytest.mark.parametrize("most", [1, 7, 4_000, 10_000])
def test_a_sample_takes_every_kth_row_wherever_groups_begin(data: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "SAMPLE_ROWS", most)
    step = -(-ROWS // most)
    numbers = held.held_by(Dataset.open(data))["train"].numbers["price"]
    assert np.array_equal(numbers, pq.read_table(data / "train")["price"].to_numpy()[::step])


def test_the_command_prints_json_and_tables_for_people(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: dict[str, Any]
) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(data), "--html", str(page), "--top", "5"])
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {**record, "html": str(page)}
    assert [line.split()[0] for line in seen.err.splitlines() if line.split()[0] in (*record["features"], *record["splits"])] == [
        "train",
        "validation",
        "test",
        *record["features"],
    ]
    html = page.read_text(encoding="utf-8")
    parsed = parsed_page(html)
    assert parsed.outside == []
    assert parsed.headings[0] == "What the data set holds"
    assert len(parsed.images) == 5 + 3 + 1  # tables of a vocabulary or hashed, lists, numbers
    assert main_refuses(data, page, capsys) == f"error: the page {page} exists"


def labels_of(image: str) -> list[str]:
    """All texts of a plot; matplotlib writes each into a comment before its outlines."""
    drawn = base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode()
    return re.findall(r"<!-- (.*?) -->", drawn)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 9, plots.FEW_ROWS])
def test_the_axis_of_a_small_table_counts_its_rows(rows: int) -> None:
    labels = labels_of(plots.skew_plot(np.cumsum(np.arange(rows, 0, -1)), rows))
    ticks = labels[: labels.index(f"most frequent rows (of {rows})")]
    assert ticks == (["1", "2", "3", "4", "5"][:rows] if rows <= 5 else ticks)
    assert all(1 <= int(tick) <= rows for tick in ticks)
    assert len(ticks) >= 2


@pytest.mark.parametrize("rows", [plots.FEW_ROWS + 1, 99, 100_000])
def test_the_axis_of_a_larger_table_has_shares_of_its_rows(rows: int) -> None:
    labels = labels_of(plots.skew_plot(np.cumsum(np.arange(rows, 0, -1)), rows))
    ticks = labels[: labels.index("share of the table's rows")]
    assert ticks[-2:] == ["10%", "100%"]


@pytest.mark.parametrize("counts", [[9], [0, 9], [5, 4], [1, 2, 3], [1, 2, 3, 4, 5], [1] * 41])
def test_the_axis_of_lengths_has_whole_numbers(counts: list[int]) -> None:
    labels = labels_of(plots.lengths_plot(np.array(counts)))
    ticks = labels[: labels.index("values")]
    assert len(ticks) >= min(len(counts), 2)
    assert all(0 <= int(tick) < len(counts) for tick in ticks)


def test_a_thin_tail_of_lengths_is_told_where_there_is_one() -> None:
    assert not any("more than" in label for label in labels_of(plots.lengths_plot(np.array([1, 2, 3]))))
    labels = labels_of(plots.lengths_plot(np.array([0, 99_950, 0, 30, 0, 20])))
    assert labels[:4] == ["0", "1", "values", "(at most 0.1% have more than 1, up to 5)"]


def test_tails_of_numbers_are_told_where_there_are_any() -> None:
    assert not any("%" in label for label in labels_of(plots.histogram_plot(np.array([5.0] * 9))))
    inside = np.linspace(0, 1, 9_998)
    labels = labels_of(plots.histogram_plot(np.array([*inside, 0.5, 70_000.0])))
    assert [label for label in labels if "%" in label] == ["(≤ 0.1% below 0.001, down to 0)", "(≤ 0.1% above 0.999, up to 7e+04)"]
    even = np.array([0.0] * 50 + [1.0] * 50)
    assert not any("%" in label for label in labels_of(plots.histogram_plot(even)))
    upper = labels_of(plots.histogram_plot(np.array([0.0] * 99_990 + [8.0] * 10)))
    assert [label for label in upper if "%" in label] == ["(≤ 0.1% above 0, up to 8)"]


def test_the_tables_of_the_page_hold_nothing_too_long_to_break(tmp_path: Path) -> None:
    """So that they fit a page of 1,200 pixels, with lists apart."""
    (tmp_path / "logs").mkdir()
    table = (
        raw_table(400, 1, labels=True).append_column("w" * 60, pa.array(["<" * 50] * 400)).append_column("n" * 60, pa.array([1.5] * 400))
    )
    pq.write_table(table, tmp_path / "logs" / "a.parquet")
    long = [
        {"name": "w" * 60, "kind": "categorical"},
        {"name": "n" * 60, "kind": "numeric"},
        {"name": "tags_of_each_item_" * 4, "kind": "list", "column": "tags"},
        {"name": "crossed", "kind": "categorical", "cross": ["user", "shop"]},
    ]
    tree = {"source": {"kind": "table"}, "features": long, "split": SPLIT}
    preprocess(parse_config({"data": tree}).data, tmp_path / "logs", tmp_path / "data")
    told = inspect(tmp_path / "data", html=tmp_path / "page.html")["features"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert parsed_page(page).open == []
    assert "Values an impression" in page
    cells = re.findall('<t[hd][^>]* class="text">(.*?)</t[hd]>', page)
    pieces = [unescape(piece) for cell in cells for piece in re.split(r"<br>|<wbr>|</?span.*?>|\s", cell)]
    assert len(pieces) > 30
    assert max(len(piece) for piece in pieces) == 14
    names = {unescape(re.sub("<.*?>", "", cell.split("<br>")[0])) for cell in cells}
    assert set(told) <= names, "whole, when the breaks are taken out"


def test_lists_are_told_on_the_page_with_their_lengths(data: Path, record: dict[str, Any], tmp_path: Path) -> None:
    inspect(data, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    rows = page[page.index("<h2>Values an impression</h2>") :].split("</table>")[0].split("<tbody>")[1].split("</tr>")[:-1]
    assert len(rows) == 3
    for row, name in zip(rows, ("tags", "history", "hashed"), strict=True):
        mean, *counts = (re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row))
        told = record["features"][name]["lengths"]["train"]
        assert float(mean) == pytest.approx(told["mean"], abs=1e-3)
        assert counts == [str(told[column]) for column in ("p50", "p90", "p99", "max")]


def main_refuses(data: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", str(data), "--html", str(page)])
    return capsys.readouterr().err.splitlines()[0]


def test_a_page_that_may_not_be_written_is_refused_before_anything_is_read(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*absent for the page"):
        inspect(tmp_path / "no data", html=tmp_path / "absent" / "page.html")
    with pytest.raises(ConfigError, match=r"the page .* exists"):
        inspect(data, html=tmp_path, overwrite=True)
    page = tmp_path / "page.html"
    page.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"will not overwrite .*page.html: it is no page that escm2rec made"):
        inspect(data, html=page, overwrite=True)
    assert page.read_text() == "mine"
    page.unlink()
    inspect(data, html=page)
    inspect(data, html=page, overwrite=True)
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_page_on_a_full_disk_is_told(data: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4k") as disk:
        told = (
            rf"^cannot write {disk}: No space left on device; .*\nhint: make room there, then run the same command again, or choose another"
        )
        with pytest.raises(RunError, match=told):
            inspect(data, html=disk / "page.html")


def test_what_is_no_data_set_or_damaged_is_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set at .*nowhere"):
        inspect(tmp_path / "nowhere")
    damaged = Path(shutil.copytree(data, tmp_path / "damaged"))
    part = damaged / "train" / "part-00000.parquet"
    table = pq.read_table(part)
    held, offsets = from_cells(table["hashed"].combine_chunks(), pa.int32())
    outside = to_cells(np.full(len(held), 16, np.int32), offsets)
    pq.write_table(table.set_column(table.column_names.index("hashed"), "hashed", outside), part, row_group_size=400)
    with pytest.raises(DataError, match=r"row group 0, column hashed: id 16 is out of range, its table has rows 0 to 15"):
        inspect(damaged)
    torn = pa.array([*table["hashed"].to_pylist()[:450], b"abc", *table["hashed"].to_pylist()[451:]], pa.binary())
    pq.write_table(table.set_column(table.column_names.index("hashed"), "hashed", torn), part, row_group_size=400)
    with pytest.raises(DataError, match=r"part-00000.parquet, row 450, column hashed: a list of 3 bytes is no whole number of values"):
        inspect(damaged)
    pq.write_table(table.drop_columns(["price"]), part, row_group_size=400)
    with pytest.raises(DataError, match="row group 0: no column 'price'"):
        inspect(damaged)
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    (broken / "vocabulary" / "shop.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot read the vocabulary .*shop.parquet"):
        inspect(broken)
