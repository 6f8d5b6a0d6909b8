"""Event logs: the join against a plain reading of its rules, and the whole way to a data set."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from escm2rec.config import DataConfig, EventsSource, load_config
from escm2rec.errors import DataError
from escm2rec.preprocess import encode_raw, preprocess, raw_files
from escm2rec.preprocess.events import join_events
from escm2rec.preprocess.outcomes import NO_KEY, NO_TIME, OPEN, REPEATED_DIFFERING, REPEATED_EQUAL
from escm2rec.preprocess.rejections import Rejected
from escm2rec.schema import Schema
from tests.preprocess_logs import read_split

ROOT = Path(__file__).parents[1]
Rows = list[dict[str, Any]]
TYPES = {"id": pa.int64(), "ts": pa.int64(), "user": pa.string(), "item": pa.int64(), "price": pa.float64()}
COLUMNS = {
    "impressions": ("id", "ts", "user", "item", "price"),
    "clicks": ("id", "ts"),
    "conversions": ("id", "ts", "user", "item"),
}


def config(**changes: Any) -> DataConfig:
    """Windows of 10 and 20 seconds, last touch by user and item."""
    source = {
        "kind": "events",
        "key": "id",
        "time": "ts",
        "click_window_s": 10,
        "conversion_window_s": 20,
        "attribution_key": ["user", "item"],
        **changes.pop("source", {}),
    }
    features = [{"name": "user", "kind": "categorical"}, {"name": "item", "kind": "categorical"}, {"name": "price", "kind": "numeric"}]
    return DataConfig.model_validate({"source": source, "features": features, "split": {"by": "file", "train": "*"}, **changes})


def source(**changes: Any) -> EventsSource:
    made = config(source=changes).source
    assert isinstance(made, EventsSource)
    return made


def shown(key: int | None, ts: int | None, user: str | None = "u", item: int | None = 1, price: float = 1.0) -> dict[str, Any]:
    return {"id": key, "ts": ts, "user": user, "item": item, "price": price}


def event(key: int | None, ts: int | None, user: str | None = None, item: int | None = None) -> dict[str, Any]:
    return {"id": key, "ts": ts, "user": user, "item": item}


def table_of(name: str, rows: Rows) -> pa.Table:
    return pa.table({column: pa.array([row[column] for row in rows], TYPES[column]) for column in COLUMNS[name]})


def write_log(folder: Path, impressions: list[Rows], clicks: Rows, conversions: Rows, suffix: str = ".parquet") -> Path:
    """A folder with the tables, the impressions in as many files as there are lists."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {f"impressions-{number}": ("impressions", rows) for number, rows in enumerate(impressions)}
    tables |= {"clicks": ("clicks", clicks), "conversions": ("conversions", conversions)}
    for file, (name, rows) in tables.items():
        if suffix == ".csv":
            pa_csv.write_csv(table_of(name, rows), folder / f"{file}.csv")
        else:
            pq.write_table(table_of(name, rows), folder / f"{file}.parquet")
    return folder


def joined(made: EventsSource, folder: Path, workspace: Path, refuse: bool = False) -> tuple[list[list[int]], dict[str, Any]]:
    """The codes of each impression file, and the counts."""
    files, counts = join_events(made, raw_files(made, folder), workspace, 1 << 28, Rejected(refuse))
    assert counts is not None
    assert all(file.outcomes is not None for file in files)
    return [list(file.outcomes.read_bytes()) for file in files if file.outcomes is not None], counts


# --- the rules, read plainly ----------------------------------------------------------------------


