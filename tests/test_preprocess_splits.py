"""Splits by time, of every kind of column, and the times that they read."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from escm2rec.config import TimeSplit, TimeUnit, load_config, moment
from escm2rec.errors import DataError
from escm2rec.preprocess import preprocess
from escm2rec.preprocess.block import RawBlock
from escm2rec.preprocess.files import RawFile
from escm2rec.preprocess.splits import Seen, Splitter
from escm2rec.preprocess.times import TEXT_TIMES, iso_text, microseconds
from tests.preprocess_logs import table_config, write_parquet

DAY = 86_400
BEGIN = 1_767_225_600  # 2026-01-01
SECONDS = [BEGIN, BEGIN + DAY - 1, BEGIN + DAY, BEGIN + 2 * DAY - 1, BEGIN + 2 * DAY, None]
EXPECTED = [0, 0, 1, 1, 2, -1]
MOMENTS = [None if each is None else datetime.fromtimestamp(each, UTC) for each in SECONDS]


def times(scale: int) -> list[int | None]:
    return [None if each is None else each * scale for each in SECONDS]


def text(form: str) -> list[str | None]:
    return [None if each is None else each.strftime(form) for each in MOMENTS]


COLUMNS: dict[str, tuple[pa.Array, dict[str, Any]]] = {
    "seconds": (pa.array(times(1), pa.int64()), {}),
    "unsigned milliseconds": (pa.array(times(1_000), pa.uint64()), {"unit": "ms"}),
    "float microseconds": (pa.array(times(1_000_000), pa.float64()), {"unit": "us"}),
    "decimals": (pa.array([None if each is None else Decimal(each) for each in SECONDS]), {}),
    "text of seconds": (pa.array([None if each is None else str(each) for each in SECONDS]), {}),
    "timestamps": (pa.array(MOMENTS, pa.timestamp("ns", "Europe/Amsterdam")), {}),
    "timestamps without a zone": (pa.array(times(1), pa.timestamp("s")), {}),
    "ISO text": (pa.array(text("%Y-%m-%dT%H:%M:%SZ")), {}),
    "ISO text without a zone": (pa.array(text("%Y-%m-%d %H:%M:%S"), pa.large_string()), {}),
    "numbers by numbers": (pa.array(times(1), pa.int64()), {"validation_from": BEGIN + DAY, "test_from": BEGIN + 2 * DAY}),
    "nanoseconds by numbers": (
        pa.array(times(10**9), pa.int64()),
        {"validation_from": (BEGIN + DAY) * 10**9, "test_from": (BEGIN + 2 * DAY) * 10**9},
    ),
    "timestamps by numbers": (
        pa.array(times(1), pa.timestamp("s")),
        {"validation_from": 1_000 * (BEGIN + DAY), "test_from": 1_000.0 * (BEGIN + 2 * DAY), "unit": "ms"},
    ),
    "text by numbers": (
        pa.array(["20260101", "20260101.9", "20260102", "20260102", "20260103", "?"]),
        {"validation_from": 20260102, "test_from": 20260103},
    ),
}


def numbers(array: pa.Array, **changes: Any) -> list[int]:
    split = TimeSplit.model_validate({"by": "time", "column": "ts", "validation_from": "2026-01-02", "test_from": "2026-01-03", **changes})
    splitter, rows = Splitter(split), np.arange(len(array))
    found = list(splitter.numbers(RawBlock(RawFile(Path("log.parquet")), rows, rows + 1, {}, {"ts": array})))
    Seen.of_all([asdict(splitter.seen)]).refuse_what_cannot_be_compared()
    return found


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_split_by_time_cuts_at_its_boundaries(kind: str) -> None:
    array, changes = COLUMNS[kind]
    assert numbers(array, **changes) == EXPECTED


def test_without_validation_from_none_validate() -> None:
    assert numbers(pa.array(SECONDS), validation_from=None) == [0, 0, 0, 0, 2, -1]


def test_dates_are_midnight_in_utc() -> None:
    days = pa.array([date(2026, 1, 1), date(2026, 1, 2), date(2026, 1, 3), None])
    assert numbers(days) == [0, 1, 2, -1]
    assert numbers(days.cast(pa.date64()), test_from="2026-01-03T00:30:00+01:00", validation_from=None) == [0, 0, 2, -1]


def test_what_cannot_be_compared_belongs_to_no_split() -> None:
    assert numbers(pa.array(["2026-01-01", "yesterday", "2026-02-30", ""])) == [0, -1, -1, -1]
    assert numbers(pa.array([float("nan"), float("inf"), 0.0, BEGIN])) == [-1, -1, -1, 0]  # 0 stands for none


CONVERT = (
    r"write times as timestamps, or as ISO text such as 2026-01-31, 2026-01-31 18:30 or 2026-01-31T18:30:00\+01:00 "
    r"\(UTC where none is said\); "
    r"other text becomes timestamps by polars' str\.to_datetime\('%d/%m/%Y %H:%M'\) or pandas' to_datetime\(texts, format=\.\.\.\)"
)
WRONG: dict[str, tuple[pa.Array, dict[str, Any], str]] = {
    "seconds read as milliseconds": (
        pa.array([None, BEGIN]),
        {"unit": "ms"},
        r"log\.parquet: row 2, column ts: no row has a time .* by data\.split\.unit 'ms': found 1767225600, read as 1970-01-2",
    ),
    "milliseconds read as seconds": (pa.array([BEGIN * 1_000]), {}, r"found 1767225600000\nhint: set data\.split\.unit to what"),
    "days written as numbers": (pa.array(["20260101"]), {}, r"found '20260101', read as 1970-08-23"),
    "text that is no time": (
        pa.array([None, "01/02/2026 10:00"]),
        {},
        r"^log\.parquet: row 2, column ts: no row has a time: expected timestamps, numbers or ISO text, found '01/02/2026 10:00'\n"
        rf"hint: {CONVERT}$",
    ),
    "text that is no number": (
        pa.array(["2026-01-01", "2026-01-02"]),
        {"validation_from": None, "test_from": 1000},
        r"^log\.parquet: row 1, column ts: no row has a number to compare with data\.split\.test_from 1000: found '2026-01-01'\n"
        rf"hint: give test_from \(and validation_from\) as an ISO date, such as '2026-01-31', and {CONVERT}$",
    ),
    "no times": (
        pa.array([True]),
        {},
        r"column 'ts' cannot split by time: expected numbers, timestamps, dates or ISO text, found type bool",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_columns_that_are_surely_wrong_are_refused(case: str) -> None:
    array, changes, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        numbers(array, **changes)


@pytest.mark.parametrize("bad_rows", ["refuse", "count"])
@pytest.mark.parametrize(
    ("wrong", "test_from", "message"),
    [
        ("unknown", 20260103, r"a\.csv: row 3, column ts: no row has a number to compare with .*: found 'unknown'"),
        ("unknown", "2026-01-03", r"a\.csv: row 3, column ts: no row has a time: expected .*, found 'unknown'"),
        ("12", "2026-01-03", r"a\.csv: row 3, column ts: no row has a time from 1971 .*: found '12', read as 1970-01-01T00:00:12Z"),
    ],
)
def test_what_one_file_lacks_is_refused_where_all_do(tmp_path: Path, wrong: str, test_from: Any, message: str, bad_rows: str) -> None:
    """A file, or the last block of one, may well be a single row that has no time."""
    log = tmp_path / "log"
    log.mkdir()
    good = [str(test_from - 1), str(test_from)] if isinstance(test_from, int) else ["2026-01-02", "2026-01-03"]
    rows = {"a": ["", wrong], "b": good, "c": [wrong]}
    split = {"by": "time", "column": "ts", "test_from": test_from}
    config = table_config([{"name": "user", "kind": "categorical"}], source={"files": "*.csv"}, split=split, bad_rows=bad_rows)
    for name, times in rows.items():
        (log / f"{name}.csv").write_text("user,ts,click,conversion\n" + "".join(f"u,{time},0,0\n" for time in times))
    result = preprocess(config, log, tmp_path / "out")
    assert [result["splits"][name]["rows"] for name in ("train", "test")] == [1, 1]
    assert result["rejected"] == {"no split": 3}
    (log / "b.csv").unlink()
    with pytest.raises(DataError, match=message):
        preprocess(config, log, tmp_path / "other")


def test_the_texts_that_the_hint_names_are_times() -> None:
    named = ["2026-01-31", "2026-01-31 18:30", "2026-01-31T18:30:00+01:00"]
    assert all(text in TEXT_TIMES for text in named)
    assert [iso_text(int(time)) for time in microseconds(pa.array(named), "s")[0]] == [
        "2026-01-31T00:00:00Z",
        "2026-01-31T18:30:00Z",
        "2026-01-31T17:30:00Z",
    ]
    converted = pl.Series(["01/02/2026 10:00"]).str.to_datetime("%d/%m/%Y %H:%M").to_arrow()
    assert iso_text(int(microseconds(converted, "s")[0][0])) == "2026-02-01T10:00:00Z"


def test_numbers_that_are_none_and_nulls_belong_to_no_split() -> None:
    plain: dict[str, Any] = {"validation_from": None, "test_from": 1000}
    assert numbers(pa.array([float("nan"), float("inf")]), **plain) == [-1, -1]
    assert numbers(pa.array([None, None], pa.string()), **plain) == [-1, -1]


def test_a_table_is_split_by_time(tmp_path: Path) -> None:
    write_parquet(tmp_path / "log.parquet", {"user": list("abcdef"), "ts": pa.array(SECONDS)})
    split = {"by": "time", "column": "ts", "validation_from": date(2026, 1, 2), "test_from": "2026-01-03"}
    config = table_config([{"name": "user", "kind": "categorical"}], split=split)
    result = preprocess(config, tmp_path, tmp_path / "out")
    assert [result["splits"][name]["rows"] for name in ("train", "validation", "test")] == [2, 2, 1]
    assert result["rejected"] == {"no split": 1}
    assert set(pq.read_table(tmp_path / "out" / "vocabulary" / "user.parquet")["value"].to_pylist()) == {"a", "b"}


def test_boundaries_may_be_set_from_the_command_line() -> None:
    example = Path(__file__).parents[1] / "data" / "events.yaml"
    split = load_config(example, ["data.split.test_from=2026-01-27 12:00:00"]).data.split
    assert isinstance(split, TimeSplit)
    assert (split.validation_from, split.test_from) == ("2026-01-22", "2026-01-27T12:00:00")


@given(
    st.datetimes(datetime(1740, 1, 2), datetime(2199, 12, 31)), st.sampled_from(["T", " "]), st.sampled_from(["", "Z", "+02:00", "-0130"])
)
def test_iso_text_is_read_as_python_reads_it(time: datetime, between: str, zone: str) -> None:
    written = time.isoformat(between) + zone
    found, held = microseconds(pa.array([written]), "s")
    assert held.all()
    assert found[0] == moment(written)
    assert moment(iso_text(int(found[0]))) == found[0]


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)), st.sampled_from(["s", "ms", "us"]))
def test_numbers_are_scaled_or_too_far_and_never_wrap(values: list[int | None], unit: TimeUnit) -> None:
    scale = {"s": 1_000_000, "ms": 1_000, "us": 1}[unit]
    far = moment("2200-01-01")
    found, held = microseconds(pa.array(values, pa.int64()), unit)
    for value, time, is_held in zip(values, found, held, strict=True):
        assert is_held == (value is not None and abs(value * scale) <= far)
        if value is not None and is_held:
            assert time == value * scale
