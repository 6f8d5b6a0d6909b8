import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from escm2rec.config import DataConfig, TableSource
from escm2rec.errors import DataError
from escm2rec.preprocess import RawFile, portions, preprocess, tables
from escm2rec.preprocess.block import Request
from escm2rec.preprocess.stable_hash import hash64
from escm2rec.preprocess.tables import TableFile
from escm2rec.schema import Feature
from tests.preprocess_logs import made, read_split, table_config, values_of, write_parquet

FEATURES: list[dict[str, Any]] = [
    {"name": "number_id", "kind": "categorical", "min_count": 2, "oov_rows": 3},
    {"name": "text_id", "kind": "categorical"},
    {"name": "numbers", "kind": "list"},
    {"name": "texts", "kind": "weighted_list", "weights_column": "text_weights", "max_size": 2},
    {"name": "price", "kind": "numeric"},
]

row = st.fixed_dictionaries(
    {
        "number_id": st.none() | st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1),
        "text_id": st.none() | st.text(max_size=3),
        "numbers": st.none() | st.lists(st.integers(0, 5), max_size=4),
        "pairs": st.lists(st.tuples(st.sampled_from(["a", "bb", "", "ü"]), st.floats(-1, 9, width=32)), max_size=4),
        "price": st.none() | st.floats(-100, 100),
        "click": st.integers(0, 1),
    }
)
TYPES = {
    "number_id": pa.int64(),
    "text_id": pa.string(),
    "numbers": pa.list_(pa.int64()),
    "texts": pa.list_(pa.string()),
    "text_weights": pa.list_(pa.float64()),
    "price": pa.float64(),
    "click": pa.int64(),
    "conversion": pa.int64(),
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(row, min_size=1, max_size=12))
def test_a_table_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = tmp_path_factory.mktemp("round")
    columns = {name: [each[name] for each in rows] for name in ("number_id", "text_id", "numbers", "price", "click")}
    columns |= {"texts": [[text for text, _ in each["pairs"]] for each in rows], "conversion": [0] * len(rows)}
    columns["text_weights"] = [[weight for _, weight in each["pairs"]] for each in rows]
    pq.write_table(pa.table({name: pa.array(columns[name], kind) for name, kind in TYPES.items()}), folder / "part.parquet")
    out, _ = made(table_config(FEATURES), folder, folder / "out")
    back = read_split(out, part=len(rows))
    names = {feature: values_of(out, feature) for feature in ("number_id", "text_id", "numbers", "texts")}
    counts = {value: columns["number_id"].count(value) for value in columns["number_id"]}
    for each, encoded in zip(rows, back, strict=True):
        value = each["number_id"]
        if value is None:
            assert encoded["number_id"] is None
        elif counts[value] >= 2:
            assert names["number_id"][encoded["number_id"]] == value
        else:
            assert encoded["number_id"] == int(hash64(np.array([value]))[0]) % 3
        assert (None if each["text_id"] is None else names["text_id"][encoded["text_id"]]) == each["text_id"]
        assert [names["numbers"][number] for number in encoded["numbers"]] == (each["numbers"] or [])
        assert [names["texts"].get(text, "OOV") for text in encoded["texts"]] == [
            text if text in names["texts"].values() else "OOV" for text, _ in each["pairs"]
        ]
        assert encoded["texts.weight"] == [np.float32(weight) for _, weight in each["pairs"]]
        assert encoded["click"] == each["click"]
    assert_standardised(columns["price"], [each["price"] for each in back])


def assert_standardised(raw: Sequence[float | None], encoded: Sequence[float]) -> None:
    held = np.array([value for value in raw if value is not None])
    std = held.std() if len(held) else 0.0
    std = std if std > 1e-9 else 1.0
    expected = [0.0 if value is None else (value - held.mean()) / std for value in raw]
    np.testing.assert_allclose(encoded, expected, rtol=1e-4, atol=1e-4)


def test_vocabulary_is_by_count_then_value(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"c": [5, 3, 3, 9, 9, 1]})
    out, _ = made(table_config([{"name": "c", "kind": "categorical", "max_size": 3, "oov_rows": 2}]), tmp_path, tmp_path / "out")
    assert values_of(out, "c") == {2: 3, 3: 9, 4: 1}


def test_hashed_features_keep_no_vocabulary(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"c": [5, None, 5, 7], "t": ["x", "y", None, "x"]})
    features = [{"name": name, "kind": "categorical", "hash_size": 1000} for name in ("c", "t")]
    out, _ = made(table_config(features), tmp_path, tmp_path / "out")
    five, seven = (hash64(np.array([5, 7])) % np.uint64(1000)).tolist()
    x, y = (hash64(pa.array(["x", "y"])) % np.uint64(1000)).tolist()
    assert [(each["c"], each["t"]) for each in read_split(out, a=4)] == [(five, x), (None, y), (five, None), (seven, x)]
    assert not list((out / "vocabulary").iterdir())