@dataclass
class Plain:
    """The same decisions, one row after another."""

    source: EventsSource
    codes: list[int] = field(default_factory=list)
    kept: dict[int, tuple[int, dict[str, Any]]] = field(default_factory=dict)  # place and impression of each key
    touches: list[tuple[int, int, int, dict[str, Any]]] = field(default_factory=list)  # clicked, shown, place, impression

    def impression(self, place: int, row: dict[str, Any]) -> int:
        if row["id"] is None:
            return NO_KEY
        if row["ts"] is None:
            return NO_TIME
        if row["id"] in self.kept:
            return REPEATED_EQUAL if self.kept[row["id"]][1] == row else REPEATED_DIFFERING
        self.kept[row["id"]] = place, row
        return 0

    def click(self, row: dict[str, Any]) -> str:
        if row["id"] is None or row["ts"] is None:
            return "rejected"
        if row["id"] not in self.kept:
            return "unknown_impression"
        place, impression = self.kept[row["id"]]
        after = row["ts"] - impression["ts"]
        if not 0 <= after <= self.source.click_window_s:
            return "before_impression" if after < 0 else "late"
        self.touches.append((row["ts"], impression["ts"], place, impression))
        return self.label(place, 1)

    def conversion(self, row: dict[str, Any]) -> str:
        by = ("id",) if row["id"] is not None else ("user", "item")
        asked = [row[name] for name in by]
        if None in asked or row["ts"] is None:
            return "rejected"
        mine = [touch for touch in self.touches if [touch[3][name] for name in by] == asked]
        before = [touch for touch in mine if touch[0] <= row["ts"]]
        if not before:
            known = any([impression[name] for name in by] == asked for _, impression in self.kept.values())
            return "before_click" if mine else "without_click" if known else "unknown_impression"
        clicked, _, place, _ = max(before, key=lambda touch: touch[:3])
        return "late" if row["ts"] - clicked > self.source.conversion_window_s else self.label(place, 2)

    def label(self, place: int, bit: int) -> str:
        fate = "repeated" if self.codes[place] & bit else "used"
        self.codes[place] |= bit
        return fate


def counted(fates: list[str], *names: str) -> dict[str, int]:
    return {"rows": len(fates), **{name: fates.count(name) for name in ("rejected", *names, "repeated", "used")}}


def reference(made: EventsSource, impressions: Rows, clicks: Rows, conversions: Rows) -> tuple[list[int], dict[str, Any]]:
    """Codes and counts by a plain reading."""
    plain = Plain(made)
    usable = [row for row in (*impressions, *clicks) if row["id"] is not None]
    usable += [row for row in conversions if row["id"] is not None or None not in (row["user"], row["item"])]
    times = [row["ts"] for row in usable if row["ts"] is not None]
    end = made.log_end if made.log_end is not None else max(times, default=0)
    assert isinstance(end, int)
    for place, row in enumerate(impressions):
        plain.codes.append(plain.impression(place, row))
    click_fates = [plain.click(row) for row in clicks]
    conversion_fates = [plain.conversion(row) for row in conversions]
    windows = made.click_window_s + made.conversion_window_s
    opened = {place for place, row in plain.kept.values() if row["ts"] + windows > end}
    codes = [OPEN if made.open_windows == "drop" and place in opened else code for place, code in enumerate(plain.codes)]
    return codes, {
        "impressions": {
            "rows": len(impressions),
            "rejected": sum(code in (NO_KEY, NO_TIME) for code in codes),
            "repeated": codes.count(REPEATED_EQUAL),
            "differing": codes.count(REPEATED_DIFFERING),
            "open_windows": len(opened),
            "used": sum(code < NO_KEY for code in codes),
        },
        "clicks": counted(click_fates, "unknown_impression", "before_impression", "late"),
        "conversions": counted(conversion_fates, "unknown_impression", "without_click", "before_click", "late"),
    }


