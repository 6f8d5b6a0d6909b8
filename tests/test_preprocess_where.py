"""Conditions on the rows of a table: what they select, what is not read for them, and what is said of those that are none."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from escm2rec.config import TableSource
from escm2rec.errors import ConfigError, DataError
from escm2rec.preprocess import RawFile
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.rejections import Rejected
from escm2rec.preprocess.tables import TableFile
from escm2rec.preprocess.where import Where
from escm2rec.schema import Feature

DAY = datetime.datetime(2024, 5, 1)
ROWS = 500


def table() -> pa.Table:
    rng = np.random.default_rng(0)
    price = rng.exponential(20, ROWS)
    return pa.table(
        {
            "row": np.arange(ROWS),
            "price": pa.array(price, mask=rng.random(ROWS) < 0.1),
            "country": pa.array(rng.choice(["DE", "FR", "it's"], ROWS), mask=rng.random(ROWS) < 0.1),
            "kind": pa.array(rng.choice(["a", "b"], ROWS)).dictionary_encode(),
            "seen": pa.array([DAY + datetime.timedelta(hours=int(hours)) for hours in range(ROWS)]),
            "new": pa.array(rng.random(ROWS) < 0.5),
            "odd name": rng.integers(0, 9, ROWS),
            "shop": pa.array([{"city": {"size": int(size)}} for size in rng.integers(0, 5, ROWS)]),
            "view": pa.array(rng.choice(["v", "w"], ROWS), pa.string_view()),
            "day": pa.array([(DAY + datetime.timedelta(days=int(days))).date() for days in rng.integers(0, 9, ROWS)]),
            "cents": pa.array([Decimal(int(cents)) / 100 for cents in rng.integers(0, 999, ROWS)], pa.decimal128(12, 2)),
            "big": pa.array(rng.integers(0, 1 << 63, ROWS, dtype=np.uint64) * np.uint64(2)),
            "share": pa.array(rng.choice([0.1, 0.2], ROWS), pa.float32()),
            "path": rng.choice(["a_b", r"a\_b", "axb"], ROWS),
        }
    )


CONDITIONS = {
    "price > 20": pl.col("price") > 20,
    "price between 5 and 10.5 or country = 'it''s'": pl.col("price").is_between(5, 10.5) | (pl.col("country") == "it's"),
    "not (price <= 3)": ~(pl.col("price") <= 3),
    "country in ('DE', 'FR') and kind <> 'a'": pl.col("country").is_in(["DE", "FR"]) & (pl.col("kind").cast(pl.String) != "a"),
    "country not in ('DE')": ~pl.col("country").is_in(["DE"]),
    "price is null": pl.col("price").is_null(),
    "price is not null and new": pl.col("price").is_not_null() & pl.col("new"),
    "new = false": ~pl.col("new"),
    "seen >= timestamp '2024-05-02 06:00:00'": pl.col("seen") >= datetime.datetime(2024, 5, 2, 6),
    "seen < date '2024-05-03'": pl.col("seen") < datetime.datetime(2024, 5, 3),
    "seen < '2024-05-03'": pl.col("seen") < datetime.datetime(2024, 5, 3),
    '"odd name" = 3': pl.col("odd name") == 3,
    '5 < "odd name"': pl.col("odd name") > 5,
    "shop.city.size >= 3": pl.col("shop").struct.field("city").struct.field("size") >= 3,
    "country like 'D%'": pl.col("country").str.starts_with("D"),
    "country not like '%t%'": ~pl.col("country").str.contains("t"),
    "view = 'w'": pl.col("view") == "w",
    "price > 1e9": pl.col("price") > 1e9,
    "day < timestamp '2024-05-04 12:00:00'": pl.col("day") < datetime.date(2024, 5, 5),
    "day = timestamp '2024-05-04 12:00:00'": pl.lit(False),
    "day = date '2024-05-04'": pl.col("day") == datetime.date(2024, 5, 4),
    "cents > 1 and cents <= 2.5": (pl.col("cents").cast(pl.Float64) > 1) & (pl.col("cents").cast(pl.Float64) <= 2.5),
    "big > 9223372036854775807": pl.col("big") > 9223372036854775807,
    "big > 5": pl.col("big") > 5,
    "share = 0.1": pl.col("share") == pl.lit(0.1, pl.Float32),
    "path like 'a\\_b'": (pl.col("path") == "a\\xb") | (pl.col("path") == "a\\_b"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("where")
    pq.write_table(table(), folder / "a.parquet", row_group_size=100)
    flat = table().drop_columns(["shop", "kind", "view", "seen", "new", "cents", "big", "path"])
    pa_csv.write_csv(flat, folder / "a.csv", pa_csv.WriteOptions(quoting_style="needed"))
    return {"parquet": folder / "a.parquet", "csv": folder / "a.csv"}


def read(path: Path, where: str, request_labels: bool = False) -> tuple[list[int], dict[str, Any], list[int]]:
    """The `row`s that come, what is left out by reason, and the lines of the rows."""
    feature = Feature(name="row", kind="categorical", column="row", value_type="int64", encoding="hash", num_embeddings=10)
    file = TableFile(RawFile(path), TableSource(kind="table"), Request.of([feature], [], request_labels, Where.parse(where)), 60)
    rejected, rows, lines = Rejected(refuse=True), [], []
    for task in file.tasks():
        block = task()
        rejected.add(block.rejections)
        values = block.features["row"].values  # type: ignore[union-attr]
        rows += [int(value) for value in (values if isinstance(values, np.ndarray) else values.to_pylist())]
        lines += block.lines.tolist()
    return rows, rejected.reasons, lines


@pytest.mark.parametrize("where", CONDITIONS)
def test_rows_are_those_that_another_engine_selects(files: dict[str, Path], where: str) -> None:
    frame = pl.from_arrow(table().set_column(8, "view", table()["view"].cast(pa.string())))
    assert isinstance(frame, pl.DataFrame)
    expected = frame.filter(CONDITIONS[where])["row"].to_list()
    rows, reasons, lines = read(files["parquet"], where)
    assert rows == expected
    assert lines == [row + 1 for row in expected]
    assert sum(each["rows"] for each in reasons.values()) == ROWS - len(expected)


@pytest.mark.parametrize(
    "where", ["price > 20", "country = 'DE' and price < 100", "price is null", '"odd name" in (1, 2)', "country like 'F%'"]
)
def test_columns_of_a_csv_are_compared_as_what_they_are_compared_with(files: dict[str, Path], where: str) -> None:
    rows, _, lines = read(files["csv"], where)
    assert rows == read(files["parquet"], where)[0]
    assert len(rows) > 5
    assert lines == [row + 2 for row in rows]


def test_row_groups_without_such_rows_are_not_read(files: dict[str, Path], tmp_path: Path) -> None:
    """Their bytes are overwritten, and nobody notices."""
    damaged = tmp_path / "a.parquet"
    content = bytearray(files["parquet"].read_bytes())
    metadata = pq.read_metadata(files["parquet"])
    for group in (0, 1, 3, 4):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    damaged.write_bytes(content)
    rows, reasons, lines = read(damaged, "row >= 210 and row < 250")
    assert (rows, lines) == (list(range(210, 250)), list(range(211, 251)))
    assert reasons == {"not selected": {"rows": 460, "first": []}}
    with pytest.raises(DataError, match=r"a\.parquet: row group 0 is damaged"):
        read(damaged, "row >= 0")


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("price >", r"^--where 'price >' is no SQL condition: syntax error"),
        ("lower(country) = 'de'", r"the function lower is not understood\nhint: it takes columns and constants compared by"),
        ("price + 1 > 2", r"the function \+ is not understood"),
        ("price in (select 1)", r"subquery is not understood"),
        ("price > 1; drop table x", r"is no SQL condition"),
        ("price > 1 order by price", r"more than a condition is not understood"),
        ("1 = 1", r"a comparison without a column is not understood"),
        ("1 = 1 and price > 3", r"a comparison without a column is not understood"),
        ("price > row", r"a comparison of two columns is not understood"),
        ("price > 1 using sample 1%", r"more than a condition"),
        ("price > 1 qualify row = 3", r"more than a condition"),
        ("cast(price as int) = 1", r"is not understood"),
    ],
)
def test_what_is_no_condition_is_refused(where: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Where.parse(where)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("prise > 1", r"a\.parquet has no column 'prise' \(--where\)\nhint: did you mean 'price'\?"),
        ("price = 'x'", r"a\.parquet: --where \"price = 'x'\" does not go with its columns: .*\nhint: compare numbers with numbers"),
        ("country > 3", r"does not go with its columns"),
        ("shop.town = 3", r"does not go with its columns"),
        ("country = 9007199254740993", r"does not go with its columns"),
    ],
)
def test_a_condition_that_does_not_go_with_the_columns_is_told(files: dict[str, Path], where: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read(files["parquet"], where)


def test_a_time_is_not_compared_with_the_texts_of_a_csv(files: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"compares a time with the column 'day', which is text\nhint: write the time as the file does"):
        read(files["csv"], "day >= timestamp '2024-05-04 00:00:00'")
    assert read(files["csv"], "day >= '2024-05-04'")[0] == read(files["parquet"], "day >= '2024-05-04'")[0]


def test_a_time_that_is_none_is_told(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"'yesterday' is no timestamp\[us\]\nhint: write it as 2024-05-31"):
        read(files["parquet"], "seen > 'yesterday'")