def test_a_feature_without_any_value_has_its_oov_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"c": pa.array([None, None], pa.int64()), "n": pa.array([None, None], pa.float64())})
    features = [{"name": "c", "kind": "categorical"}, {"name": "n", "kind": "numeric"}]
    out, _ = made(table_config(features), tmp_path, tmp_path / "out")
    assert [(each["c"], each["n"]) for each in read_split(out)] == [(None, 0.0), (None, 0.0)]


def test_weighted_lists_may_be_structs_or_maps(tmp_path: Path) -> None:
    pairs = [[("a", 0.5), ("b", 2.0)], [], [("a", 1.0)]]
    structs = [[{"value": value, "weight": weight} for value, weight in each] for each in pairs]
    columns = {"m": pa.array(pairs, pa.map_(pa.string(), pa.float32())), "s": pa.array(structs)}
    write_parquet(tmp_path / "a.parquet", columns)
    out, _ = made(table_config([{"name": name, "kind": "weighted_list"} for name in "ms"]), tmp_path, tmp_path / "out")
    for name in "ms":
        names = values_of(out, name)
        back = [[(names[i], w) for i, w in zip(each[name], each[f"{name}.weight"], strict=True)] for each in read_split(out, a=3)]
        assert back == pairs


def test_csv_lists_weights_and_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('c,l,w,n,click,conversion\nx,1|2|1,a:b:0.5|c:2,1e2,1,0\n,,,,0,0\n"q,r",3,a:b:1,0,0,0\n')
    features: list[dict[str, Any]] = [
        {"name": "c", "kind": "categorical"},
        {"name": "l", "kind": "list"},
        {"name": "w", "kind": "weighted_list"},
        {"name": "n", "kind": "numeric", "log1p": True},
    ]
    out, _ = made(table_config(features, source={"files": "*.csv"}, keep=["c"]), tmp_path, tmp_path / "out")
    rows = sorted(read_split(out), key=lambda row: ["q,r", None, "x"].index(row["kept.c"]), reverse=True)
    c, lists, w = (values_of(out, name) for name in "clw")
    assert [c.get(each["c"]) for each in rows] == ["x", None, "q,r"] == [each["kept.c"] for each in rows]
    assert [[lists[value] for value in each["l"]] for each in rows] == [["1", "2", "1"], [], ["3"]]
    assert [[w[value] for value in each["w"]] for each in rows] == [["a:b", "c"], [], ["a:b"]]
    assert [each["w.weight"] for each in rows] == [[0.5, 2.0], [], [1.0]]
    np.testing.assert_allclose([each["n"] for each in rows], [1, 0, -1], atol=1e-6)  # log 101 and log 1 are two points


def test_weights_and_truth_are_carried(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"c": [1, 2], "w": [0.5, 2], "p": [0.1, 0.2], "r": [0.3, 1.0]})
    source = {"weight": "w", "true_propensity": "p", "true_cvr": "r"}
    out, _ = made(table_config([{"name": "c", "kind": "categorical"}], source=source), tmp_path, tmp_path / "out")
    carried = [[each[name] for name in ("weight", "true_propensity", "true_cvr")] for each in read_split(out, a=2)]
    np.testing.assert_allclose(carried, [[0.5, 0.1, 0.3], [2, 0.2, 1.0]], rtol=1e-6)


BASE: dict[str, Any] = {"c": [1, 2, 3], "click": [0, 1, 0], "conversion": [0, 1, 0]}
NUMERIC = {"name": "n", "kind": "numeric"}
WEIGHTED = {"name": "l", "kind": "weighted_list", "weights_column": "w"}