keys, times = st.none() | st.integers(1, 5), st.none() | st.integers(0, 60)
users, items = st.none() | st.sampled_from("ab"), st.none() | st.integers(1, 2)
impression = st.builds(shown, keys, times, users, items, st.sampled_from([1.0, 2.0]))
rows_of = {"impressions": st.lists(impression, max_size=10)}
rows_of |= {name: st.lists(st.builds(event, keys, times, users, items), max_size=12) for name in ("clicks", "conversions")}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    **rows_of,
    cut=st.integers(0, 10),
    log_end=st.none() | st.integers(20, 90),
    open_windows=st.sampled_from(["drop", "keep"]),
    suffix=st.sampled_from([".parquet", ".csv"]),
)
@example([shown(1, 0)], [], [event(None, 30)], 0, None, "drop", ".parquet")  # a bad row does not say when the log ends
def test_the_join_does_what_its_rules_say(
    tmp_path_factory: pytest.TempPathFactory,
    impressions: Rows,
    clicks: Rows,
    conversions: Rows,
    cut: int,
    log_end: int | None,
    open_windows: str,
    suffix: str,
) -> None:
    folder = tmp_path_factory.mktemp("events")
    patterns = {name: f"{name}*{suffix}" for name in COLUMNS}
    made = source(log_end=log_end, open_windows=open_windows, **patterns)
    write_log(folder / "log", [impressions[:cut], impressions[cut:]], clicks, conversions, suffix)
    codes, counts = joined(made, folder / "log", folder / "work")
    expected_codes, expected = reference(made, impressions, clicks, conversions)
    assert codes == [expected_codes[:cut], expected_codes[cut:]]
    assert {name: counts[name] for name in expected} == expected
    for name in ("clicks", "conversions"):
        assert sum(count for kind, count in counts[name].items() if kind != "rows") == counts[name]["rows"]