@pytest.mark.parametrize(
    ("columns", "feature", "source", "reason", "message"),
    [
        ({"click": [0, 2, 0]}, {}, {}, "label", "row 2, column click: label: expected 0 or 1, found 2"),
        ({"conversion": [0, None, 0]}, {}, {}, "label", "row 2, column conversion: .*found null"),
        ({"n": [1.0, float("nan"), 2.0]}, NUMERIC, {}, "number", "row 2, column n: .*found nan"),
        ({"n": [1.0, float("inf"), 2.0]}, NUMERIC, {}, "number", "row 2, column n: .*found inf"),
        ({"n": [1.0, -1.0, 2.0]}, {**NUMERIC, "log1p": True}, {}, "number", "row 2, column n: .*above -1"),
        ({"l": [[1], [1, 2], []], "w": [[1.0], [1.0], []]}, WEIGHTED, {}, "unequal lists", "row 2, column l: .*2 values and 1 weights"),
        ({"l": [[1], [1], []], "w": [[1.0], [None], []]}, WEIGHTED, {}, "number", "row 2, column w: "),
        ({"l": [[1], [1, None], []]}, {"name": "l", "kind": "list"}, {}, "null in a list", r"row 2, column l: .*found \[1, None\]"),
        ({"c": pa.array([1, 2**63, 2], pa.uint64())}, {}, {}, "id", "row 2, column c: .*fits int64, found 9223372036854775808"),
        (
            {"w": [1.0, 0.0, 1.0]},
            {},
            {"weight": "w"},
            "weight",
            "row 2, column w: weight: expected a finite number above 0 .*found 0.0",
        ),
        ({"p": [1.0, -0.5, 1.0], "r": [0.5] * 3}, {}, {"true_propensity": "p", "true_cvr": "r"}, "truth", "row 2, column p: truth: "),
    ],
)
def test_a_bad_row_is_refused_or_counted(
    tmp_path: Path, columns: dict[str, Any], feature: dict[str, Any], source: dict[str, Any], reason: str, message: str
) -> None:
    file = write_parquet(tmp_path / "a.parquet", {**BASE, **columns})
    features = [{"name": "c", "kind": "categorical"}, *([feature] if feature else [])]
    with pytest.raises(DataError, match=r"a\.parquet: " + message):
        preprocess(table_config(features, source=source), file, tmp_path / "out")
    result = preprocess(table_config(features, source=source, bad_rows="count"), file, tmp_path / "out")
    assert result["rejected"] == {reason: 1}
    assert len(read_split(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("line", "feature", "reason", "message"),
    [
        ("x,1,0,0,9", {}, "number of columns", "row 3: number of columns: .*5 columns instead of 4"),
        ("x,1", {}, "number of columns", "row 3: number of columns: .*2 columns instead of 4"),
        ("x,many,0,0", {"name": "n", "kind": "numeric"}, "number", "row 3, column n: .*found 'many'"),
        ("x,a:1|b,0,0", {"name": "n", "kind": "weighted_list"}, "weighted value", r"row 3, column n: .*found 'a:1\|b'"),
        ("x,a:nan,0,0", {"name": "n", "kind": "weighted_list"}, "weighted value", "row 3, column n: .*found 'a:nan'"),
        ("x,1,,0", {}, "label", "row 3, column click: .*found null"),
        ("x,1,yes,0", {}, "label", "row 3, column click: .*found 'yes'"),
    ],
)
def test_a_bad_csv_line_is_refused_or_counted(tmp_path: Path, line: str, feature: dict[str, Any], reason: str, message: str) -> None:
    good = "x,a:1,0,0\n" if feature.get("kind") == "weighted_list" else "x,1,0,0\n"
    file = tmp_path / "a.csv"
    file.write_text("c,n,click,conversion\n" + good + line + "\n" + good)
    features = [{"name": "c", "kind": "categorical"}, *([feature] if feature else [])]
    with pytest.raises(DataError, match=r"a\.csv: " + message):
        preprocess(table_config(features), file, tmp_path / "out")
    result = preprocess(table_config(features, bad_rows="count"), file, tmp_path / "out")
    assert result["rejected"] == {reason: 1}


def test_lines_after_a_skipped_csv_line_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("c,click,conversion\nx,0,0\nx\nx,0,0\nx,0,0,0\nx,7,0\n")
    out, _ = made(table_config([{"name": "c", "kind": "categorical"}], bad_rows="count"), file, tmp_path / "out")
    rejected = json.loads((out / "manifest.json").read_text())["rejected"]
    assert [each["row"] for each in rejected["number of columns"]["first"]] == [3, 5]
    assert [each["row"] for each in rejected["label"]["first"]] == [6]


C = {"name": "c", "kind": "categorical"}
F = {"name": "f", "kind": "categorical", "column": "x"}


def config_of(kind: str, column: str = "c", **more: Any) -> DataConfig:
    return table_config([{"name": "f", "kind": kind, "column": column, **more}])


@pytest.mark.parametrize(
    ("column", "config", "message"),
    [
        (["a", "b"], config_of("numeric"), "column 'c': expected a number, found type string"),
        ([[1], [2]], config_of("categorical"), "column 'c': expected one value a row, found type list"),
        ([1, 2], config_of("list"), "column 'c': expected a list a row, found type int64"),
        (
            [1.5, 2.5],
            config_of("categorical"),
            "column 'c': expected whole numbers or strings, found type double\nhint: cast ids to whole numbers: pandas turns",
        ),
        (
            [date(2026, 1, 1)] * 2,
            config_of("categorical"),
            "column 'c': expected whole numbers or strings, found type date32.*\nhint: write what of the time matters, such as its hour",
        ),
        ([b"a", b"b"], config_of("categorical"), "found type binary\nhint: set the feature's kind or column"),
        ([[1], [2]], config_of("weighted_list"), "expected a list of \\(value, weight\\) structs, a map, or a weights_column"),
        ([[1], [2]], config_of("weighted_list", weights_column="k"), "column 'k': expected a list of weights a row"),
        ([1, 2], config_of("categorical", "cc"), "has no column 'cc' \\(feature 'f'\\)\nhint: did you mean 'c'"),
        (
            [1, 2],
            config_of("categorical", "entirely_other"),
            "has no column 'entirely_other' \\(feature 'f'\\)\nhint: it has: c, k, click, conversion",
        ),
    ],
)
def test_a_column_that_is_not_what_was_declared_is_refused(tmp_path: Path, column: Any, config: DataConfig, message: str) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"c": column, "k": [1, 2]})
    with pytest.raises(DataError, match=message):
        preprocess(config, file, tmp_path / "out")


WHO_ASKS: dict[str, tuple[dict[str, Any], str]] = {
    "feature": ({}, "feature 'f'"),
    "two features": ({"features": [F, {**F, "name": "g"}]}, "feature 'f', feature 'g'"),
    "weights": ({"features": [{**F, "kind": "weighted_list", "column": "c", "weights_column": "x"}]}, "weights_column of feature 'f'"),
    "cross": ({"features": [{"name": "f", "kind": "categorical", "cross": ["c", "x"]}]}, "feature 'f'"),
    "label": ({"features": [C], "source": {"click": "x"}}, "data.source.click"),
    "weight": ({"features": [C], "source": {"weight": "x"}}, "data.source.weight"),
    "keep": ({"features": [C], "keep": ["x"]}, "keep or split"),
    "split": ({"features": [C], "split": {"by": "hash", "column": "x", "train": 1.0}}, "keep or split"),
}


@pytest.mark.parametrize("case", WHO_ASKS)
def test_a_column_that_is_missing_says_who_asked(tmp_path: Path, case: str) -> None:
    changes, asked = WHO_ASKS[case]
    file = write_parquet(tmp_path / "a.parquet", {"c": [1], **{f"other {number}": [1] for number in range(30)}})
    config = table_config(changes.pop("features", [F]), **changes)
    with pytest.raises(DataError) as error:
        preprocess(config, file, tmp_path / "out")
    others = ", ".join(f"other {number}" for number in range(19))
    assert error.value.message == f"{file} has no column 'x' ({asked})"
    assert error.value.hint == f"it has: c, {others} and 13 more"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("conversion", "data.source.conversion is a label: write whole numbers, 0 or 1, or booleans"),
        ("weight", "data.source.weight is the weight of a row: write numbers above 0"),
        ("true_cvr", "data.source.true_cvr is a probability: write numbers from 0 to 1"),
    ],
)
def test_a_label_of_another_type_says_what_it_should_be(tmp_path: Path, name: str, hint: str) -> None:
    source = {"weight": "weight"} if name == "weight" else {"true_propensity": "c", "true_cvr": "true_cvr"} if name == "true_cvr" else {}
    file = write_parquet(tmp_path / "a.parquet", {"c": [1], "u": [1], name: ["1"]})
    with pytest.raises(DataError) as error:
        preprocess(table_config([{**C, "column": "u"}], source=source), file, tmp_path / "out")
    assert error.value.message == f"{file}: column {name!r}: expected a number, found type string"
    assert error.value.hint == hint