def test_many_rows_are_joined_the_same_with_any_memory_and_order_of_events(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    impressions = [shown(key, key // 4, f"u{rng.integers(10)}", int(rng.integers(5))) for key in range(8_000)]
    clicks = [event(int(key), int(key) // 4 + int(rng.integers(-2, 14))) for key in rng.integers(0, 8_400, 2_000)]
    conversions = [event(None, int(ts), f"u{rng.integers(11)}", int(rng.integers(5))) for ts in rng.integers(0, 2_100, 500)]
    made = source()
    log = write_log(tmp_path / "log", [impressions], clicks, conversions)
    turned = write_log(tmp_path / "turned", [impressions], clicks[::-1], conversions[::-1])
    expected = reference(made, impressions, clicks, conversions)
    (first,), counts = joined(made, log, tmp_path / "work")
    assert first == expected[0]
    assert {name: counts[name] for name in expected[1]} == expected[1]
    assert min(counts["conversions"].values()) >= 0
    assert counts["conversions"]["used"] > 50
    files, again = join_events(made, raw_files(made, turned), tmp_path / "more", 4 << 30, Rejected(True))
    assert files[0].outcomes is not None
    assert (list(files[0].outcomes.read_bytes()), again) == (first, counts)


# --- the whole way --------------------------------------------------------------------------------


def small_log(folder: Path, suffix: str = ".parquet") -> Path:
    """The example of docs/events.md, with a second file of impressions."""
    impressions = [
        shown(1, 0, "ann", 7),
        shown(2, 5, "ann", 7),
        shown(3, 6, "bob", 7),
        shown(3, 6, "bob", 7),
        shown(4, 30, "bob", 8),
        shown(5, 80, "ann", 7),
    ]
    clicks = [event(1, 3), event(2, 9), event(2, 9), event(3, 20), event(4, 31), event(9, 31)]
    conversions = [event(None, 12, "ann", 7), event(4, 40, "bob", 8), event(None, 41, "bob", 8), event(None, 60, "ann", 7), event(3, 21)]
    return write_log(folder, [impressions[:4], impressions[4:]], clicks, conversions, suffix)


COUNTS = {
    "log_end": "1970-01-01T00:01:20Z",
    "last": {"impressions": "1970-01-01T00:01:20Z", "clicks": "1970-01-01T00:00:31Z", "conversions": "1970-01-01T00:01:00Z"},
    "impressions": {"rows": 6, "rejected": 0, "repeated": 1, "differing": 0, "open_windows": 1, "used": 4},
    "clicks": {"rows": 6, "rejected": 0, "unknown_impression": 1, "before_impression": 0, "late": 1, "repeated": 1, "used": 3},
    "conversions": {
        "rows": 5,
        "rejected": 0,
        "unknown_impression": 0,
        "without_click": 1,
        "before_click": 0,
        "late": 1,
        "repeated": 1,
        "used": 2,
    },
}


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_event_log_becomes_a_data_set(tmp_path: Path, suffix: str) -> None:
    log = small_log(tmp_path / "log", suffix)
    made = config(source={name: f"{name}*{suffix}" for name in COLUMNS}, keep=["id"])
    result = preprocess(made, log, tmp_path / "out")
    assert result["events"] == COUNTS
    assert result["rejected"] == {"repeated impression": 1, "open window": 1}
    back = sorted((int(row["kept.id"]), row["click"], row["conversion"]) for row in read_split(tmp_path / "out"))
    assert back == [(1, 1, 0), (2, 1, 1), (3, 0, 0), (4, 1, 1)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["events"] == COUNTS
    assert [Path(each["path"]).name for each in manifest["input"]] == [
        f"{name}{suffix}" for name in ("impressions-0", "clicks", "conversions", "impressions-1")
    ]
    first = manifest["rejected"]["repeated impression"]["first"][0]
    assert (Path(first["file"]).name, first["row"], first["column"]) == (f"impressions-0{suffix}", 4 + (suffix == ".csv"), "id")
    assert not (tmp_path / "out" / "work").exists()


def test_the_page_of_events_shows_these_counts() -> None:
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    (shown_counts,) = re.findall(r"^```json\n(.*?)^```", page, re.S | re.M)
    assert json.loads(shown_counts) == COUNTS


BEGIN = 1_767_225_600  # 2026-01-01
ASKED_BOTH = r"do both tables hold the same values, of the same days\? see data\.source\.key 'id', and 'id' of the impressions"
DOUBTS: dict[str, tuple[Rows, Rows, dict[str, Any], list[str]]] = {
    "a log as it should be": ([event(1, 3)], [event(1, 4)], {}, []),
    "keys of no impression": (
        [event(1, 3), event(12, 3), event(13, 3)],
        [event(1, 4), event(None, 4, "x", 1), event(14, 4)],
        {},
        [
            rf"of the log 2 of 3 clicks \(66\.7%\) are unknown_impression: {ASKED_BOTH}",
            rf"of the log 2 of 3 conversions .* are unknown_impression: {ASKED_BOTH}, and data\.source\.attribution_key \['user', 'item'\]",
        ],
    ),
    "windows too short": (
        [event(1, 3), event(2, 9), event(3, 9)],
        [event(1, 20)],
        {"click_window_s": 5},
        [
            r"of the log 2 of 3 clicks \(66\.7%\) are late: data\.source\.click_window_s is 5",
            r"of the log 1 of 1 conversions \(100\.0%\) are late: data\.source\.conversion_window_s is 10",
        ],
    ),
    "clicks in another zone": (
        [event(1, -3600), event(2, -3600)],
        [event(1, 20), event(2, 20)],
        {},
        [
            r"of the log 2 of 2 clicks .* are before_impression: do both .*\? see data\.source\.time 'ts', and 'ts' of the impressions",
            r"of the log 2 of 2 conversions .* are without_click: no click of their impressions counts; data\.source\.click_window_s is 10",
        ],
    ),
    "conversions in another zone": (
        [event(1, 3)],
        [event(1, 2)],
        {},
        [r"of the log 1 of 1 conversions .* are before_click: .* data\.source\.time 'ts', and 'ts' of the clicks"],
    ),
    "events without keys": (
        [event(None, 3)],
        [event(None, 3)],
        {},
        [
            r"of the log 1 of 1 clicks \(100\.0%\) are rejected: data\.source\.key 'id', or data\.source\.time 'ts' is null",
            r"of the log 1 of 1 conversions .* are rejected: data\.source\.key 'id', or .*attribution_key .*, or data\.source\.time",
        ],
    ),
    "a stray late row": (
        [event(1, 3)],
        [event(1, 4), event(1, 5), event(1, 86_400)],
        {},
        [
            r"the log ends at 2026-01-02T00:00:00Z, the latest time of its conversions, and the last impression is of 2026-01-01T00:00:50Z"
            r", further before than both windows last \(20 s\): no window is open.*set data\.source\.log_end"
        ],
    ),
    "a stray late row, and log_end": ([event(1, 3)], [event(1, 4), event(1, 5), event(1, 86_400)], {"log_end": BEGIN + 50}, []),
    "a wrong unit": (
        [event(1, 3)],
        [event(1, 4)],
        {"time_unit": "ms", "open_windows": "keep"},
        [r"the log ends at 1970-01-21T.*Z, by the latest time in its tables, which is no time from 1971 to .*time_unit is 'ms'"],
    ),
    "an end that is none": (
        [event(1, 3)],
        [event(1, 4)],
        {"log_end": "2999-01-01"},
        [r"the log ends at 2999-01-01T00:00:00Z, by data\.source\.log_end '2999-01-01', which is no time from 1971 to 2200"],
    ),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_logs_that_hardly_join_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    clicks, conversions, changes, expected = DOUBTS[case]
    impressions = [shown(1, 0), shown(2, 0), shown(3, 0, "v"), shown(4, 50, "w")]
    impressions, clicks, conversions = ([{**row, "ts": BEGIN + row["ts"]} for row in rows] for rows in (impressions, clicks, conversions))
    log = write_log(tmp_path / "log", [impressions], clicks, conversions)
    made = config(source={"conversion_window_s": 10, **changes}, bad_rows="count")
    preprocess(made, log, tmp_path / "out")
    told = [record.message for record in caplog.records if " log " in record.message]
    assert len(told) == len(expected)
    for message, pattern in zip(told, expected, strict=True):
        assert re.match(pattern, message), message


def test_a_doubt_is_told_before_the_error_that_comes_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seconds that are read as milliseconds: all windows are open."""
    log = write_log(tmp_path / "log", [[shown(1, BEGIN), shown(2, BEGIN + 99)]], [], [])
    with pytest.raises(DataError, match="2 for open window"):
        preprocess(config(source={"time_unit": "ms"}), log, tmp_path / "out")
    (told,) = [record.message for record in caplog.records]
    assert told.startswith("the log ends at 1970-01-21T")


def test_a_log_end_beyond_all_times_is_refused() -> None:
    with pytest.raises(ValueError, match=r"log_end 1767225600000 is after 2200 by time_unit 's'"):
        source(log_end=BEGIN * 1_000)
    assert source(log_end=BEGIN * 1_000, time_unit="ms").log_end == BEGIN * 1_000


def test_keep_leaves_rows_with_open_windows_in(tmp_path: Path) -> None:
    result = preprocess(config(source={"open_windows": "keep"}), small_log(tmp_path / "log"), tmp_path / "out")
    assert result["events"]["impressions"] == {**COUNTS["impressions"], "used": 5}  # type: ignore[dict-item]
    assert result["splits"]["train"]["rows"] == 5


def test_score_reads_impressions_without_clicks_and_conversions(tmp_path: Path) -> None:
    preprocess(config(), small_log(tmp_path / "log"), tmp_path / "out")
    schema = Schema.load(tmp_path / "out" / "schema.json")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    table = table_of("impressions", [shown(None, None, "ann", 7), shown(1, 2, "eve", 8), shown(1, 2, "eve", 8)])
    pq.write_table(table.drop_columns(["id", "ts"]), fresh / "impressions.parquet")
    pq.write_table(table, fresh / "other.parquet")
    assert [file.name for file in raw_files(schema.source, fresh, labels=False)] == ["impressions.parquet"]
    files = [*raw_files(schema.source, fresh, labels=False), *raw_files(schema.source, fresh / "other.parquet", labels=False)]
    blocks = list(encode_raw(schema, tmp_path / "out" / "vocabulary", files, keep=[]))
    assert [len(block.table) for block in blocks] == [3, 3]


def test_weights_and_lists_are_read_as_of_a_table(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log", ".csv")
    for path in log.glob("impressions*.csv"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0] + ',"w","words"', *(f"{line},2.5,x|y" for line in lines[1:])]) + "\n")
    made = config(source={"weight": "w", **{name: f"{name}*.csv" for name in COLUMNS}})
    changed = made.model_dump(mode="json") | {"features": [{"name": "words", "kind": "list"}]}
    preprocess(DataConfig.model_validate(changed), log, tmp_path / "out")
    assert [(row["weight"], len(row["words"])) for row in read_split(tmp_path / "out")] == [(2.5, 2)] * 4


def test_names_may_differ_by_table_and_conversions_lack_a_key(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    pq.write_table(pq.read_table(log / "clicks.parquet").rename_columns(["shown_id", "at"]), log / "clicks.parquet")
    conversions = pq.read_table(log / "conversions.parquet").drop_columns("id").slice(0, 1).rename_columns(["at", "user", "item"])
    pq.write_table(conversions, log / "conversions.parquet")
    named = {
        "key": {"impressions": "id", "clicks": "shown_id", "conversions": None},
        "time": {"impressions": "ts", "clicks": "at", "conversions": "at"},
    }
    _, counts = joined(source(**named), log, tmp_path / "work")
    assert (counts["clicks"]["used"], counts["conversions"]["used"]) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.timestamp("ns", "UTC"), [0, 3_000_000_000]),
        (pa.timestamp("s"), [0, 3]),
        (pa.float64(), [0.0, 3.25]),
        (pa.string(), ["1970-01-01", "1970-01-01T01:00:03+01:00"]),
        (pa.large_string(), ["0", "3"]),
    ],
)
def test_times_may_be_of_any_form(tmp_path: Path, kind: pa.DataType, values: list[Any]) -> None:
    log = write_log(tmp_path, [[shown(1, 0)]], [event(1, 3)], [])
    pq.write_table(pa.table({"id": [1], "ts": pa.array(values[1:], kind)}), log / "clicks.parquet")
    pq.write_table(table_of("impressions", [shown(1, 0)]).set_column(1, "ts", pa.array(values[:1], kind)), log / "impressions-0.parquet")
    codes, counts = joined(source(open_windows="keep", log_end=3), log, tmp_path / "work")
    assert (codes, counts["log_end"]) == ([[1]], "1970-01-01T00:00:03Z")


# --- what is wrong with a log ---------------------------------------------------------------------


def test_bad_rows_are_refused_with_their_place(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [[shown(1, 0), shown(1, 0, price=2.0)]], [event(1, 1), event(None, 3)], [event(None, 9, "u")])
    with pytest.raises(DataError, match=r"clicks\.parquet: row 2, column id: event without key: expected an event key that is not null"):
        preprocess(config(), log, tmp_path / "out")
    pq.write_table(table_of("clicks", [event(1, 7_200_000_000_000)]), log / "clicks.parquet")
    with pytest.raises(DataError, match=r"clicks\.parquet: row 1, column ts: event time: .*found 7200000000000\nhint: .*time_unit"):
        preprocess(config(), log, tmp_path / "out")
    pq.write_table(table_of("clicks", [event(1, 1)]), log / "clicks.parquet")
    with pytest.raises(DataError, match=r"conversions\.parquet: row 1, column id: event without key"):
        preprocess(config(), log, tmp_path / "out")
    pq.write_table(table_of("conversions", []), log / "conversions.parquet")
    with pytest.raises(DataError, match=r"impressions-0\.parquet: row 2, column id: impression with the key of another: .*found 1"):
        preprocess(config(source={"log_end": 99}), log, tmp_path / "out")
    result = preprocess(config(source={"log_end": 99}, bad_rows="count"), log, tmp_path / "out")
    assert result["rejected"] == {"impression with the key of another": 1}
    assert result["splits"]["train"] == {"rows": 1, "clicks": 1, "conversions": 0}


def test_text_that_is_no_time_is_told_with_what_is(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [[shown(1, 0)]], [], [])
    pq.write_table(pa.table({"id": [1], "ts": ["01/02/2026 10:00"]}), log / "clicks.parquet")
    with pytest.raises(DataError) as error:
        preprocess(config(), log, tmp_path / "out")
    assert error.value.message == (
        f"{log}/clicks.parquet: row 1, column ts: event time: expected a time from 1740 to 2200: a number, a timestamp, or ISO text, "
        "found '01/02/2026 10:00'"
    )
    assert error.value.hint == (
        "write times as timestamps, or as ISO text such as 2026-01-31, 2026-01-31 18:30 or 2026-01-31T18:30:00+01:00 (UTC where none is "
        "said); other text becomes timestamps by polars' str.to_datetime('%d/%m/%Y %H:%M') or pandas' to_datetime(texts, format=...); "
        "numbers count data.source.time_unit since 1970; data.bad_rows: count leaves such rows out"
    )


def test_malformed_lines_of_events_are_counted(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log", ".csv")
    with (log / "clicks.csv").open("a") as file:
        file.write("1,2,3\n")
    made = config(source={name: f"{name}*.csv" for name in COLUMNS}, bad_rows="count")
    result = preprocess(made, log, tmp_path / "out")
    assert result["events"]["clicks"] == {**COUNTS["clicks"], "rows": 7, "rejected": 1}  # type: ignore[dict-item]
    assert result["rejected"]["number of columns"] == 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a column that is missing": ({"time": "tss"}, r"has no column 'tss' \(data\.source\.time\)\nhint: did you mean 'ts'\?"),
    "a key that is missing": ({"key": "idd"}, r"has no column 'idd' \(data\.source\.key\)\nhint: did you mean 'id'\?"),
    "an attribution column that is missing": (
        {"attribution_key": ["usr"]},
        r"has no column 'usr' \(data\.source\.attribution_key\)\nhint: did you mean 'user'\?",
    ),
    "a pattern without files": (
        {"clicks": "klicks*"},
        r"^no file in \S+/log matches the pattern 'klicks\*' of data\.source\.clicks: "
        r"it holds clicks\.parquet, conversions\.parquet, impressions-0\.parquet, impressions-1\.parquet\n"
        r"hint: set data\.source\.clicks to the names of the files, or pass their folder$",
    ),
    "a file of two tables": ({"clicks": "*"}, r"impressions-0\.parquet matches the patterns of impressions .* and clicks \('\*'\)"),
    "a time of no such type": ({"time": "flags"}, r"column 'flags' is no event time: expected numbers, timestamps, .*found type list"),
    "a key of no such type": ({"key": "price"}, r"column 'price' is no event key: expected whole numbers or text, found type double"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_log_that_does_not_fit_its_config_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    log = small_log(tmp_path / "log")
    for path in log.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.append_column("flags", pa.array([[1]] * len(table), pa.list_(pa.int64()))), path)
    with pytest.raises(DataError, match=message):
        preprocess(config(source=changes), log, tmp_path / "out")


def test_a_log_is_a_folder(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    with pytest.raises(DataError, match=r"impressions-0\.parquet is no folder: impressions, clicks and conversions are read from one"):
        preprocess(config(), log / "impressions-0.parquet", tmp_path / "out")


def test_the_example_config_reads_a_log(tmp_path: Path) -> None:
    """data/events.yaml, by a log of its columns."""
    made = load_config(ROOT / "data" / "events.yaml").data
    begin, hour = 1_767_225_600, 3_600  # 2026-01-01
    rng = np.random.default_rng(0)
    number = np.arange(2_000)
    ts, users, items = begin + number * hour // 2, rng.integers(0, 40, 2_000), rng.integers(0, 30, 2_000)
    clicked = np.flatnonzero(rng.random(2_000) < 0.3)
    bought = clicked[rng.random(len(clicked)) < 0.3]
    columns = {"impression_id": number, "ts": ts, "user_id": users, "item_id": items, "country": ["nl"] * 2_000, "price": rng.random(2_000)}
    pq.write_table(pa.table(columns), tmp_path / "impressions-2026.parquet")
    pq.write_table(pa.table({"impression_id": clicked, "ts": ts[clicked] + 60}), tmp_path / "clicks-2026.parquet")
    orders = {"ts": ts[bought] + 600, "user_id": users[bought], "item_id": items[bought]}
    pq.write_table(pa.table(orders), tmp_path / "conversions-2026.parquet")
    result = preprocess(made, tmp_path, tmp_path / "out")
    assert result["events"]["conversions"]["used"] == len(bought)
    assert all(result["splits"][split]["conversions"] for split in ("train", "validation", "test"))