def test_files_of_different_types_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"c": [1, 2]})
    write_parquet(tmp_path / "b.parquet", {"c": ["x", "y"]})
    with pytest.raises(DataError, match=r"b\.parquet: feature 'f' holds string values, in .*a\.parquet it holds int64"):
        preprocess(config_of("categorical"), tmp_path, tmp_path / "out")


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    config = config_of("categorical")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"a\.parquet is not a Parquet file"):
        preprocess(config, tmp_path, tmp_path / "out")
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(DataError, match=r"a\.parquet is empty \(0 bytes\)"):
        preprocess(config, tmp_path, tmp_path / "out")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a\.csv is empty \(0 bytes\)"):
        preprocess(config, tmp_path / "a.csv", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_a_file_without_rows_trains_nothing(tmp_path: Path, name: str) -> None:
    if name.endswith("csv"):
        (tmp_path / name).write_text("c,click,conversion\n")
    else:
        write_parquet(tmp_path / name, {"c": pa.array([], pa.int64())})
    with pytest.raises(DataError, match="no row belongs to the training split"):
        preprocess(config_of("categorical"), tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.table([pa.array([1]), pa.array([2]), pa.array([0]), pa.array([0])], names=["c", "c", "click", "conversion"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("c,c,click,conversion\n1,2,0,0\n")
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(DataError, match=rf"{name} has 2 columns named 'c'"):
            preprocess(table_config([{"name": "c", "kind": "categorical"}]), tmp_path / name, tmp_path / "out")


def test_a_number_beyond_float32_is_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"n": [1.0, 1e39]})
    with pytest.raises(DataError, match=r"row 2, column n: number: expected a number that fits float32 .*found 1e\+39"):
        preprocess(table_config([NUMERIC]), source, tmp_path / "out")


def test_a_weights_column_beside_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("l,w,click,conversion\n1|2,0.5|1,0,0\n")
    with pytest.raises(DataError, match=r"feature 'l' has a weights_column, which is for Parquet\nhint: .*: 12:0\.5\|7:1"):
        preprocess(table_config([WEIGHTED]), tmp_path / "a.csv", tmp_path / "out")


def test_a_csv_cut_anywhere_is_the_same_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CRLF, lines that are no rows and none at the end: bytes, counts and line numbers are those of one cut."""
    rng = np.random.default_rng(0)
    lines = [f"{rng.integers(50)},w{rng.integers(9)}|w{rng.integers(9)},{rng.random():.3f},{number % 3 % 2},0" for number in range(400)]
    lines[17], lines[200], lines[201], lines[333] = "", "1,2", 'x,"open,1.0,0,0', "7,,not a number,1,0"
    text = "\r\n".join(["c,t,x,click,conversion", *lines])
    (tmp_path / "a.csv").write_bytes(text.encode())
    (tmp_path / "b.csv").write_bytes("\n".join(["c,t,x,click,conversion", *lines[::-1]]).encode())
    features: list[dict[str, Any]] = [
        {"name": "c", "kind": "categorical"},
        {"name": "t", "kind": "list"},
        {"name": "x", "kind": "numeric", "buckets": 4},
    ]
    split = {"by": "hash", "train": 0.7, "validation": 0.1, "test": 0.2}
    config = table_config(features, source={"files": "*.csv"}, split=split, bad_rows="count", rows_per_file=100)
    made(config, tmp_path, tmp_path / "one")
    monkeypatch.setattr(portions, "PORTION_BYTES", 700)
    assert len(portions.text_cuts(tmp_path / "a.csv", 700)) > 8
    made(config, tmp_path, tmp_path / "many")
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*") if path.name != "manifest.json"]
    assert len(names) > 8
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name
    told = [json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("one", "many")]
    assert told[0]["rejected"] == told[1]["rejected"]
    assert {reason: entry["rows"] for reason, entry in told[0]["rejected"].items()} == {"number of columns": 2, "torn line": 2, "number": 2}
    assert sum(split["rows"] for split in told[0]["splits"].values()) == 800 - 2 - 6


def test_a_first_line_without_end_is_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 1 << 20)
    (tmp_path / "a.csv").write_bytes(b"a" * (1 << 20) + b"\n1\n")
    with pytest.raises(DataError, match=r"a.csv is not a CSV table: its first line has more than 1 MiB\nhint: is it text at all?"):
        preprocess(table_config([{"name": "c", "kind": "categorical"}], source={"files": "*.csv"}), tmp_path, tmp_path / "out")


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """Of a row group of 64 MB, what Arrow holds at once is some blocks and a page of each column."""
    rows = 1_000_000
    rng = np.random.default_rng(0)
    table = pa.table({f"c{place}": rng.integers(0, 1 << 60, rows) for place in range(8)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows, use_dictionary=False)
    del table
    features = [Feature(name=f"c{place}", kind="categorical", column=f"c{place}") for place in range(8)]
    file = TableFile(RawFile(tmp_path / "a.parquet"), TableSource(kind="table"), Request.of(features, [], labels=False), 65_536)
    before, most, seen = pa.total_allocated_bytes(), 0, 0
    for batch, _, _ in file.batches():
        most, seen = max(most, pa.total_allocated_bytes() - before), seen + len(batch)
    assert seen == rows
    assert most < 32 << 20
